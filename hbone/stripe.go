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
// Nobody waits for a stripe. One that cannot be made, as by a peer that has enough connections,
// is not tried again for a while.
const (
	stripeStreams = 4
	stripePause   = time.Second // between two dials for more
	stripeRetry   = time.Minute // after one that failed
)

// load orders sessions by how well a further stream does there, the least first; above 0 it
// had better go elsewhere.
func (m *member) load() int {
	const busy = 1 << 16
	switch {
	case m.session.Busy():
		return busy + m.streams
	case m.streams >= stripeStreams:
		return m.streams
	default:
		return -m.streams
	}
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
