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
// Streams that are opened meanwhile wait a moment for the stripe, since many that come at once
// share a session to their end; they have a place in the other one, where they go if it takes long.
// A stripe that cannot be made, as by a peer that has enough connections, is not tried again for a
// while.
const (
	stripeStreams = 4
	stripePause   = time.Second // between two dials for more
	stripeRetry   = time.Minute // after one that failed
	stripeWait    = 20 * time.Millisecond
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

// spread returns m, in which a place is reserved beside others that had better been alone, or has the
// place in a session that is less loaded.
func (c *Client) spread(ctx context.Context, m *member, newerThan uint64) *member {
	c.mu.Lock()
	stripe := c.stripeLocked(ctx, m.pool)
	c.mu.Unlock()
	if stripe == nil {
		return m
	}
	patience := time.NewTimer(stripeWait)
	defer patience.Stop()
	select {
	case <-stripe.done:
	case <-patience.C:
		return m
	case <-ctx.Done():
		return m
	}
	c.mu.Lock()
	better, _ := m.pool.reserveLocked(newerThan, c.cfg.MaxStreamsPerConn)
	c.mu.Unlock()
	if better == nil {
		return m
	}
	m.session.Release()
	c.release(m)
	return better
}

// stripeLocked returns the dial for one more session, and nil where there is none. ctx lends it its
// values.
func (c *Client) stripeLocked(ctx context.Context, p *pool) *dial {
	for _, d := range p.dials {
		if d.spare {
			return d
		}
	}
	now := time.Now()
	if now.Before(p.nextStripe) || p.stripesLocked() >= c.cfg.Stripes {
		return nil
	}
	p.nextStripe = now.Add(stripePause)
	return c.startDialLocked(context.WithoutCancel(ctx), p, true)
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
