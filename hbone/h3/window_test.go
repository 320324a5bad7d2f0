package h3_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// books is a budget that has memory for all, or for all but growth.
type books struct {
	grows bool
	used  atomic.Int64
}

func (b *books) Take(n int) bool {
	b.used.Add(int64(n))
	return true
}

func (b *books) Grow(n, _ int) bool { return b.grows && b.Take(n) }
func (b *books) Give(n int)         { b.used.Add(-int64(n)) }
func (b *books) Short()             {}

// room is a sink that takes so many bytes, and tells when it has.
type room struct {
	left int
	full chan struct{}
}

func (r *room) Take(p []byte, _ bool) int {
	n := min(len(p), r.left)
	r.left -= n
	return n
}

func (r *room) Full()     { close(r.full) }
func (r *room) End(error) {}

// What quic-go lets a peer send unread is reserved, however fast the stream was read before its reader
// stopped, and the window stays as it is without memory for more.
func TestWindowOfAStoppedStreamIsReserved(t *testing.T) {
	const (
		takes    = 1 << 20
		first    = 32 << 10
		reserved = 6 << 10 // of the first window
		buffer   = 3 << 10 // that the sender holds, beside what the peer lets it send
	)
	for name, grows := range map[string]bool{"with memory for growth": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			budget := &books{grows: grows}
			streams, done := make(chan hbone.Stream, 1), make(chan struct{})
			w := newWorld(t, "127.0.0.1", hbonetest.Accepting(streams, done), func(c *h3.Config, _ *hbone.ServerConfig) { c.Budget = budget })
			session := w.connect(t)
			client, _, err := hbonetest.Open(t.Context(), session, request)
			if err != nil {
				t.Fatal(err)
			}
			server, sink := <-streams, &room{left: takes, full: make(chan struct{})}
			before := budget.used.Load()
			server.Deliver(sink)
			var sent atomic.Int64
			writer := make(chan struct{})
			go func() {
				defer close(writer)
				for chunk := make([]byte, 1<<10); ; sent.Add(int64(len(chunk))) {
					if _, err := client.Write(chunk); err != nil {
						return
					}
				}
			}()
			select {
			case <-sink.full:
			case <-time.After(20 * time.Second):
				t.Fatal("the sink is not full after 20 s")
			}
			for last := int64(-1); last != sent.Load(); time.Sleep(200 * time.Millisecond) {
				last = sent.Load()
			}
			unread, window := sent.Load()-takes, budget.used.Load()-before+reserved
			if unread > window+buffer {
				t.Errorf("%d bytes are unread, and %d reserved", unread, window)
			}
			if grows != (window > first) {
				t.Errorf("the window is %d bytes", window)
			}
			_ = client.Close()
			<-writer
			close(done)
			_ = server.Close()
			_ = session.Close()
			for deadline := time.Now().Add(10 * time.Second); budget.used.Load() != 0; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d bytes are still reserved", budget.used.Load())
				}
			}
		})
	}
}
