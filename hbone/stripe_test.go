package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func striped(n int) func(*hbone.ClientConfig, *hbone.ServerConfig) {
	return func(c *hbone.ClientConfig, _ *hbone.ServerConfig) { c.Stripes = n }
}

// move sends n bytes through an echo, within a tenth of a second.
func move(t *testing.T, s hbone.Stream, n int64) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(make([]byte, n))
		sent <- err
	}()
	if _, err := io.CopyN(io.Discard, s, n); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
}

func TestStreamsKeepAwayFromABusySession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, striped(2))
		bulk := w.open(t)
		defer bulk.Close()
		move(t, bulk, 1<<20)
		first := w.open(t) // it waits for no other session
		if first.Conn != bulk.Conn {
			t.Error("a stream waited for a session to be made")
		}
		_ = first.Close()
		synctest.Wait()
		if n := w.net.dialed(); n != 2 {
			t.Fatalf("%d sessions beside bulk, want 2", n)
		}
		for range 3 {
			move(t, bulk, 1<<20)
			request := w.open(t)
			if request.Conn == bulk.Conn {
				t.Error("a request shares its session with bulk")
			}
			hbonetest.Ping(t, request)
			_ = request.Close()
		}
		time.Sleep(10 * time.Second) // bulk rests
		if quiet := w.open(t); quiet.Conn != bulk.Conn {
			t.Error("a stream is not where the others are, so the stripe never becomes idle")
		}
		if n := w.net.dialed(); n != 2 {
			t.Errorf("%d dials, want 2", n)
		}
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if n := w.client.Stats().Sessions; n != 1 {
			t.Errorf("%d sessions with little to do, want 1", n)
		}
	})
}

func TestManyStreamsSpreadOverStripes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, striped(3))
		var open []*hbone.Tunnel
		streams := map[*hbone.Conn]int{}
		for range 24 {
			tunnel := w.open(t)
			open = append(open, tunnel)
			streams[tunnel.Conn]++
			time.Sleep(2 * time.Second)
		}
		if len(streams) != 3 || w.net.dialed() != 3 {
			t.Errorf("%d sessions, %d dials, want 3", len(streams), w.net.dialed())
		}
		for _, n := range streams {
			if n < 7 || n > 9 {
				t.Errorf("%d streams on one of 3 sessions of 24", n)
			}
		}
		for _, tunnel := range open {
			_ = tunnel.Close()
		}
	})
}

// A peer with a bound on connections costs no stream, and is not asked all the time.
func TestStripeThatCannotBeMadeCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refusing atomic.Bool
		var refused atomic.Int64
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.Stripes = 2
			dial := c.Dial
			c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
				if refusing.Load() {
					refused.Add(1)
					return nil, errors.New("too many connections")
				}
				return dial(ctx, k)
			}
		})
		for range 4 {
			defer w.open(t).Close()
		}
		refusing.Store(true)
		for range 40 {
			tunnel := w.open(t)
			hbonetest.Ping(t, tunnel)
			_ = tunnel.Close()
			time.Sleep(time.Second)
		}
		if n := refused.Load(); n != 1 {
			t.Errorf("asked %d times in 40 s, want once", n)
		}
		refusing.Store(false)
		time.Sleep(time.Minute)
		_ = w.open(t).Close()
		synctest.Wait()
		if n := w.client.Stats().Sessions; n != 2 {
			t.Errorf("%d sessions once the peer takes more, want 2", n)
		}
	})
}

func TestHandshakesWaitForOneAnother(t *testing.T) {
	for name, bound := range map[string]func(*hbone.ClientConfig){
		"of a client": func(c *hbone.ClientConfig) { c.MaxHandshakes = 1 },
		"of all":      func(c *hbone.ClientConfig) { c.Handshakes = make(chan struct{}, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var under, most atomic.Int64
				w := newWorld(t, func(c *hbone.ClientConfig, s *hbone.ServerConfig) {
					bound(c)
					s.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
						most.Store(max(most.Load(), under.Add(1)))
						time.Sleep(time.Second)
						under.Add(-1)
						return nil, nil
					}
				})
				done := make(chan error)
				for i := range 4 {
					go func() {
						k := key
						k.Source += string(rune('a' + i))
						tunnel, err := w.client.Open(t.Context(), k, request)
						if err == nil {
							err = tunnel.Close()
						}
						done <- err
					}()
				}
				for range 4 {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
				if n := most.Load(); n != 1 {
					t.Errorf("%d handshakes at once, want 1", n)
				}
			})
		})
	}
}
