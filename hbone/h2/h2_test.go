package h2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
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

func TestRequestAndResponseCarryTheirContent(t *testing.T) {
	got := make(chan *hbone.ServerRequest, 1)
	p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		got <- r
		s, err := r.Accept(hbone.Response{Baggage: hbone.Baggage{Service: "db"}})
		if err == nil {
			_ = s.CloseWrite()
		}
	})
	req := &hbone.Request{
		Authority:   "[2001:db8::1]:3306",
		Baggage:     hbone.Baggage{Namespace: "demo", WorkloadKind: "deployment", WorkloadName: "web"},
		TraceParent: hbone.NewTraceParent(),
	}
	s, resp, err := openStream(t.Context(), p.session, req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	r := <-got
	if r.Request != *req {
		t.Errorf("server got %+v, want %+v", r.Request, *req)
	}
	if r.Target.String() != "[2001:db8::1]:3306" {
		t.Errorf("target = %s", r.Target)
	}
	if !r.Conn.Local.IsValid() || !r.Conn.Remote.IsValid() || len(r.Conn.TLS.PeerCertificates) != 1 || r.Conn.Raw == nil {
		t.Errorf("connection facts are missing: %+v", r.Conn)
	}
	if resp.Baggage.Service != "db" {
		t.Errorf("response baggage = %+v", resp.Baggage)
	}
}

func TestHalfCloseByClientDrainsReturnTraffic(t *testing.T) {
	c, s, p := both(t)
	write(t, c, "request")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	read(t, s, "request")
	readEOF(t, s)
	write(t, s, "answer")
	read(t, c, "answer")
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	readEOF(t, c)
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("Write after CloseWrite succeeded")
	}
	waitStreams(t, p.session, 0)
}

func TestHalfCloseByServerLeavesRequestTrafficGoing(t *testing.T) {
	c, s, p := both(t)
	write(t, s, "greeting")
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	read(t, c, "greeting")
	readEOF(t, c)
	for range 100 {
		write(t, c, "still talking")
		read(t, s, "still talking")
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	readEOF(t, s)
	waitStreams(t, p.session, 0)
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

func TestCloseWithoutCleanEndResetsThePeer(t *testing.T) {
	steps := map[string]func(a, b hbone.Stream){
		"at once":                  func(a, _ hbone.Stream) { _ = a.Close() },
		"after own half-close":     func(a, _ hbone.Stream) { _ = a.CloseWrite(); _ = a.Close() },
		"after peer's half-close":  func(a, b hbone.Stream) { _ = b.CloseWrite(); _, _ = io.ReadAll(a); _ = a.Close() },
		"twice, from two routines": func(a, _ hbone.Stream) { go func() { _ = a.Close() }(); _ = a.Close() },
	}
	for name, step := range steps {
		for _, side := range []string{"client", "server"} {
			t.Run(side+" "+name, func(t *testing.T) {
				c, s, _ := both(t)
				a, b := c, s
				if side == "server" {
					a, b = s, c
				}
				step(a, b)
				// Whatever b could still do, it must learn that the stream is broken: by
				// reading if a's end was not clean, by writing in any case.
				deadline := time.Now().Add(5 * time.Second)
				for {
					_, err := b.Write([]byte("x"))
					var reset *hbone.ResetError
					if errors.As(err, &reset) && reset.Remote {
						break
					}
					if err != nil && name == "after peer's half-close" {
						if n, err := b.Read(make([]byte, 1)); n != 0 || !errors.As(err, &reset) {
							t.Fatalf("Read = %d, %v; want a reset", n, err)
						}
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("Write = %v, want a reset", err)
					}
				}
				if name == "at once" {
					if _, err := b.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
						t.Errorf("Read = %v, want a reset", err)
					}
				}
			})
		}
	}
}

func TestCloseUnblocksReadAndWrite(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			c, s, _ := both(t)
			a := c
			if side == "server" {
				a = s
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
					t.Errorf("Read = %v", err)
				}
			})
			wg.Go(func() {
				big := make([]byte, 1<<20)
				for {
					if _, err := a.Write(big); err != nil {
						if !errors.Is(err, net.ErrClosed) {
							t.Errorf("Write = %v", err)
						}
						return
					}
				}
			})
			time.Sleep(50 * time.Millisecond)
			if err := a.Close(); err != nil {
				t.Error(err)
			}
			wg.Wait()
		})
	}
}

func TestRejectAnswersWithStatus(t *testing.T) {
	for _, status := range []int{400, 401, 503} {
		p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
			r.Reject(status)
			r.Reject(999)
			if _, err := r.Accept(hbone.Response{}); err == nil {
				t.Error("Accept after Reject succeeded")
			}
		})
		_, _, err := openStream(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"})
		var se *hbone.StatusError
		if !errors.As(err, &se) || se.Status != status {
			t.Errorf("Open = %v, want status %d", err, status)
		}
		waitStreams(t, p.session, 0)
	}
}

func TestUnansweredRequestIsReset(t *testing.T) {
	p := newPair(t, h2.Client{}, h2.Server{}, func(*hbone.ServerRequest) {})
	_, _, err := openStream(t.Context(), p.session, &hbone.Request{Authority: "10.0.0.1:80"})
	var reset *hbone.ResetError
	if !errors.As(err, &reset) || errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Open = %v, want a reset that is no refusal", err)
	}
}

func TestOpenContextBoundsOnlyTheOpening(t *testing.T) {
	p := newPair(t, h2.Client{}, h2.Server{}, echo)
	ctx, cancel := context.WithCancel(t.Context())
	s, _, err := openStream(ctx, p.session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	cancel()
	time.Sleep(20 * time.Millisecond)
	write(t, s, "ping")
	read(t, s, "ping")
}

func TestOpenGivesUpWithItsContext(t *testing.T) {
	ended := make(chan struct{})
	p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		<-r.Context.Done()
		close(ended)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := openStream(ctx, p.session, &hbone.Request{Authority: "10.0.0.1:80"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open = %v", err)
	}
	<-ended // the server saw the reset
	waitStreams(t, p.session, 0)
}

func TestRequestContextEnds(t *testing.T) {
	for name, end := range map[string]func(p *pair, s hbone.Stream){
		"with a reset":        func(_ *pair, s hbone.Stream) { _ = s.Close() },
		"with the connection": func(p *pair, _ hbone.Stream) { _ = p.session.Close() },
		"with force":          func(p *pair, _ hbone.Stream) { p.force() },
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
				if _, err := r.Accept(hbone.Response{}); err == nil {
					<-r.Context.Done()
					close(ended)
				}
			})
			s := p.open(t)
			end(p, s)
			<-ended
		})
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
