package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func TestConcurrentOpensShareADial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				tunnel, err := w.client.Open(t.Context(), key, request)
				if err != nil {
					t.Error(err)
					return
				}
				hbonetest.Ping(t, tunnel)
				_ = tunnel.Close()
			})
		}
		wg.Wait()
		if n := w.net.dialed(); n != 1 {
			t.Errorf("%d dials for 50 streams", n)
		}
	})
}

func TestKeysDoNotShareSessions(t *testing.T) {
	w := newWorld(t, nil)
	other := key
	other.Source = "spiffe://cluster.local/ns/demo/sa/other"
	for _, k := range []hbone.Key{key, other, key, other} {
		tunnel, err := w.client.Open(t.Context(), k, request)
		if err != nil {
			t.Fatal(err)
		}
		_ = tunnel.Close()
	}
	if n := w.net.dialed(); n != 2 {
		t.Errorf("%d dials for two keys", n)
	}
}

func TestFullSessionIsUsedAgainWhenItHasRoom(t *testing.T) {
	for name, limit := range map[string]func(*hbone.ClientConfig, *hbone.ServerConfig){
		"own bound":    func(c *hbone.ClientConfig, _ *hbone.ServerConfig) { c.MaxStreamsPerConn = 2 },
		"peer's bound": func(_ *hbone.ClientConfig, s *hbone.ServerConfig) { s.Transport = h2.Server{MaxStreams: 2} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, limit)
				var open []*hbone.Tunnel
				for range 5 {
					tunnel := w.open(t)
					hbonetest.Ping(t, tunnel)
					open = append(open, tunnel)
				}
				if n := w.net.dialed(); n != 3 {
					t.Errorf("%d sessions for 5 streams of 2 each", n)
				}
				_ = open[0].Close() // a place in the first session
				_ = open[2].Close() // and in the second; the third has one left
				synctest.Wait()
				for range 3 {
					tunnel := w.open(t)
					if !tunnel.Reused {
						t.Error("a new session was made while the old had room")
					}
					open = append(open, tunnel)
				}
				if n := w.net.dialed(); n != 3 {
					t.Errorf("%d sessions, want the 3 from before", n)
				}
				for _, tunnel := range open {
					_ = tunnel.Close()
				}
			})
		})
	}
}

func TestWaitersBeyondOneSessionGetMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) { c.MaxStreamsPerConn = 3 })
		var wg sync.WaitGroup
		tunnels := make(chan *hbone.Tunnel, 10)
		for range 10 {
			wg.Go(func() {
				tunnel, err := w.client.Open(t.Context(), key, request)
				if err != nil {
					t.Error(err)
					return
				}
				tunnels <- tunnel
			})
		}
		wg.Wait()
		close(tunnels)
		if s := w.client.Stats(); s.Sessions != 4 || s.Streams != 10 || s.Dials != 4 {
			t.Errorf("stats = %+v, want 10 streams in 4 sessions", s)
		}
		for tunnel := range tunnels {
			_ = tunnel.Close()
		}
	})
}

func TestIdleSessionIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		tunnel := w.open(t)
		time.Sleep(time.Hour)
		hbonetest.Ping(t, tunnel) // not idle, however quiet
		_ = tunnel.Close()
		time.Sleep(5*time.Minute - time.Second)
		if s := w.client.Stats(); s.Sessions != 1 {
			t.Errorf("session was gone before its time: %+v", s)
		}
		again := w.open(t)
		if !again.Reused {
			t.Error("idle session was not used again")
		}
		_ = again.Close()
		time.Sleep(5*time.Minute - time.Second)
		if s := w.client.Stats(); s.Sessions != 1 {
			t.Errorf("a stream did not restart the idle time: %+v", s)
		}
		time.Sleep(5 * time.Second)
		if s := w.client.Stats(); s.Sessions != 0 || s.IdleClosed != 1 || s.Keys != 0 {
			t.Errorf("after the idle time: %+v", s)
		}
	})
}

// mute is a connection that swallows what is written and delivers nothing, once it is told.
type mute struct {
	net.Conn
	quiet atomic.Bool
}

func (m *mute) Write(p []byte) (int, error) {
	if m.quiet.Load() {
		return len(p), nil
	}
	return m.Conn.Write(p)
}

func TestSilentPeerEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conn *mute
		w := newWorld(t, func(c *hbone.ClientConfig, s *hbone.ServerConfig) {
			s.Transport = h2.Server{PingInterval: 24 * time.Hour} // or it would notice first
			dial := c.Dial
			c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
				raw, err := dial(ctx, k)
				conn = &mute{Conn: raw}
				return conn, err
			}
		})
		tunnel := w.open(t)
		time.Sleep(time.Hour) // answered PINGs keep it alive
		hbonetest.Ping(t, tunnel)
		conn.quiet.Store(true)
		start := time.Now()
		_, err := tunnel.Read(make([]byte, 1))
		if took := time.Since(start); !errors.Is(err, hbone.ErrPeerSilent) || took < 20*time.Second || took > 30*time.Second {
			t.Errorf("Read = %v after %v, want the peer found silent after 20 to 30 seconds", err, took)
		}
		_ = tunnel.Close()
		synctest.Wait()
		if s := w.client.Stats(); s.Sessions != 0 {
			t.Errorf("dead session stays in the pool: %+v", s)
		}
	})
}

func TestResetIsToldToWhoOnlyWrites(t *testing.T) {
	reset := make(chan struct{})
	w := newWorld(t, func(_ *hbone.ClientConfig, s *hbone.ServerConfig) {
		s.Handler = func(r *hbone.ServerRequest) {
			if st, err := r.Accept(hbone.Response{}); err == nil {
				_ = st.CloseWrite()
				<-reset // and return, which resets what is still open
			}
		}
	})
	tunnel := w.open(t)
	if all, err := io.ReadAll(tunnel); err != nil || len(all) > 0 {
		t.Fatalf("read %q, %v", all, err)
	}
	ends := make(ends, 2)
	tunnel.Deliver(ends)
	if err := <-ends; err != nil {
		t.Fatalf("the clean end of a direction is told as %v", err)
	}
	close(reset)
	if err := <-ends; err == nil {
		t.Error("a reset is told as a clean end")
	}
	_ = tunnel.Close()
}

// ends is a sink that tells of ends alone.
type ends chan error

func (e ends) Take(p []byte, _ bool) int { return len(p) }
func (e ends) Full()                     {}
func (e ends) End(err error)             { e <- err }

func TestDeadPooledSessionLeadsToAFreshOne(t *testing.T) {
	w := newWorld(t, nil)
	first := w.open(t)
	_ = first.Close()
	w.net.cut()
	second := w.open(t)
	hbonetest.Ping(t, second)
	_ = second.Close()
}

// refusing makes sessions whose first Opens are refused.
type refusing struct {
	hbone.ClientTransport
	refusals *atomic.Int64
}

type refusingSession struct {
	hbone.Session
	refusals *atomic.Int64
}

func (r refusing) NewSession(ctx context.Context, conn *tls.Conn) (hbone.Session, error) {
	s, err := r.ClientTransport.NewSession(ctx, conn)
	return refusingSession{s, r.refusals}, err
}

func (s refusingSession) Start(r *hbone.Request) (hbone.Opening, error) {
	if s.refusals.Add(-1) >= 0 {
		s.Release()
		return nil, hbone.ErrRefused
	}
	return s.Session.Start(r)
}

func TestRefusedOpenIsTriedOnAFreshSessionAFewTimes(t *testing.T) {
	for refusals, want := range map[int64]error{1: nil, 2: nil, 3: hbone.ErrRefused} {
		var left atomic.Int64
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.Transport = refusing{c.Transport, &left}
		})
		warm := w.open(t) // so that the first refusal is a pooled session's
		left.Store(refusals)
		tunnel, err := w.client.Open(t.Context(), key, request)
		if !errors.Is(err, want) {
			t.Errorf("%d refusals: Open = %v", refusals, err)
		}
		if err == nil {
			hbonetest.Ping(t, tunnel)
			_ = tunnel.Close()
			if n := w.net.dialed(); n != 1+int(refusals) {
				t.Errorf("%d refusals: %d dials, want a fresh session for each try", refusals, n)
			}
		}
		_ = warm.Close()
	}
}

func TestGoAwayLeadsToAFreshSessionAndLeavesStreamsAlone(t *testing.T) {
	w := newWorld(t, nil)
	first := w.open(t)
	hbonetest.Ping(t, first)

	// The server drains without force; a second one takes over the address.
	ctx, drain := context.WithCancel(context.Background())
	l := newMemory()
	w2 := &world{ca: w.ca, net: l}
	w2.client = hbone.NewClient(hbone.ClientConfig{
		Dial: l.dial,
		TLS: func(context.Context, hbone.Key) (*tls.Config, error) {
			return w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID), nil
		},
		Transport: h2.Client{},
	})
	defer func() { _ = w2.client.Close() }()
	srv := hbone.NewServer(hbone.ServerConfig{TLS: w.ca.ServerTLS(t, hbonetest.ServerID), Transport: h2.Server{}, Handler: hbonetest.Echo})
	// Serve accepts one connection and then sees its ctx end; l is not closed by it but by
	// the test, so a wrapper keeps it open.
	served := make(chan error, 2)
	go func() {
		served <- srv.Serve(ctx, context.Background(), unclosable{l, make(chan struct{}), new(sync.Once)})
	}()
	old := w2.open(t)
	hbonetest.Ping(t, old)
	drain()
	ctx2, drain2 := context.WithCancel(context.Background())
	defer drain2()
	go func() { served <- srv.Serve(ctx2, context.Background(), l) }()
	var fresh *hbone.Tunnel
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		fresh = w2.open(t)
		if !fresh.Reused {
			break
		}
		_ = fresh.Close()
		if time.Now().After(deadline) {
			t.Fatal("GOAWAY was not honoured")
		}
	}
	hbonetest.Ping(t, fresh)
	hbonetest.Ping(t, old) // goes on
	_ = old.Close()
	_ = fresh.Close()
	if err := <-served; err != nil { // the drained one
		t.Error(err)
	}
	drain2()
	if err := <-served; err != nil {
		t.Error(err)
	}
	_ = first.Close()
}

// unclosable stops accepting at Close and leaves its listener open.
type unclosable struct {
	*memory
	stopped chan struct{}
	once    *sync.Once
}

func (u unclosable) Close() error { u.once.Do(func() { close(u.stopped) }); return nil }

func (u unclosable) Accept() (net.Conn, error) {
	select {
	case c := <-u.accept:
		return c, nil
	case <-u.stopped:
		return nil, net.ErrClosed
	}
}

func TestWaiterTakesAPlaceThatBecomesFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.MaxStreamsPerConn = 1
			dial, first := c.Dial, true
			c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
				if first {
					first = false
					return dial(ctx, k)
				}
				<-ctx.Done()
				return nil, ctx.Err()
			}
		})
		holder := w.open(t)
		time.AfterFunc(time.Second, func() { _ = holder.Close() })
		start := time.Now()
		tunnel := w.open(t)
		if took := time.Since(start); took != time.Second || !tunnel.Reused {
			t.Errorf("waited %v, reused %v", took, tunnel.Reused)
		}
		_ = tunnel.Close()
	})
}

// stillborn makes sessions that are dead before anybody can use them.
type stillborn struct{ hbone.ClientTransport }

func (s stillborn) NewSession(ctx context.Context, conn *tls.Conn) (hbone.Session, error) {
	session, err := s.ClientTransport.NewSession(ctx, conn)
	if err == nil {
		err = session.Close()
		<-session.Done()
	}
	return session, err
}

func TestPeerThatHangsUpAtOnceIsNotDialledForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) { c.Transport = stillborn{c.Transport} })
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := w.client.Open(ctx, key, request); !errors.Is(err, hbone.ErrRefused) {
			t.Errorf("Open = %v", err)
		}
		if n := w.net.dialed(); n > 3 {
			t.Errorf("%d dials", n)
		}
	})
}
