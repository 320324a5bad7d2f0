package proxy

import (
	"container/list"
	"sync"
	"time"
)

// gate bounds how many chunks are moved at one time, and hands turns out evenly between
// pods.
//
// Why: a runnable goroutine waits behind all others that are runnable. Without a bound, a
// pod with 200 bulk connections keeps 200 goroutines runnable, each good for tens of
// microseconds, and a request of another pod waits for all of them. With it the pod keeps
// PodActive of them runnable, the others sleep in its own queue, and the other pod's
// request is next.
//
//	direction: wait for bytes ─► acquire ─► read, encrypt, write one chunk ─► release
//
// A turn is held only while a chunk that is there moves. Where that cannot be known (a
// stream's Write may wait for the peer's window) the turn is a lease: when others wait and
// a turn is older than the lease, it passes on and its holder's release does nothing.
type gate struct {
	limit int
	lease time.Duration

	mu      sync.Mutex
	active  int
	waiting int
	queue   list.List // of *share: those that could use a turn, longest waiting first
	held    list.List // of *turn, oldest first
	timer   *time.Timer
	armed   bool
}

func newGate(limit int, lease time.Duration) *gate { return &gate{limit: limit, lease: lease} }

// share is one pod's part of a gate.
type share struct {
	gate   *gate
	limit  int
	active int
	turns  list.List     // of *turn that wait, in order
	queued *list.Element // in gate.queue, nil when not
}

func (g *gate) share(limit int) *share { return &share{gate: g, limit: limit} }

// turn is the right to move one chunk. One direction of a connection uses it over and over.
type turn struct {
	share   *share
	granted chan struct{}
	since   time.Time
	held    *list.Element // in gate.held, nil when not
}

// turns recycles them: an idle connection has none.
var turns = sync.Pool{New: func() any { return newTurn(nil) }}

func newTurn(s *share) *turn { return &turn{share: s, granted: make(chan struct{}, 1)} }

func (s *share) turn() *turn {
	t := turns.Get().(*turn)
	t.share = s
	return t
}

// recycle releases t and gives it away.
func (t *turn) recycle() {
	t.release()
	t.share = nil
	turns.Put(t)
}

// acquire waits for the turn. Waits are short: chunks are, and blocked holders lose theirs.
func (t *turn) acquire() {
	g := t.share.gate
	g.mu.Lock()
	if g.active < g.limit && t.share.active < t.share.limit && t.share.turns.Len() == 0 {
		g.grantLocked(t)
		g.mu.Unlock()
		return
	}
	t.share.turns.PushBack(t)
	g.waiting++
	g.queueLocked(t.share)
	g.armLocked(g.lease)
	g.mu.Unlock()
	<-t.granted
}

// release gives the turn back. Calling it without one does nothing.
func (t *turn) release() {
	g := t.share.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.releaseLocked(t)
	g.dispatchLocked()
}

func (g *gate) grantLocked(t *turn) {
	g.active++
	t.share.active++
	t.since = time.Now()
	t.held = g.held.PushBack(t)
}

func (g *gate) releaseLocked(t *turn) {
	if t.held == nil {
		return
	}
	g.held.Remove(t.held)
	t.held = nil
	g.active--
	t.share.active--
	g.queueLocked(t.share)
}

// queueLocked puts s in line when it could use a turn.
func (g *gate) queueLocked(s *share) {
	if s.queued == nil && s.turns.Len() > 0 && s.active < s.limit {
		s.queued = g.queue.PushBack(s)
	}
}

// dispatchLocked hands out the turns that are free, one to each pod in line.
func (g *gate) dispatchLocked() {
	for g.active < g.limit {
		first := g.queue.Front()
		if first == nil {
			return
		}
		s := g.queue.Remove(first).(*share)
		s.queued = nil
		t := s.turns.Remove(s.turns.Front()).(*turn)
		g.waiting--
		g.grantLocked(t)
		g.queueLocked(s)
		t.granted <- struct{}{}
	}
}

// armLocked makes expire run after d, unless it will anyway.
func (g *gate) armLocked(d time.Duration) {
	switch {
	case g.armed:
		return
	case g.timer == nil:
		g.timer = time.AfterFunc(d, g.expire)
	default:
		g.timer.Reset(d)
	}
	g.armed = true
}

// expire passes on the turns of holders that seem blocked. It runs only while others wait.
func (g *gate) expire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed = false
	now := time.Now()
	for e := g.held.Front(); e != nil; e = g.held.Front() {
		t := e.Value.(*turn)
		if now.Sub(t.since) < g.lease {
			break
		}
		g.releaseLocked(t)
	}
	g.dispatchLocked()
	if g.waiting > 0 {
		g.armLocked(g.lease)
	}
}
