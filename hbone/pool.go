package hbone

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"
)

// pool is a key's sessions, the dials for more, and those who wait for one. All of it is
// guarded by Client.mu; it exists while any of the three does.
//
//	acquire ─► member with room ──────────────► Open
//	   └─────► waiter ─► dial ─► member ─► grant ─┘
//	                      release (room again) ─┘
type pool struct {
	key     Key
	members []*member
	dials   []*dial
	waiters []*waiter

	nextStripe time.Time // before it no session is dialed for others to be less busy
}

// member is a session in the pool.
type member struct {
	pool    *pool
	session Session
	conn    *Conn
	seq     uint64
	used    atomic.Bool // a stream was asked of it before

	streams int  // reserved, opening or open
	retired bool // takes no more streams
	dead    bool // its session has ended
	idle    *time.Timer
}

// dial is a session in the making. It may serve as many waiters as a session has places.
type dial struct {
	cancel  context.CancelFunc
	done    chan struct{} // closed when it is over
	retired bool
	spare   bool // a stripe: nobody depends on it
}

// waiter is an Open without a session.
type waiter struct {
	newerThan uint64        // it takes only sessions made after this one
	done      chan struct{} // closed when member or err is set
	member    *member
	load      int // that member had
	err       error
}

var errNobodyWaits = errors.New("nobody waits for the session any more")

// acquire returns a session of key with a place reserved, made after newerThan, and the
// sequence number of the newest session at that time.
func (c *Client) acquire(ctx context.Context, key Key, newerThan uint64) (*member, uint64, error) {
	m, load, newest, err := c.anyOf(ctx, key, newerThan)
	if err != nil {
		return nil, 0, err
	}
	if load > 0 {
		m = c.spread(ctx, m, newerThan)
	}
	return m, max(newest, m.seq), nil
}

// anyOf is acquire before streams are spread over stripes; it returns the load of the session as well.
func (c *Client) anyOf(ctx context.Context, key Key, newerThan uint64) (m *member, load int, newest uint64, err error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, 0, err
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, 0, 0, ErrClosed
	}
	p := c.pools[key]
	if p == nil {
		p = &pool{key: key}
		c.pools[key] = p
	}
	if m, load := p.reserveLocked(newerThan, c.cfg.MaxStreamsPerConn); m != nil {
		seq := c.seq
		c.mu.Unlock()
		return m, load, seq, nil
	}
	w := &waiter{newerThan: newerThan, done: make(chan struct{})}
	p.waiters = append(p.waiters, w)
	// A dial outlives the ctx of the Open that caused it, since others wait for it too.
	c.dialLocked(context.WithoutCancel(ctx), p)
	c.mu.Unlock()

	select {
	case <-w.done:
	case <-ctx.Done():
		c.abandon(p, w)
		<-w.done
		if w.member != nil { // granted in the same moment
			w.member.session.Release()
			c.release(w.member)
		}
		return nil, 0, 0, waitError(ctx, key)
	}
	if w.err != nil {
		return nil, 0, 0, w.err
	}
	return w.member, w.load, newerThan, nil
}

// waitError is for an Open whose time ended before there was a session.
func waitError(ctx context.Context, key Key) error {
	return &DialError{Remote: key.Remote, Err: ctx.Err()}
}

// reserveLocked takes a place in the least loaded session that has one, and returns the load
// that it had.
func (p *pool) reserveLocked(newerThan uint64, limit int) (best *member, least int) {
	for _, m := range p.members {
		if m.retired || m.seq <= newerThan || m.streams >= limit || m.session.Capacity() == 0 {
			continue
		}
		if load := m.load(); best == nil || load < least {
			best, least = m, load
		}
	}
	if best == nil || !best.session.Reserve() {
		return nil, 0
	}
	best.streams++
	if best.idle != nil {
		best.idle.Stop()
		best.idle = nil
	}
	return best, least
}

// dialLocked starts as many dials as the waiters need; base lends them its values.
func (c *Client) dialLocked(base context.Context, p *pool) {
	for len(p.waiters) > len(p.dials)*c.cfg.MaxStreamsPerConn {
		c.startDialLocked(base, p, false)
	}
}

// startDialLocked starts one; why a spare one failed is told to nobody.
func (c *Client) startDialLocked(base context.Context, p *pool, spare bool) *dial {
	ctx, cancel := context.WithCancel(base)
	d := &dial{cancel: cancel, done: make(chan struct{}), spare: spare}
	p.dials = append(p.dials, d)
	c.stats.Dials++
	c.work.Go(func() {
		defer cancel()
		defer close(d.done)
		session, conn, err := c.connect(ctx, p.key)
		c.mu.Lock()
		defer c.mu.Unlock()
		p.dials = remove(p.dials, d)
		switch {
		case err == nil:
			d.retired = d.retired || ctx.Err() != nil
			c.joinLocked(base, p, d, session, conn)
		case spare && ctx.Err() == nil:
			p.nextStripe = time.Now().Add(stripeRetry)
			c.cfg.Log.Debug("connect once more to a busy peer", "remote", p.key.Remote, "error", err)
		case ctx.Err() == nil:
			p.failLocked(c.cfg.MaxStreamsPerConn, err)
		default: // cancelled: who waits now came later, and gets a dial of their own
		}
		c.tidyLocked(base, p)
	})
	return d
}

// joinLocked puts the session that a dial made into the pool, until it ends.
func (c *Client) joinLocked(base context.Context, p *pool, d *dial, session Session, conn *Conn) {
	c.seq++
	m := &member{pool: p, session: session, conn: conn, seq: c.seq, retired: d.retired || c.closed}
	p.members = append(p.members, m)
	c.work.Go(func() {
		<-session.Done()
		c.mu.Lock()
		defer c.mu.Unlock()
		m.dead = true
		if m.idle != nil {
			m.idle.Stop()
		}
		p.members = remove(p.members, m)
		c.tidyLocked(base, p)
	})
	p.grantLocked(c.cfg.MaxStreamsPerConn)
	if m.streams == 0 && !m.retired {
		// It died at once, as one does whose peer rejects our certificate. Its waiters
		// learn why from Open, which counts their attempts; dialing on would never end.
		p.handLocked(m, c.cfg.MaxStreamsPerConn)
	}
	c.idleLocked(m)
}

// handLocked gives m to the n oldest waiters without asking it.
func (p *pool) handLocked(m *member, n int) {
	n = min(n, len(p.waiters))
	for _, w := range p.waiters[:n] {
		m.streams++
		w.member = m
		close(w.done)
	}
	p.waiters = slices.Delete(p.waiters, 0, n)
}

// grantLocked gives places to waiters, the oldest first.
func (p *pool) grantLocked(limit int) {
	left := p.waiters[:0]
	for _, w := range p.waiters {
		if w.member, w.load = p.reserveLocked(w.newerThan, limit); w.member == nil {
			left = append(left, w)
			continue
		}
		close(w.done)
	}
	clear(p.waiters[len(left):])
	p.waiters = left
}

// failLocked fails the n oldest waiters: those that a dial would have served.
func (p *pool) failLocked(n int, err error) {
	n = min(n, len(p.waiters))
	for _, w := range p.waiters[:n] {
		w.err = err
		close(w.done)
	}
	p.waiters = slices.Delete(p.waiters, 0, n)
}

func (p *pool) cancelDialsLocked(stripes bool) {
	for _, d := range p.dials {
		if stripes || !d.spare {
			d.cancel()
		}
	}
}

// tidyLocked starts the dials that waiters still need, and forgets a pool of nothing.
func (c *Client) tidyLocked(base context.Context, p *pool) {
	if c.closed {
		p.failLocked(len(p.waiters), ErrClosed)
	}
	c.dialLocked(base, p)
	if len(p.members) == 0 && len(p.dials) == 0 && len(p.waiters) == 0 && c.pools[p.key] == p {
		delete(c.pools, p.key)
	}
}

// abandon takes w out of the queue, unless it was served in the same moment.
func (c *Client) abandon(p *pool, w *waiter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-w.done:
		return
	default:
	}
	p.waiters = remove(p.waiters, w)
	w.err = errNobodyWaits
	close(w.done)
	if len(p.waiters) == 0 {
		p.cancelDialsLocked(false)
	}
}

// release gives a stream's place back.
func (c *Client) release(m *member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m.streams--
	m.pool.grantLocked(c.cfg.MaxStreamsPerConn)
	c.idleLocked(m)
}

// idleLocked starts the clock of a session without streams.
func (c *Client) idleLocked(m *member) {
	if m.streams > 0 || m.idle != nil || m.dead {
		return
	}
	wait := c.cfg.IdleTimeout
	if m.retired {
		wait = 0
	}
	m.idle = time.AfterFunc(wait, func() {
		c.mu.Lock()
		idle := m.streams == 0
		if idle {
			m.retired = true
			c.stats.IdleClosed++
		}
		c.mu.Unlock()
		if !idle {
			return
		}
		if err := m.session.Retire(); err != nil {
			c.cfg.Log.Debug("close idle session", "remote", m.pool.key.Remote, "error", err)
		}
	})
}
