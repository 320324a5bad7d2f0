package hbonetest

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// Echo is a handler that sends back what it gets, ends included.
func Echo(r *hbone.ServerRequest) {
	s, err := r.Accept(hbone.Response{})
	if err != nil {
		return
	}
	defer func() { _ = s.Close() }()
	if _, err := io.Copy(struct{ io.Writer }{s}, s); err == nil {
		_ = s.CloseWrite()
	}
}

// Accepting serves streams by handing them to the test, which has it return by done.
func Accepting(streams chan<- hbone.Stream, done <-chan struct{}) hbone.Handler {
	return func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		streams <- s
		<-done
	}
}

// Open sends CONNECT and waits for the answer.
func Open(ctx context.Context, s hbone.Session, r *hbone.Request) (hbone.Stream, *hbone.Response, error) {
	o, err := s.Start(r)
	if err != nil {
		return nil, nil, err
	}
	o.Send(nil, false)
	return o.Answer(ctx)
}

// Ping expects an Echo at the other end.
func Ping(t testing.TB, s hbone.Stream) {
	t.Helper()
	Write(t, s, "ping")
	Read(t, s, "ping")
}

// Write sends text.
func Write(t testing.TB, s hbone.Stream, text string) {
	t.Helper()
	if n, err := s.Write([]byte(text)); err != nil || n != len(text) {
		t.Fatalf("Write = %d, %v", n, err)
	}
}

// Read wants that text next.
func Read(t testing.TB, s hbone.Stream, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

// ReadEOF wants a clean end.
func ReadEOF(t testing.TB, s hbone.Stream) {
	t.Helper()
	if n, err := s.Read(make([]byte, 10)); n != 0 || err != io.EOF { //nolint:errorlint // the contract is io.EOF itself
		t.Fatalf("Read = %d, %v; want EOF", n, err)
	}
}

// WaitStreams waits until s carries n.
func WaitStreams(t testing.TB, s hbone.Session, n int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); s.Streams() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("session carries %d streams, want %d", s.Streams(), n)
		}
	}
}
