package h2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
	"github.com/raceway-mesh/raceway/hbone/hbonetest/conformance"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a session and the server that serves it.
type pair struct {
	session hbone.Session
	served  chan error         // what ServeConn returned
	drain   context.CancelFunc // ends the server's ctx
	force   context.CancelFunc
}

func newPair(t *testing.T, client h2.Client, server h2.Server, handler func(*hbone.ServerRequest)) *pair {
	t.Helper()
	a, b := hbonetest.TCPPair(t)
	return newPairOn(t, a, b, client, server, handler)
}

func newPairOn(t *testing.T, a, b net.Conn, client h2.Client, server h2.Server, handler func(*hbone.ServerRequest)) *pair {
	t.Helper()
	ca := hbonetest.NewCA(t)
	ct, st := hbonetest.Handshake(t, a, b, ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(t, hbonetest.ServerID))
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	p := &pair{served: make(chan error, 1), drain: drain, force: cut}
	go func() { p.served <- server.ServeConn(ctx, force, st, handler) }()
	session, err := client.NewSession(t.Context(), ct)
	if err != nil {
		t.Fatal(err)
	}
	p.session = session
	t.Cleanup(func() {
		_ = session.Close()
		<-session.Done()
		drain()
		cut()
		if err := <-p.served; err != nil {
			t.Logf("ServeConn = %v", err) // some tests break the connection
		}
	})
	return p
}

func TestConformance(t *testing.T) {
	conformance.Test(t, func(t *testing.T, handler hbone.Handler) *conformance.Pair {
		p := newPair(t, h2.Client{}, h2.Server{}, handler)
		t.Cleanup(p.force) // which waits for nobody
		return &conformance.Pair{Session: p.session, Force: p.force}
	})
}

func TestDatagramConformance(t *testing.T) {
	conformance.TestDatagrams(t, func(t *testing.T, handler hbone.Handler) *conformance.Pair {
		p := newPair(t, h2.Client{}, h2.Server{Datagrams: true}, handler)
		t.Cleanup(p.force)
		return &conformance.Pair{Session: p.session, Force: p.force}
	})
}

func TestServerThatCarriesNoDatagrams(t *testing.T) {
	p := newPair(t, h2.Client{}, h2.Server{}, echo)
	if _, _, err := p.session.OpenDatagrams(t.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil); !errors.Is(err, hbone.ErrNoDatagrams) {
		t.Errorf("OpenDatagrams = %v, want ErrNoDatagrams", err)
	}
	p.open(t) // the session is as it was
}

// openStream sends CONNECT and waits for the answer.
func openStream(ctx context.Context, s hbone.Session, r *hbone.Request) (hbone.Stream, *hbone.Response, error) {
	o, err := s.Start(r)
	if err != nil {
		return nil, nil, err
	}
	o.Send(nil, false)
	return o.Answer(ctx)
}

func (p *pair) open(t *testing.T) hbone.Stream {
	t.Helper()
	s, _, err := openStream(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// accepting serves streams by handing them to the test, which returns from done.
func accepting(streams chan<- hbone.Stream, done <-chan struct{}) func(*hbone.ServerRequest) {
	return func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		streams <- s
		<-done
	}
}

// both opens a stream and returns its two ends.
func both(t *testing.T) (client, server hbone.Stream, p *pair) {
	t.Helper()
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	p = newPair(t, h2.Client{}, h2.Server{}, accepting(streams, done))
	client = p.open(t)
	server = <-streams
	t.Cleanup(func() { close(done) })
	return client, server, p
}

func echo(r *hbone.ServerRequest) {
	s, err := r.Accept(hbone.Response{})
	if err != nil {
		return
	}
	if _, err := io.Copy(struct{ io.Writer }{s}, s); err == nil {
		_ = s.CloseWrite()
	}
	_ = s.Close()
}

func write(t *testing.T, s hbone.Stream, text string) {
	t.Helper()
	if n, err := s.Write([]byte(text)); err != nil || n != len(text) {
		t.Fatalf("Write = %d, %v", n, err)
	}
}

func read(t *testing.T, s hbone.Stream, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func readEOF(t *testing.T, s hbone.Stream) {
	t.Helper()
	if n, err := s.Read(make([]byte, 10)); n != 0 || err != io.EOF { //nolint:errorlint // the contract is io.EOF itself
		t.Fatalf("Read = %d, %v; want EOF", n, err)
	}
}

func TestCleanEndKeepsUnreadBytesReadable(t *testing.T) {
	c, s, p := both(t)
	write(t, s, "late")
	_ = s.CloseWrite()
	_ = c.CloseWrite()
	waitStreams(t, p.session, 0)
	_ = s.Close()
	read(t, c, "late")
	readEOF(t, c)
}

func waitStreams(t *testing.T, s hbone.Session, n int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); s.Streams() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("session carries %d streams, want %d", s.Streams(), n)
		}
	}
}

func TestCleanEndDoesNotEndTheContextOfAHandlerThatStillReads(t *testing.T) {
	total := 30 << 10 // a new stream's window has room for it
	result := make(chan int, 1)
	both := make(chan struct{})
	p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		_ = s.CloseWrite()
		<-both
		if r.Context.Err() != nil {
			t.Error("context ended with bytes unread")
		}
		all, err := io.ReadAll(s)
		if err != nil {
			t.Error(err)
		}
		result <- len(all)
	})
	s := p.open(t)
	if _, err := s.Write(make([]byte, total)); err != nil {
		t.Fatal(err)
	}
	_ = s.CloseWrite()
	waitStreams(t, p.session, 0)
	_ = p.session.Close() // even the connection may go now
	<-p.session.Done()
	close(both)
	if n := <-result; n != total {
		t.Errorf("server read %d bytes, want %d", n, total)
	}
}
