package h3

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"testing"

	"github.com/quic-go/qpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// memory is a stream that gives its bytes one by one, or as many as there are.
type memory struct {
	rest  []byte
	slow  bool
	reset error // in place of its end
}

func (m *memory) Peek(b []byte) (int, error) {
	if len(m.rest) == 0 {
		return 0, m.end()
	}
	return copy(b, m.rest), nil
}

func (m *memory) Read(p []byte) (int, error) {
	if len(m.rest) == 0 {
		return 0, m.end()
	}
	if m.slow {
		p = p[:1]
	}
	n := copy(p, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

func (m *memory) end() error {
	if m.reset != nil {
		return m.reset
	}
	return io.EOF
}

func frame(kind uint64, body []byte) []byte {
	return append(hbone.AppendVarint(hbone.AppendVarint(nil, kind), uint64(len(body))), body...)
}

// A direction ends cleanly only behind a whole frame: all other ends are no io.EOF.
func TestTruncatedTransferNeverLooksComplete(t *testing.T) {
	stream := append(frame(frameData, []byte("hello")), frame(0x21, []byte("grease"))...)
	stream = append(stream, frame(frameData, bytes.Repeat([]byte("x"), 300))...)
	whole := map[int]bool{0: true, 7: true, 15: true, len(stream): true}
	for cut := range len(stream) + 1 {
		for _, slow := range []bool{true, false} {
			x := &exchange{conn: &conn{}, in: input{from: &memory{rest: stream[:cut], slow: slow}}}
			var err error
			for err == nil {
				_, err = x.data()
			}
			if isEnd(err) != whole[cut] || !isEnd(err) && !errors.Is(err, errTruncated) {
				t.Errorf("a stream of %d bytes ends with %v", cut, err)
			}
		}
	}
}

func TestFramesThatBreakATunnel(t *testing.T) {
	for _, kind := range []uint64{frameHeaders, frameCancelPush, frameSettings, 0x05, 0x02, 0x06, 0x08, 0x09, frameGoAway, frameMaxPush} {
		x := &exchange{conn: &conn{}, in: input{from: &memory{rest: frame(kind, nil)}}}
		var broke *connError
		if _, err := x.data(); !errors.As(err, &broke) || broke.code != codeUnexpected {
			t.Errorf("frame %#x on a tunnel: %v", kind, err)
		}
	}
}

func TestParseRequestRefuses(t *testing.T) {
	f := func(pairs ...string) (fields []qpack.HeaderField) {
		for i := 0; i < len(pairs); i += 2 {
			fields = append(fields, qpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
		}
		return fields
	}
	udp := func(more ...string) []qpack.HeaderField {
		return append(f(":method", "CONNECT", ":protocol", "connect-udp", ":scheme", "https", ":authority", "10.0.0.1:15008"), f(more...)...)
	}
	for name, test := range map[string]struct {
		fields []qpack.HeaderField
		status int // 0: malformed
	}{
		"nothing":                 {f(), 0},
		"scheme":                  {f(":method", "CONNECT", ":authority", "a:1", ":scheme", "https"), 0},
		"path":                    {f(":method", "CONNECT", ":authority", "a:1", ":path", "/"), 0},
		"method twice":            {f(":method", "CONNECT", ":method", "CONNECT", ":authority", "a:1"), 0},
		"pseudo behind":           {f(":method", "CONNECT", "x", "y", ":authority", "a:1"), 0},
		"unknown pseudo":          {f(":method", "CONNECT", ":authority", "a:1", ":x", "y"), 0},
		"upper case":              {f(":method", "CONNECT", ":authority", "a:1", "Baggage", "y"), 0},
		"connection":              {f(":method", "CONNECT", ":authority", "a:1", "connection", "close"), 0},
		"te":                      {f(":method", "CONNECT", ":authority", "a:1", "te", "gzip"), 0},
		"line end":                {f(":method", "CONNECT", ":authority", "a:1", "x", "a\r\nb"), 0},
		"no name":                 {f(":method", "CONNECT", ":authority", "a:1", "", "a"), 0},
		"authority":               {f(":method", "CONNECT", ":authority", "a"), 400},
		"no authority":            {f(":method", "CONNECT"), 400},
		"GET":                     {f(":method", "GET", ":scheme", "https", ":authority", "a:1", ":path", "/"), 400},
		"GET without path":        {f(":method", "GET", ":scheme", "https", ":authority", "a:1"), 0},
		"protocol of GET":         {f(":method", "GET", ":protocol", "connect-udp", ":scheme", "https", ":path", "/"), 0},
		"other protocol":          {f(":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":authority", "a:1", ":path", "/"), 501},
		"UDP without path":        {udp(), 0},
		"UDP with an empty path":  {udp(":path", ""), 0},
		"UDP with another path":   {udp(":path", "/"), 400},
		"UDP to a bad port":       {udp(":path", "/.well-known/masque/udp/10.0.0.1/0/"), 400},
		"UDP to a forged address": {udp(":path", "/.well-known/masque/udp/10.0.0.1%00/53/"), 400},
	} {
		_, err := parseRequest(test.fields)
		var bad *badRequest
		var offence *streamError
		if test.status != 0 && (!errors.As(err, &bad) || bad.status != test.status) || test.status == 0 && (!errors.As(err, &offence) || offence.code != codeMessage) {
			t.Errorf("%s: %v, want status %d", name, err, test.status)
		}
	}
	r, err := parseRequest(udp(":path", "/.well-known/masque/udp/10.0.0.9/53/", "capsule-protocol", "?1", "x", "y"))
	if err != nil || r.protocol != hbone.UDP || r.Authority != "10.0.0.9:53" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestParseSettings(t *testing.T) {
	body := appendSettings(nil, settings{maxFieldSection: 1000, connectProtocol: true, datagrams: true})
	in := &input{from: &memory{rest: body, slow: true}}
	kind, length, err := in.header()
	if err != nil || kind != frameSettings {
		t.Fatal(kind, err)
	}
	text, err := in.body(length)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := parseSettings(text); err != nil || s != (settings{1000, true, true}) {
		t.Errorf("%+v, %v", s, err)
	}
	for name, body := range map[string][]byte{
		"twice":     {0x33, 1, 0x33, 1},
		"HTTP/2's":  {0x02, 0},
		"not a bit": {0x08, 2},
		"cut short": {0x33},
		"in a name": {0x40},
		"in value":  {0x06, 0x80, 0},
		"too many":  manySettings(),
	} {
		if s, err := parseSettings(body); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func manySettings() []byte {
	var b []byte
	for i := range uint64(200) {
		b = hbone.AppendVarint(hbone.AppendVarint(b, 0x1000+i), 0)
	}
	return b
}

func FuzzHeaders(f *testing.F) {
	f.Add(headersFrame([]qpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}}), true)
	f.Add(append(frame(0x21, []byte("grease")), headersFrame(responseFields(200, hbone.Response{}))...), false)
	f.Add(frame(frameHeaders, []byte{0, 0, 0xff, 0xff, 0xff}), true)
	f.Fuzz(func(t *testing.T, stream []byte, slow bool) {
		in := &input{from: &memory{rest: stream, slow: slow}}
		fields, err := in.headers(1 << 10)
		if err != nil {
			if isEnd(err) {
				t.Fatal("a stream without a header ended cleanly")
			}
			return
		}
		if fieldsSize(fields) > 1<<10 {
			t.Fatalf("fields of %d bytes", fieldsSize(fields))
		}
		if r, err := parseRequest(fields); err == nil {
			again, err := connectFields(&r.Request, r.protocol, netip.MustParseAddrPort("10.0.0.1:15008"))
			if err != nil {
				t.Fatal(err)
			}
			if r2, err := parseRequest(again); err != nil || r2.Authority != r.Authority || r2.protocol != r.protocol {
				t.Fatalf("%+v became %+v, %v", r, r2, err)
			}
		}
		_, _, _ = parseResponse(fields)
	})
}

func FuzzTunnel(f *testing.F) {
	f.Add(append(frame(frameData, []byte("hello")), frame(frameData, nil)...), true)
	f.Add(frame(0x21, []byte("skipped")), false)
	f.Fuzz(func(t *testing.T, stream []byte, slow bool) {
		x := &exchange{conn: &conn{}, in: input{from: &memory{rest: stream, slow: slow}}}
		total := 0
		for {
			p, err := x.data()
			if err != nil {
				break
			}
			if total += len(p); len(p) == 0 || total > len(stream) {
				t.Fatalf("%d bytes, then %d, out of %d", total, len(p), len(stream))
			}
		}
	})
}

func FuzzSettings(f *testing.F) {
	f.Add([]byte{0x33, 1, 0x08, 1})
	f.Add([]byte{0x06, 0x80, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		if s, err := parseSettings(body); err == nil && s.maxFieldSection >= 1<<62 {
			t.Fatalf("%+v", s)
		}
	})
}
