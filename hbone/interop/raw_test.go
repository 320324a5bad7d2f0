package interop

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// raw is a peer that sends and expects single frames.
type raw struct {
	t    *testing.T
	conn net.Conn
	*http2.Framer
	settings map[http2.SettingID]uint32 // the other side's
	buf      bytes.Buffer
	enc      *hpack.Encoder
}

func newRaw(t *testing.T, conn net.Conn) *raw {
	r := &raw{t: t, conn: conn, Framer: http2.NewFramer(conn, conn), settings: make(map[http2.SettingID]uint32)}
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	r.enc = hpack.NewEncoder(&r.buf)
	_ = conn.SetDeadline(time.Now().Add(15 * time.Second))
	return r
}

// rawClient speaks to our server; it has said hello.
func rawClient(t *testing.T, s *server) *raw {
	t.Helper()
	conn, err := tls.Dial("tcp", s.addr.String(), s.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID))
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, conn)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = io.WriteString(conn, http2.ClientPreface)
	r.ok(err)
	r.ok(r.WriteSettings())
	r.readSettings()
	return r
}

func (r *raw) ok(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// next is the next frame that is not bookkeeping: SETTINGS' ACK, WINDOW_UPDATE, PING of the
// keepalive.
func (r *raw) next() http2.Frame {
	r.t.Helper()
	for {
		f, err := r.ReadFrame()
		if err != nil {
			r.t.Fatalf("read a frame: %v", err)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
		case *http2.WindowUpdateFrame:
			continue
		}
		return f
	}
}

func (r *raw) readSettings() {
	r.t.Helper()
	f, ok := r.next().(*http2.SettingsFrame)
	if !ok {
		r.t.Fatal("the first frame is not SETTINGS")
	}
	r.ok(f.ForeachSetting(func(s http2.Setting) error { r.settings[s.ID] = s.Val; return nil }))
	r.ok(r.WriteSettingsAck())
}

func (r *raw) block(fields ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.ok(r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return r.buf.Bytes()
}

func (r *raw) headers(id uint32, end bool, fields ...string) {
	r.t.Helper()
	block := r.block(fields...)
	first := true
	for first || len(block) > 0 {
		n := min(len(block), 16<<10)
		if first {
			r.ok(r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:n], EndStream: end, EndHeaders: n == len(block)}))
		} else {
			r.ok(r.WriteContinuation(id, n == len(block), block[:n]))
		}
		block, first = block[n:], false
	}
}

func (r *raw) wantStatus(id uint32, status string) {
	r.t.Helper()
	f, ok := r.next().(*http2.MetaHeadersFrame)
	if !ok || f.StreamID != id || f.PseudoValue("status") != status {
		r.t.Fatalf("got %v, want status %s on stream %d", f, status, id)
	}
}

func (r *raw) wantReset(id uint32, code http2.ErrCode) {
	r.t.Helper()
	f := r.next()
	if rst, ok := f.(*http2.RSTStreamFrame); !ok || rst.StreamID != id || rst.ErrCode != code {
		r.t.Fatalf("got %v, want RST_STREAM %s on stream %d", f, code, id)
	}
}

func (r *raw) wantGoAway(last uint32, code http2.ErrCode) {
	r.t.Helper()
	f := r.next()
	if g, ok := f.(*http2.GoAwayFrame); !ok || g.LastStreamID != last || g.ErrCode != code {
		r.t.Fatalf("got %v, want GOAWAY %s with last stream %d", f, code, last)
	}
}

func (r *raw) connect(id uint32) {
	r.t.Helper()
	r.headers(id, false, ":method", "CONNECT", ":authority", application)
	r.wantStatus(id, "200")
}

func TestServerAnswersWhatIsNoTunnel(t *testing.T) {
	s := startServer(t, hbonetest.NewCA(t))
	connect := func(authority string) []string { return []string{":method", "CONNECT", ":authority", authority} }
	big := strings.Repeat("x", 16<<10)
	for name, test := range map[string]struct {
		fields []string
		status string        // or
		reset  http2.ErrCode // when there is none
	}{
		"good":                       {fields: connect(application), status: "200"},
		"good, unknown headers":      {fields: append(connect(application), "x-istio-source", "waypoint", "x-a", "b"), status: "200"},
		"good, broken headers":       {fields: append(connect(application), "baggage", "%%", "forwarded", "=", "traceparent", "0"), status: "200"},
		"good, 48 KiB of headers":    {fields: append(connect(application), "x-a", big, "x-b", big, "x-c", big), status: "200"},
		"64 KiB and more of headers": {fields: append(connect(application), "x-a", big, "x-b", big, "x-c", big, "x-d", big), status: "431"},
		"another target":             {fields: connect("127.0.0.2:7000"), status: "400"},
		"no port":                    {fields: connect("127.0.0.1"), status: "400"},
		"port 0":                     {fields: connect("127.0.0.1:0"), status: "400"},
		"port too large":             {fields: connect("127.0.0.1:65536"), status: "400"},
		"bare IPv6":                  {fields: connect("::1:80"), status: "400"},
		"zone":                       {fields: connect("[fe80::1%eth0]:80"), status: "400"},
		"user":                       {fields: connect("a@127.0.0.1:7000"), status: "400"},
		"almost an address":          {fields: connect("127.0.0.01:7000"), status: "400"},
		"empty authority":            {fields: connect(""), status: "400"},
		"no authority":               {fields: []string{":method", "CONNECT"}, status: "400"},
		"GET":                        {fields: []string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", application}, status: "400"},
		"POST":                       {fields: []string{":method", "POST", ":scheme", "https", ":path", "/"}, status: "400"},
		"CONNECT with a path":        {fields: append(connect(application), ":path", "/"), reset: http2.ErrCodeProtocol},
		"CONNECT with a scheme":      {fields: append(connect(application), ":scheme", "https"), reset: http2.ErrCodeProtocol},
		"extended CONNECT":           {fields: append(connect(application), ":scheme", "https", ":path", "/", ":protocol", "websocket"), reset: http2.ErrCodeProtocol},
		"connection header":          {fields: append(connect(application), "connection", "close"), reset: http2.ErrCodeProtocol},
		"upper-case header":          {fields: append(connect(application), "Baggage", "a=b"), reset: http2.ErrCodeProtocol},
		"line break in a header":     {fields: append(connect(application), "baggage", "a=b\r\nc"), reset: http2.ErrCodeProtocol},
		"GET without a path":         {fields: []string{":method", "GET", ":scheme", "https"}, reset: http2.ErrCodeProtocol},
		"two authorities":            {fields: append(connect(application), ":authority", application), reset: http2.ErrCodeProtocol},
		"pseudo-header after others": {fields: []string{":method", "CONNECT", "x-a", "b", ":authority", application}, reset: http2.ErrCodeProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			r := rawClient(t, s)
			r.headers(1, false, test.fields...)
			switch test.status {
			case "":
				r.wantReset(1, test.reset)
			case "200":
				r.wantStatus(1, "200")
			default:
				r.wantStatus(1, test.status)
				r.wantReset(1, http2.ErrCodeNo)
			}
			r.connect(3) // the connection goes on
		})
	}
}

func TestServerAnnouncesItsValues(t *testing.T) {
	r := rawClient(t, startServer(t, hbonetest.NewCA(t)))
	for id, want := range map[http2.SettingID]uint32{
		http2.SettingInitialWindowSize: 4 << 10, http2.SettingMaxFrameSize: 1 << 20,
		http2.SettingMaxHeaderListSize: 64 << 10, http2.SettingMaxConcurrentStreams: 200,
	} {
		if got := r.settings[id]; got != want {
			t.Errorf("%s = %d, want %d", id, got, want)
		}
	}
	f, err := r.ReadFrame()
	r.ok(err)
	if w, ok := f.(*http2.WindowUpdateFrame); !ok || w.StreamID != 0 || w.Increment+65535 != 16<<20 {
		t.Errorf("got %v, want the connection's window raised to 16 MiB", f)
	}
}

func TestServerRefusesStreamsBeyondItsBound(t *testing.T) {
	r := rawClient(t, startServer(t, hbonetest.NewCA(t)))
	for i := range uint32(200) {
		r.connect(1 + 2*i)
	}
	r.headers(401, false, ":method", "CONNECT", ":authority", application)
	r.wantReset(401, http2.ErrCodeRefusedStream)
	r.ok(r.WriteRSTStream(1, http2.ErrCodeCancel))
	r.connect(403)
}

func TestServerCutsAPeerThatOnlyResets(t *testing.T) {
	r := rawClient(t, startServer(t, hbonetest.NewCA(t)))
	go func() {
		for id := uint32(1); id < 100_000; id += 2 {
			block := []byte{0x02, 0x07, 'C', 'O', 'N', 'N', 'E', 'C', 'T', 0x01, 0x03, 'a', ':', '1'} // literals: the encoder belongs to the test
			if r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true}) != nil ||
				r.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
	}()
	for {
		f, err := r.ReadFrame()
		if err != nil {
			t.Fatalf("connection ended with %v before a GOAWAY", err)
		}
		if g, ok := f.(*http2.GoAwayFrame); ok {
			if g.ErrCode != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("GOAWAY %s", g.ErrCode)
			}
			return
		}
	}
}

func TestServerKeepsTheRulesOfAConnectedStream(t *testing.T) {
	s := startServer(t, hbonetest.NewCA(t))
	for name, test := range map[string]struct {
		send  func(r *raw)
		reset http2.ErrCode // of stream 1, or
		away  http2.ErrCode // of the connection
	}{
		"trailers":                {send: func(r *raw) { r.headers(1, true, "a", "b") }, reset: http2.ErrCodeProtocol},
		"a second CONNECT on it":  {send: func(r *raw) { r.headers(1, false, ":method", "CONNECT", ":authority", application) }, reset: http2.ErrCodeProtocol},
		"window over 2^31-1":      {send: func(r *raw) { r.ok(r.WriteWindowUpdate(1, 1<<31-1)) }, reset: http2.ErrCodeFlowControl},
		"connection's window too": {send: func(r *raw) { r.ok(r.WriteWindowUpdate(0, 1<<31-1)) }, away: http2.ErrCodeFlowControl},
		"window of nothing":       {send: func(r *raw) { r.AllowIllegalWrites = true; r.ok(r.WriteWindowUpdate(1, 0)) }, reset: http2.ErrCodeProtocol},
		"data of no stream":       {send: func(r *raw) { r.ok(r.WriteData(7, false, []byte("x"))) }, away: http2.ErrCodeProtocol},
		"stream going down":       {send: func(r *raw) { r.connect(9); r.headers(7, false, ":method", "CONNECT", ":authority", application) }, away: http2.ErrCodeStreamClosed},
		"even stream":             {send: func(r *raw) { r.headers(2, false, ":method", "CONNECT", ":authority", application) }, away: http2.ErrCodeProtocol},
		"push": {send: func(r *raw) {
			r.ok(r.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}))
		}, away: http2.ErrCodeProtocol},
		"headers without end": {send: func(r *raw) {
			r.ok(r.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: r.block(":method", "CONNECT")}))
			for range 100 {
				if r.WriteContinuation(3, false, r.block("x-a", strings.Repeat("x", 10<<10))) != nil {
					return
				}
			}
		}, away: http2.ErrCodeProtocol},
		"frame beyond 1 MiB":       {send: func(r *raw) { _ = r.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20+1)) }, away: http2.ErrCodeFrameSize},
		"padding beyond the frame": {send: func(r *raw) { r.ok(r.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 1, 2})) }, away: http2.ErrCodeProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			r := rawClient(t, s)
			r.connect(1)
			test.send(r)
			if test.reset != 0 {
				r.wantReset(1, test.reset)
				r.connect(11)
				return
			}
			for {
				if g, ok := r.next().(*http2.GoAwayFrame); ok {
					if g.ErrCode != test.away {
						t.Errorf("GOAWAY %s, want %s", g.ErrCode, test.away)
					}
					return
				}
			}
		})
	}
}

func TestServerTakesPaddedData(t *testing.T) {
	r := rawClient(t, startServer(t, hbonetest.NewCA(t)))
	r.connect(1)
	r.ok(r.WriteDataPadded(1, false, []byte("hello"), make([]byte, 200)))
	if f, ok := r.next().(*http2.DataFrame); !ok || string(f.Data()) != "hello" {
		t.Fatalf("echo is %v", f)
	}
	r.ok(r.WriteDataPadded(1, true, nil, make([]byte, 10)))
	if f, ok := r.next().(*http2.DataFrame); !ok || !f.StreamEnded() || len(f.Data()) > 0 {
		t.Fatalf("end is %v", f)
	}
}

func TestServerDrainsInTwoSteps(t *testing.T) {
	d := startDraining(t)
	r := rawClient(t, &d.server)
	r.connect(1)
	d.drain()
	r.wantGoAway(1<<31-1, http2.ErrCodeNo)
	ping, ok := r.next().(*http2.PingFrame)
	if !ok || ping.IsAck() {
		t.Fatalf("got %v, want the drain's PING", ping)
	}
	data := ping.Data
	r.connect(3) // sent before its client had seen the GOAWAY
	r.ok(r.WritePing(true, data))
	r.wantGoAway(3, http2.ErrCodeNo)
	r.headers(5, false, ":method", "CONNECT", ":authority", application) // too late: ignored
	r.ok(r.WriteData(5, false, []byte("ignored")))
	for _, id := range []uint32{1, 3} {
		r.ok(r.WriteData(id, false, []byte("hello")))
		for {
			f := r.next()
			if rst, ok := f.(*http2.RSTStreamFrame); ok && rst.StreamID == 5 {
				continue
			}
			if f, ok := f.(*http2.DataFrame); !ok || f.StreamID != id || string(f.Data()) != "hello" {
				t.Fatalf("echo on stream %d is %v", id, f)
			}
			break
		}
		r.ok(r.WriteData(id, true, nil))
		if f, ok := r.next().(*http2.DataFrame); !ok || !f.StreamEnded() {
			t.Fatalf("end of stream %d is %v", id, f)
		}
	}
	_ = r.conn.Close()
	if err := <-d.done; err != nil {
		t.Errorf("Serve = %v", err)
	}
	d.done <- nil
}
