package h2_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// seeds are frames that each side may get, well formed and not.
func seeds() [][]byte {
	var all [][]byte
	add := func(write func(f *http2.Framer)) {
		var buf bytes.Buffer
		f := http2.NewFramer(&buf, nil)
		f.AllowIllegalWrites = true
		write(f)
		all = append(all, buf.Bytes())
	}
	connect := []byte{0x02, 0x07, 'C', 'O', 'N', 'N', 'E', 'C', 'T', 0x01, 0x0b, '1', '0', '.', '0', '.', '0', '.', '1', ':', '8', '0'}
	headers := func(f *http2.Framer, id uint32, block []byte) {
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true})
	}
	add(func(f *http2.Framer) {
		headers(f, 1, connect)
		_ = f.WriteData(1, false, []byte("hello"))
		_ = f.WriteData(1, true, nil)
		headers(f, 3, connect)
		_ = f.WriteRSTStream(3, http2.ErrCodeCancel)
		_ = f.WriteWindowUpdate(0, 1000)
		_ = f.WriteGoAway(0, http2.ErrCodeNo, nil)
	})
	add(func(f *http2.Framer) {
		headers(f, 1, []byte{0x88}) // :status 200
		_ = f.WriteDataPadded(1, true, []byte("hello"), make([]byte, 10))
		_ = f.WriteRSTStream(1, http2.ErrCodeNo)
	})
	add(func(f *http2.Framer) {
		headers(f, 1, []byte{0x8d}) // :status 404
		_ = f.WritePing(false, [8]byte{})
		_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}, http2.Setting{ID: http2.SettingMaxConcurrentStreams})
		_ = f.WriteGoAway(1<<31-1, http2.ErrCodeNo, []byte("x"))
		_ = f.WriteGoAway(1, http2.ErrCodeNo, nil)
	})
	add(func(f *http2.Framer) {
		headers(f, 1, connect)
		headers(f, 1, connect)
		_ = f.WriteWindowUpdate(1, 0)
		_ = f.WriteContinuation(1, true, connect)
		_ = f.WritePriority(5, http2.PriorityParam{StreamDep: 5})
		_ = f.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, nil)
	})
	var block bytes.Buffer
	udp := hpack.NewEncoder(&block)
	for _, field := range [][2]string{
		{":method", "CONNECT"},
		{":protocol", "connect-udp"},
		{":scheme", "https"},
		{":authority", "10.0.0.1:15008"},
		{":path", "/.well-known/masque/udp/10.0.0.1/53/"},
		{"capsule-protocol", "?1"},
	} {
		_ = udp.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	add(func(f *http2.Framer) {
		headers(f, 1, block.Bytes())
		_ = f.WriteData(1, false, hbone.AppendCapsule(hbone.AppendCapsule(nil, []byte("one")), nil))
		_ = f.WriteData(1, false, []byte{0x29, 2, 'x'})
		_ = f.WriteData(1, false, []byte{'y', 0, 2, 4, 'z', 0, 0x80})
		_ = f.WriteData(1, true, nil)
	})
	return all
}

// fuzzPair is a TLS connection in memory.
func fuzzPair(f *testing.F) func(t *testing.T) (client, server *tls.Conn) {
	ca := hbonetest.NewCA(f)
	ct, st := ca.ClientTLS(f, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(f, hbonetest.ServerID)
	return func(t *testing.T) (client, server *tls.Conn) {
		a, b := net.Pipe()
		return hbonetest.Handshake(t, a, b, ct, st)
	}
}

// feed plays an arbitrary peer: it sends preface, SETTINGS and data, and hangs up.
func feed(conn *tls.Conn, preface string, data []byte) {
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, conn)
	}()
	_, _ = io.WriteString(conn, preface)
	_ = http2.NewFramer(conn, nil).WriteSettings()
	_, _ = conn.Write(data)
	_ = conn.NetConn().Close()
	<-drained
}

// echoEither serves both protocols.
func echoEither(r *hbone.ServerRequest) {
	if r.Protocol == hbone.TCP {
		hbonetest.Echo(r)
		return
	}
	if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
		f.Deliver(echoed{f})
	}
}

// echoed sends a flow's datagrams back.
type echoed struct{ flow hbone.DatagramStream }

func (e echoed) Datagram(p []byte) { _ = e.flow.Send(p, true) }
func (e echoed) End(error)         { _ = e.flow.Close() }

func FuzzServerFrames(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	pair := fuzzPair(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		client, server := pair(t)
		done := make(chan struct{})
		budget := &counted{limit: 1 << 20}
		go func() {
			defer close(done)
			_ = h2.Server{MaxStreams: 4, Budget: budget, Datagrams: true}.ServeConn(context.Background(), context.Background(), server, echoEither)
		}()
		feed(client, http2.ClientPreface, data)
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("server goes on after its peer hung up")
		}
		budget.empty(t)
	})
}

func FuzzClientFrames(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	pair := fuzzPair(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		client, server := pair(t)
		budget := &counted{limit: 1 << 20}
		session, err := h2.Client{Budget: budget}.NewSession(t.Context(), client)
		if err != nil {
			t.Fatal(err)
		}
		opened := make(chan struct{})
		go func() {
			defer close(opened)
			s, _, err := hbonetest.Open(context.Background(), session, &hbone.Request{Authority: "10.0.0.1:80"})
			if err != nil {
				return
			}
			_, _ = s.Write([]byte("hello"))
			_, _ = io.Copy(io.Discard, s)
			_ = s.Close()
		}()
		feed(server, "", data)
		select {
		case <-opened:
		case <-time.After(20 * time.Second):
			t.Fatal("stream goes on after its peer hung up")
		}
		<-session.Done()
		budget.empty(t)
	})
}
