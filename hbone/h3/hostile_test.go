package h3_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// raw is a client that says what it likes.
type raw struct {
	t testing.TB
	*quic.Conn
}

func (w *world) raw(t testing.TB) *raw {
	t.Helper()
	cfg := w.clientTLS.Clone()
	cfg.NextProtos = []string{"h3"}
	conn, err := quic.DialAddr(t.Context(), w.key.Remote.String(), cfg, &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseWithError(0x100, "") })
	return &raw{t: t, Conn: conn}
}

func (r *raw) stream(data []byte, end bool) *quic.Stream {
	r.t.Helper()
	s, err := r.OpenStreamSync(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := s.Write(data); err != nil && !errors.As(err, new(*quic.StreamError)) { // the server may be faster
		r.t.Fatal(err)
	}
	if end {
		_ = s.Close()
	}
	return s
}

func (r *raw) uni(data []byte) *quic.SendStream {
	r.t.Helper()
	s, err := r.OpenUniStream()
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := s.Write(data); err != nil {
		r.t.Fatal(err)
	}
	return s
}

// wantClosed waits for the server to close the connection with code.
func (r *raw) wantClosed(code uint64) {
	r.t.Helper()
	select {
	case <-r.Context().Done():
	case <-time.After(10 * time.Second):
		r.t.Fatal("the server goes on")
	}
	var app *quic.ApplicationError
	if err := context.Cause(r.Context()); !errors.As(err, &app) || !app.Remote || uint64(app.ErrorCode) != code {
		r.t.Errorf("the connection ended with %v, want code %#x of the server", err, code)
	}
}

// wantReset waits for the server to reset s with code.
func wantReset(t *testing.T, s *quic.Stream, code uint64) {
	t.Helper()
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := io.ReadAll(s)
	var reset *quic.StreamError
	if !errors.As(err, &reset) || !reset.Remote || uint64(reset.ErrorCode) != code {
		t.Errorf("the stream ended with %v, want a reset %#x", err, code)
	}
}

func frame(kind uint64, body ...byte) []byte {
	return append(hbone.AppendVarint(hbone.AppendVarint(nil, kind), uint64(len(body))), body...)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// connect is a HEADERS frame of CONNECT 10.0.0.1:80, with literal names.
var connect = frame(1, append([]byte{0, 0, 0xc0 | 15, 0x50, 11}, "10.0.0.1:80"...)...)

func TestServerClosesWhoBreaksTheProtocol(t *testing.T) {
	settings := join([]byte{0}, frame(4))
	for name, test := range map[string]struct {
		do   func(r *raw)
		code uint64
	}{
		"DATA first":                 {func(r *raw) { r.stream(frame(0, 'x'), false) }, 0x105},
		"HTTP/2's frame":             {func(r *raw) { r.stream(frame(6), false) }, 0x105},
		"broken QPACK":               {func(r *raw) { r.stream(frame(1, 0xff, 0xff, 0xff), false) }, 0x200},
		"dynamic table":              {func(r *raw) { r.stream(frame(1, 2, 0, 0x80), false) }, 0x200},
		"push stream":                {func(r *raw) { r.uni([]byte{1}) }, 0x103},
		"control without SETTINGS":   {func(r *raw) { r.uni(join([]byte{0}, frame(7, 0))) }, 0x10a},
		"SETTINGS twice":             {func(r *raw) { r.uni(join(settings, frame(4))) }, 0x105},
		"two control streams":        {func(r *raw) { r.uni(settings); r.uni(settings) }, 0x103},
		"control stream that ends":   {func(r *raw) { _ = r.uni(settings).Close() }, 0x104},
		"control stream in a frame":  {func(r *raw) { _ = r.uni([]byte{0, 4, 9, 1}).Close() }, 0x104},
		"HTTP/2's setting":           {func(r *raw) { r.uni(join([]byte{0}, frame(4, 2, 0))) }, 0x109},
		"large frame on control":     {func(r *raw) { r.uni(join(settings, []byte{7, 0x80, 1, 0, 0})) }, 0x107},
		"HEADERS in a tunnel":        {func(r *raw) { r.stream(join(connect, connect), false) }, 0x105},
		"datagram without a stream":  {func(r *raw) { _ = r.SendDatagram(nil) }, 0x33},
		"datagram of half a number":  {func(r *raw) { _ = r.SendDatagram([]byte{0x40}) }, 0x33},
		"datagram beyond all bounds": {func(r *raw) { _ = r.SendDatagram(bytes.Repeat([]byte{0xff}, 8)) }, 0x33},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
			r := w.raw(t)
			test.do(r)
			r.wantClosed(test.code)
		})
	}
}

func TestServerResetsAStreamThatIsMalformed(t *testing.T) {
	for name, test := range map[string]struct {
		data []byte
		code uint64
	}{
		"end within a header": {connect[:len(connect)-3], 0x10d},
		"end before a header": {nil, 0x10d},
		"end within DATA":     {join(connect, []byte{0, 100, 'x'}), 0x10d},
		"no method":           {frame(1, 0, 0), 0x10e},
		"much grease":         {join([]byte{0x21, 0x80, 1, 0, 0}, make([]byte, 1<<16)), 0x107},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
			r := w.raw(t)
			s := r.stream(test.data, true)
			wantReset(t, s, test.code)
			if r.Context().Err() != nil {
				t.Error("the connection ended as well")
			}
		})
	}
}

// Datagrams for streams that never come are kept within bounds, and forgotten.
func TestFloodOfEarlyDatagramsHurtsNobody(t *testing.T) {
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) { hbonetest.Echo(r) }, nil)
	r := w.raw(t)
	for i := range uint64(5000) {
		if err := r.SendDatagram(append(hbone.AppendVarint(nil, 1000+i), make([]byte, 1000)...)); err != nil {
			t.Fatal(err)
		}
	}
	s := r.stream(connect, false)
	var b [1]byte
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := s.Read(b[:]); err != nil {
		t.Errorf("a stream beside the flood: %v", err)
	}
}

// A client that opens streams and resets them at once is cut off.
func TestFloodOfResetsIsCutOff(t *testing.T) {
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) { <-r.Context.Done() }, func(c *h3.Config, _ *hbone.ServerConfig) { c.MaxStreams = 4 })
	r := w.raw(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 1000 {
		s, err := r.OpenStreamSync(ctx)
		if err != nil {
			break
		}
		_, _ = s.Write(connect)
		s.CancelWrite(0x10c)
		s.CancelRead(0x10c)
	}
	r.wantClosed(0x107)
}

// A datagram that must not be cut fits, or says what would.
func TestDatagramThatMustNotBeCut(t *testing.T) {
	got := make(chan int, 64)
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			f.Deliver(sizes(got))
		}
	}, nil)
	f, _, err := w.connect(t).OpenDatagrams(t.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	err = f.Send(make([]byte, 60000), false)
	var tooLarge *hbone.TooLargeError
	if !errors.As(err, &tooLarge) || !errors.Is(err, syscall.EMSGSIZE) || tooLarge.Max < 1280 {
		t.Fatalf("Send = %v, want a TooLargeError", err)
	}
	if err := f.Send(make([]byte, tooLarge.Max), false); err != nil {
		t.Fatalf("Send of the length that is said to fit: %v", err)
	}
	if n := <-got; n != tooLarge.Max {
		t.Errorf("%d bytes arrived, want %d", n, tooLarge.Max)
	}
	if err := f.Send(make([]byte, 1280), false); err != nil {
		t.Fatalf("Send of what QUIC begins with: %v", err)
	}
	if n := <-got; n != 1280 {
		t.Errorf("%d bytes arrived, want 1280", n)
	}
	if drops := f.Drops(); drops != (hbone.DatagramDrops{}) {
		t.Errorf("drops = %+v", drops)
	}
}

// sizes is told those of datagrams.
type sizes chan int

func (s sizes) Datagram(p []byte) { s <- len(p) }
func (s sizes) End(error)         {}

// Who breaks the protocol loses its own connection alone.
func TestConnectionLivesBesideABrokenOne(t *testing.T) {
	w := newWorld(t, "127.0.0.1", hbonetest.Echo, nil)
	r := w.raw(t)
	s, _, err := hbonetest.Open(t.Context(), w.connect(t), request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	r.stream(frame(6), false)
	r.wantClosed(0x105)
	hbonetest.Ping(t, s)
}
