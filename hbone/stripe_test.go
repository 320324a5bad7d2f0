package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
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
		first := w.open(t) // another session is made for it
		if first.Conn == bulk.Conn {
			t.Error("a stream shares its session with bulk")
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

// slowStripes has every dial but the first take d, and fail with err if there is one.
func slowStripes(d time.Duration, err error) func(*hbone.ClientConfig, *hbone.ServerConfig) {
	return func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
		c.Stripes = 2
		dial := c.Dial
		var dials atomic.Int64
		c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			if dials.Add(1) == 1 {
				return dial(ctx, k)
			}
			time.Sleep(d)
			if err != nil {
				return nil, err
			}
			return dial(ctx, k)
		}
	}
}

// openMany opens tunnels at once, and returns how many each session carries, and how long it took.
func (w *world) openMany(t *testing.T, n int) (streams map[*hbone.Conn]int, took time.Duration) {
	t.Helper()
	began := time.Now()
	tunnels := make(chan *hbone.Tunnel, n)
	for range n {
		go func() {
			tunnel, err := w.client.Open(t.Context(), key, request)
			if err != nil {
				t.Error(err)
			}
			tunnels <- tunnel
		}()
	}
	streams = make(map[*hbone.Conn]int)
	for range n {
		if tunnel := <-tunnels; tunnel != nil {
			t.Cleanup(func() { _ = tunnel.Close() })
			streams[tunnel.Conn]++
		}
	}
	return streams, time.Since(began)
}

// Streams that come at once share the work, if the session for that is there soon.
func TestBurstWaitsAMomentForAStripe(t *testing.T) {
	for name, test := range map[string]struct {
		dial time.Duration
		err  error
		want []int // streams of each session
		took time.Duration
	}{
		"it is there soon":  {5 * time.Millisecond, nil, []int{4, 4}, 5 * time.Millisecond},
		"it takes long":     {time.Second, nil, []int{8}, 20 * time.Millisecond},
		"it cannot be made": {5 * time.Millisecond, errors.New("too many connections"), []int{8}, 5 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, slowStripes(test.dial, test.err))
				streams, took := w.openMany(t, 8)
				var got []int
				for _, n := range streams {
					got = append(got, n)
				}
				if !slices.Equal(got, test.want) || took != test.took {
					t.Errorf("sessions of %v streams after %v, want %v after %v", got, took, test.want, test.took)
				}
			})
		})
	}
}

// While a stream waits for a stripe it has a place in the session that is there, whatever becomes
// of that meanwhile.
func TestStreamThatWaitsForAStripeKeepsItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, slowStripes(time.Second, nil))
		go func() {
			time.Sleep(10 * time.Millisecond)
			w.client.RetireKeys(func(hbone.Key) bool { return true })
		}()
		if streams, took := w.openMany(t, 8); len(streams) != 1 || took != 20*time.Millisecond {
			t.Errorf("%d sessions after %v, want the one that was there, after %v", len(streams), took, 20*time.Millisecond)
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
