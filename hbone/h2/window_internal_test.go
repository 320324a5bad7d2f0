package h2

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
)

func TestBufferHoldsLittleMoreThanItsBytesHoweverTheyArrive(t *testing.T) {
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 1))
		largest := []int{smallChunk, mediumChunk, largeChunk}[random.IntN(3)]
		spare := random.IntN(3) * largest
		var b buffer
		var sent, got []byte
		for range 2000 {
			if random.IntN(3) == 0 {
				if c := b.pop(); c != nil {
					got = append(got, c.data[c.r:c.w]...)
					putChunk(c)
				}
			}
			n := 1 + random.IntN(1+random.IntN(largest))
			c := getChunk(n)
			for i := range n {
				c.data[i] = byte(random.Uint32())
			}
			c.w = n
			sent = append(sent, c.data[:n]...)
			b.push(c, spare)
			held := 0
			for _, c := range b.queue {
				held += len(c.data)
			}
			if held != b.held || held > b.size+spare+largest {
				t.Fatalf("%d bytes are in %d of memory, counted as %d; want at most %d more and a chunk of %d", b.size, held, b.held, spare, largest)
			}
		}
		for c := b.pop(); c != nil; c = b.pop() {
			got = append(got, c.data[c.r:c.w]...)
			putChunk(c)
		}
		if b.size != 0 || b.held != 0 || !bytes.Equal(sent, got) {
			t.Fatalf("%d bytes went in, %d came out; %d and %d are left", len(sent), len(got), b.size, b.held)
		}
	}
}

// ledger is a budget without a bound.
type ledger struct {
	hbone.Unlimited
	used int
}

func (l *ledger) Take(n int) bool    { l.used += n; return true }
func (l *ledger) Grow(n, _ int) bool { return l.Take(n) }
func (l *ledger) Give(n int)         { l.used -= n }

func newWindow() (*ledger, *conn, *stream) {
	budget := &ledger{}
	c := &conn{values: values{budget: budget}.withDefaults(), streams: make(map[uint32]*stream), client: &clientState{}}
	s := c.newStreamLocked(1)
	s.reserveLocked()
	return budget, c, s
}

func TestWindowGrowsOnlyIfMuchOfItIsReadInARoundTrip(t *testing.T) {
	for read, want := range map[int]int{startWindow/growShare - 1: startWindow, startWindow / growShare: 4 * startWindow} {
		c, s := probed(t, read)
		c.lastRead.Store(int64(leastProbe))
		if c.probedLocked(); s.window.target != want || c.probing {
			t.Errorf("window is %d after %d bytes were read in a round trip, want %d", s.window.target, read, want)
		}
	}
}

func TestRoundTripCountsForAtLeastAMillisecond(t *testing.T) {
	c, s := probed(t, startWindow/4)
	c.lastRead.Store(int64(leastProbe) - 1)
	if c.probedLocked(); s.window.target != startWindow || !c.probing {
		t.Fatalf("window is %d after less than %v", s.window.target, leastProbe)
	}
	c.lastRead.Store(int64(leastProbe))
	if receive(t, s, startWindow/4); s.window.target != 4*startWindow || c.probing {
		t.Errorf("window is %d after much of it was read in %v", s.window.target, leastProbe)
	}
}

// probed is a stream of which n bytes were read since a probe began.
func probed(t *testing.T, n int) (*conn, *stream) {
	t.Helper()
	_, c, s := newWindow()
	s.startLocked()
	s.window.ask = 1
	receive(t, s, 1) // starts it
	receive(t, s, n)
	if !c.probing {
		t.Fatal("nothing was asked")
	}
	return c, s
}

func receive(t *testing.T, s *stream, n int) {
	t.Helper()
	if code := s.admitLocked(n); code != http2.ErrCodeNo {
		t.Fatalf("peer within its window gets %s", code)
	}
	s.consumedLocked(n)
}

func TestPeerMayExceedTheWindowOnlyBeforeItKnowsIt(t *testing.T) {
	for _, acked := range []bool{false, true} {
		for sent, want := range map[int]http2.ErrCode{
			floorWindow: http2.ErrCodeNo, floorWindow + 1: http2.ErrCodeNo,
			initialWindow: http2.ErrCodeNo, initialWindow + 1: http2.ErrCodeFlowControl,
		} {
			budget, c, s := newWindow()
			if c.acked = acked; acked && sent > floorWindow {
				want = http2.ErrCodeFlowControl
			}
			code := s.admitLocked(sent)
			if code != want {
				t.Errorf("%d bytes with SETTINGS acknowledged %v: %s, want %s", sent, acked, code, want)
			}
			if code == http2.ErrCodeNo && budget.used < sent {
				t.Errorf("%d bytes are taken for %d", budget.used, sent)
			}
		}
	}
}

func TestIdleStreamGivesItsGrowthBackWithTheNextBytes(t *testing.T) {
	budget, c, s := newWindow()
	if !s.growLocked(defaultStreamWindow, growSpare) {
		t.Fatal("window does not grow")
	}
	c.lastRead.Store(int64(time.Second))
	receive(t, s, largeChunk)
	if budget.used < defaultStreamWindow {
		t.Fatalf("%d bytes are taken for a window of %d", budget.used, defaultStreamWindow)
	}
	c.lastRead.Store(int64(time.Second + idleAfter + 1))
	for range defaultStreamWindow/largeChunk - 1 { // the peer may use what it got
		receive(t, s, largeChunk)
		if budget.used < s.window.open {
			t.Fatalf("%d bytes are taken while the peer may send %d", budget.used, s.window.open)
		}
	}
	if s.window.target != startWindow || s.window.open > startWindow || budget.used > 2*startWindow || c.promised != startWindow {
		t.Errorf("%+v, %d bytes taken, %d promised after it was idle; want those of a new stream", s.window, budget.used, c.promised)
	}
	s.closeLocked(http2.ErrCodeCancel)
	if budget.used != 0 || c.promised != 0 {
		t.Errorf("%d bytes are taken, %d promised after the end", budget.used, c.promised)
	}
}
