package telemetry

import (
	"context"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// carrier is a socket that carries open connections: one, or all of a tunnel, which ask it
// together.
type carrier struct {
	socket syscall.Conn
	conns  int // guarded by Telemetry.mu

	mu       sync.Mutex
	asked    time.Time // zero: never
	facts    tcpFacts
	reported time.Time // the last report that was about it
	counted  uint32    // retransmits in metrics
}

// freshness is how old the facts may be that a connection in a tunnel starts with.
const freshness = time.Second

// start is what a new connection of the socket knows of it.
func (c *carrier) start(now time.Time) tcpFacts {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.asked.IsZero()
	if first || now.Sub(c.asked) >= freshness {
		c.askLocked(now)
	}
	if first {
		c.counted = c.facts.retransmits
	}
	return c.facts
}

// report is as of now. once is true for the first that asks in this report, and again is
// what was retransmitted since the last one.
func (c *carrier) report(now time.Time) (facts tcpFacts, again uint32, once bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reported.Equal(now) || !c.askLocked(now) {
		return c.facts, 0, false
	}
	again = c.facts.retransmits - min(c.counted, c.facts.retransmits)
	c.reported, c.counted = now, c.facts.retransmits
	return c.facts, again, true
}

// askLocked is false for a socket that is gone.
func (c *carrier) askLocked(now time.Time) bool {
	facts, ok := tcpInfo(c.socket)
	if ok {
		c.asked, c.facts = now, facts
	}
	return ok
}

// join makes c one of the live connections. socket carries it, unless it is nil.
func (t *Telemetry) join(c *Conn, socket syscall.Conn, now time.Time) {
	t.mu.Lock()
	c.place = len(t.live)
	t.live = append(t.live, c)
	if socket != nil {
		c.carrier = t.carriers[socket]
		if c.carrier == nil {
			c.carrier = &carrier{socket: socket}
			t.carriers[socket] = c.carrier
		}
		c.carrier.conns++
	}
	t.mu.Unlock()
	if c.carrier != nil {
		facts := c.carrier.start(now)
		c.baseline.Store(facts.retransmits)
		c.rtt.Store(facts.rttMicros)
	}
	if !t.reporting.Load() && t.reporting.CompareAndSwap(false, true) {
		t.rouse()
	}
}

// leave takes c's place away from it; the last one gets it.
func (t *Telemetry) leave(c *Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := len(t.live) - 1
	t.live[c.place] = t.live[last]
	t.live[c.place].place = c.place
	t.live[last] = nil
	t.live = t.live[:last]
	if c.carrier != nil {
		if c.carrier.conns--; c.carrier.conns == 0 {
			delete(t.carriers, c.carrier.socket)
		}
	}
}

// Live is how many connections are open.
func (t *Telemetry) Live() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.live)
}

// Connections lists the open connections, oldest first.
func (t *Telemetry) Connections() []admin.Connection {
	t.mu.Lock()
	conns := slices.Clone(t.live)
	t.mu.Unlock()
	slices.SortFunc(conns, func(a, b *Conn) int { return a.opened().Compare(b.opened()) })
	list := make([]admin.Connection, len(conns))
	for i, c := range conns {
		r := c.record(admin.FlowUpdate, time.Time{})
		list[i] = r.connection()
	}
	return list
}

// rouse makes the loop look whether there is something to do.
func (t *Telemetry) rouse() {
	select {
	case t.roused <- struct{}{}:
	default:
	}
}

// reportLoop lets live connections report and sweeps what is stale. It sets a timer only
// while there are any: a node where nothing happens is not woken.
func (t *Telemetry) reportLoop(ctx context.Context) {
	var report, sweep <-chan time.Time
	changed := t.snapshotChanged()
	for {
		if report == nil && t.reporting.Load() {
			report = time.After(t.cfg.Interval)
		}
		if sweep == nil && t.metrics.sweepable() {
			sweep = time.After(max(t.cfg.StaleAfter/4, time.Second))
		}
		select {
		case <-ctx.Done():
			return
		case <-t.roused:
		case <-changed:
			changed = t.snapshotChanged()
			t.metrics.forgetParties()
		case now := <-report:
			report = nil
			t.report(now)
			t.rest()
		case now := <-sweep:
			sweep = nil
			t.metrics.sweep(now)
		}
	}
}

func (t *Telemetry) snapshotChanged() <-chan struct{} {
	if t.cfg.Store == nil {
		return nil
	}
	_, changed := t.cfg.Store.Load()
	return changed
}

// rest ends the reports if no connection is open. One that opens meanwhile has either seen
// reporting and is seen here, or starts them again.
func (t *Telemetry) rest() {
	if t.Live() > 0 {
		return
	}
	t.reporting.Store(false)
	if t.Live() > 0 {
		t.reporting.Store(true)
	}
}

// report lets every connection that is older than half the interval tell how far it has come.
func (t *Telemetry) report(now time.Time) {
	var some [256]*Conn // at a time, so that nobody who opens or closes waits for long
	// From the end: who leaves has its place taken by the last, which was asked already.
	t.mu.Lock()
	for end := len(t.live); end > 0; end = min(end, len(t.live)) {
		n := copy(some[:], t.live[max(0, end-len(some)):end])
		t.mu.Unlock()
		for _, c := range some[:n] {
			if now.Sub(c.opened()) >= t.cfg.Interval/2 && c.report() {
				t.update(c, now)
			}
		}
		end -= n
		t.mu.Lock()
	}
	t.mu.Unlock()
}

// update publishes how far c has come, whose bytes moved.
func (t *Telemetry) update(c *Conn, now time.Time) {
	if c.carrier != nil {
		facts, again, once := c.carrier.report(now)
		if once {
			t.metrics.socket(c.parties.direction, facts, again)
		}
		c.rtt.Store(facts.rttMicros)
		c.retransmits.Store(facts.retransmits - min(c.baseline.Load(), facts.retransmits))
	}
	t.flows.publish(c.record(admin.FlowUpdate, now))
}
