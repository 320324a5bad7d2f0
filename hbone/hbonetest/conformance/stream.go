package conformance

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func (with Connect) testRequestAndResponseCarryTheirContent(t *testing.T) {
	got := make(chan *hbone.ServerRequest, 1)
	p := with(t, func(r *hbone.ServerRequest) {
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
	s, resp, err := hbonetest.Open(t.Context(), p.Session, req)
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
	if !r.Conn.Local.IsValid() || !r.Conn.Remote.IsValid() || len(r.Conn.TLS.PeerCertificates) != 1 {
		t.Errorf("connection facts are missing: %+v", r.Conn)
	}
	if resp.Baggage.Service != "db" {
		t.Errorf("response baggage = %+v", resp.Baggage)
	}
}

func (with Connect) testHalfCloseByClientDrainsReturnTraffic(t *testing.T) {
	c, s, p := with.both(t)
	hbonetest.Write(t, c, "request")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	hbonetest.Read(t, s, "request")
	hbonetest.ReadEOF(t, s)
	hbonetest.Write(t, s, "answer")
	hbonetest.Read(t, c, "answer")
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	hbonetest.ReadEOF(t, c)
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("Write after CloseWrite succeeded")
	}
	hbonetest.WaitStreams(t, p.Session, 0)
}

// A transport takes an offer or does not; what it took arrives once it is pushed.
func (with Connect) testWhatIsOfferedArrivesWithItsEnd(t *testing.T) {
	c, s, p := with.both(t)
	for from, to := range map[hbone.Stream]hbone.Stream{c: s, s: c} {
		if !from.Offer([]byte("offered")) {
			hbonetest.Write(t, from, "offered")
		}
		if !from.OfferEnd() {
			if err := from.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		from.Push()
		hbonetest.Read(t, to, "offered")
		hbonetest.ReadEOF(t, to)
		if from.Offer([]byte("late")) {
			t.Error("bytes are taken behind the end")
		}
	}
	hbonetest.WaitStreams(t, p.Session, 0)
}

func (with Connect) testHalfCloseByServerLeavesRequestTrafficGoing(t *testing.T) {
	c, s, p := with.both(t)
	hbonetest.Write(t, s, "greeting")
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	hbonetest.Read(t, c, "greeting")
	hbonetest.ReadEOF(t, c)
	for range 100 {
		hbonetest.Write(t, c, "still talking")
		hbonetest.Read(t, s, "still talking")
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	hbonetest.ReadEOF(t, s)
	hbonetest.WaitStreams(t, p.Session, 0)
}

func (with Connect) testCloseWithoutCleanEndResetsThePeer(t *testing.T) {
	steps := map[string]func(a, b hbone.Stream){
		"at once":                  func(a, _ hbone.Stream) { _ = a.Close() },
		"after own half-close":     func(a, _ hbone.Stream) { _ = a.CloseWrite(); _ = a.Close() },
		"after peer's half-close":  func(a, b hbone.Stream) { _ = b.CloseWrite(); _, _ = io.ReadAll(a); _ = a.Close() },
		"twice, from two routines": func(a, _ hbone.Stream) { go func() { _ = a.Close() }(); _ = a.Close() },
	}
	for name, step := range steps {
		for _, side := range []string{"client", "server"} {
			t.Run(side+" "+name, func(t *testing.T) {
				c, s, _ := with.both(t)
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

func (with Connect) testCloseUnblocksReadAndWrite(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			c, s, _ := with.both(t)
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

func (with Connect) testRejectAnswersWithStatus(t *testing.T) {
	for _, status := range []int{400, 401, 503} {
		p := with(t, func(r *hbone.ServerRequest) {
			r.Reject(status)
			r.Reject(999)
			if _, err := r.Accept(hbone.Response{}); err == nil {
				t.Error("Accept after Reject succeeded")
			}
		})
		_, _, err := hbonetest.Open(t.Context(), p.Session, &hbone.Request{Authority: "10.0.0.1:80"})
		var se *hbone.StatusError
		if !errors.As(err, &se) || se.Status != status {
			t.Errorf("Open = %v, want status %d", err, status)
		}
		hbonetest.WaitStreams(t, p.Session, 0)
	}
}

func (with Connect) testUnansweredRequestIsReset(t *testing.T) {
	p := with(t, func(*hbone.ServerRequest) {})
	_, _, err := hbonetest.Open(t.Context(), p.Session, &hbone.Request{Authority: "10.0.0.1:80"})
	var reset *hbone.ResetError
	if !errors.As(err, &reset) || errors.Is(err, hbone.ErrRefused) {
		t.Errorf("Open = %v, want a reset that is no refusal", err)
	}
}

func (with Connect) testOpenContextBoundsOnlyTheOpening(t *testing.T) {
	p := with(t, hbonetest.Echo)
	ctx, cancel := context.WithCancel(t.Context())
	s, _, err := hbonetest.Open(ctx, p.Session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	cancel()
	time.Sleep(20 * time.Millisecond)
	hbonetest.Write(t, s, "ping")
	hbonetest.Read(t, s, "ping")
}

func (with Connect) testOpenGivesUpWithItsContext(t *testing.T) {
	ended := make(chan struct{})
	p := with(t, func(r *hbone.ServerRequest) {
		<-r.Context.Done()
		close(ended)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := hbonetest.Open(ctx, p.Session, &hbone.Request{Authority: "10.0.0.1:80"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open = %v", err)
	}
	<-ended // the server saw the reset
	hbonetest.WaitStreams(t, p.Session, 0)
}

func (with Connect) testRequestContextEnds(t *testing.T) {
	for name, end := range map[string]func(p *Pair, s hbone.Stream){
		"with a reset":        func(_ *Pair, s hbone.Stream) { _ = s.Close() },
		"with the connection": func(p *Pair, _ hbone.Stream) { _ = p.Session.Close() },
		"with force":          func(p *Pair, _ hbone.Stream) { p.Force() },
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			p := with(t, func(r *hbone.ServerRequest) {
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
