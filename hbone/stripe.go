package hbone

import (
	"context"
	"time"
)

// A TLS connection is one core's work and one congestion window, and what is sent on it waits
// behind what was sent before. So a pool has several sessions when it is busy, its stripes:
//
//	few streams, little traffic ─► the fullest session, so that others become idle and go
//	a session is busy, or has
//	stripeStreams streams       ─► one that is not, else the one with the fewest streams
//	all are                     ─► as above, and one more session is dialed in the background
//
// Only a burst waits for a stripe that is being dialed, and not for long: streams that go to a
// session with enough of them, before it has moved much, are the ones that share it to their end.
// One that cannot be made, as by a peer that has enough connections,
// is not tried again for a while.
const (
	stripeStreams = 4
	stripePause   = time.Second // between two dials for more
	stripeRetry   = time.Minute // after one that failed
	stripeWait    = 20 * time.Millisecond
	busy          = 1 << 16 // load of a busy session
)

// load orders sessions by how well a further stream does there, the least first; above 0 it
// had better go elsewhere.
func (m *member) load() int {
	switch {
	case m.session.Busy():
		return busy + m.streams
	case m.streams >= stripeStreams:
		return m.streams
	default:
		return -m.streams
	}
}

// isBurst tells a load of many streams from that of a busy session.
func isBurst(load int) bool { return 0 < load && load < busy }

// sparesLocked counts the stripes that are being dialed.
func (p *pool) sparesLocked() int {
	n := 0
	for _, d := range p.dials {
		if d.spare {
			n++
		}
	}
	return n
}

// awaitStripeLocked has those who wait for a stripe do so no longer than stripeWait.
func (c *Client) awaitStripeLocked(base context.Context, p *pool) {
	if p.forBurst != nil {
		return
	}
	p.forBurst = time.AfterFunc(stripeWait, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		p.forBurst = nil
		c.grantLocked(base, p, true)
	})
}

// stripeLocked dials one more session when the best there is has that load; base lends the dial
// its values.
func (c *Client) stripeLocked(base context.Context, p *pool, load int) {
	now := time.Now()
	if load <= 0 || now.Before(p.nextStripe) || p.stripesLocked() >= c.cfg.Stripes {
		return
	}
	p.nextStripe = now.Add(stripePause)
	c.startDialLocked(base, p, true)
}

// stripesLocked counts the sessions that take streams, and those to come.
func (p *pool) stripesLocked() int {
	n := len(p.dials)
	for _, m := range p.members {
		if !m.retired && (m.streams > 0 || m.session.Capacity() > 0) {
			n++
		}
	}
	return n
}
