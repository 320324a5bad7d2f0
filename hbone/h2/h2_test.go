package h2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"

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
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Echo)
	if _, _, err := p.session.OpenDatagrams(t.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil); !errors.Is(err, hbone.ErrNoDatagrams) {
		t.Errorf("OpenDatagrams = %v, want ErrNoDatagrams", err)
	}
	p.open(t) // the session is as it was
}

func (p *pair) open(t *testing.T) hbone.Stream {
	t.Helper()
	s, _, err := hbonetest.Open(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// both opens a stream and returns its two ends.
func both(t *testing.T) (client, server hbone.Stream, p *pair) {
	t.Helper()
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	p = newPair(t, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	client = p.open(t)
	server = <-streams
	t.Cleanup(func() { close(done) })
	return client, server, p
}

func TestCleanEndKeepsUnreadBytesReadable(t *testing.T) {
	c, s, p := both(t)
	hbonetest.Write(t, s, "late")
	_ = s.CloseWrite()
	_ = c.CloseWrite()
	hbonetest.WaitStreams(t, p.session, 0)
	_ = s.Close()
	hbonetest.Read(t, c, "late")
	hbonetest.ReadEOF(t, c)
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
	hbonetest.WaitStreams(t, p.session, 0)
	_ = p.session.Close() // even the connection may go now
	<-p.session.Done()
	close(both)
	if n := <-result; n != total {
		t.Errorf("server read %d bytes, want %d", n, total)
	}
}
