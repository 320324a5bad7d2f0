// Package paths judges the ways to peers by what TCP sees of them, to say where HTTP/3 carries
// tunnels better than HTTP/2.
//
// All streams of a TCP connection wait while one segment is sent again: each segment waits
// loss × round trip on average for what another lost. QUIC spares that to all streams but the
// one that lost something, and takes more CPU time for each packet. The former is held against
// the latter. What is lost while very much arrives does not count: what fills a line makes it lose
// packets, other losses would not let that much arrive, and CPU time is what it wants.
//
// Each end sees only what is lost of what it sends, so the one that answers tells the other
// (Quality.String), when it is bad.
package paths

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

const (
	// Dear is how long a segment has to wait for others before QUIC is the better choice: about
	// what it takes more CPU time for a packet, both ends together.
	Dear = time.Microsecond
	// fast is how many bytes a second arrive, while there is something to send, on a way that its
	// losses do not hold up.
	fast = 10_000_000
	// minSegments and minLost are what a judgement needs.
	minSegments, minLost = 1000, 2
	// memory is how many segments count: of more, older ones count half.
	memory = 50_000
	// pause is between two looks at a connection.
	pause = time.Second
	// minHold is how long a way is taken for bad, the double each time that it was so again.
	minHold, maxHold = 5 * time.Minute, time.Hour
	// maxWatched bounds the connections to a peer that are looked at, maxPeers the peers.
	maxWatched, maxPeers = 8, 4096
)

// Quality is what is known of one direction of a way. The zero value is that nothing is.
type Quality struct {
	Segments uint64 // with data, that were sent
	Lost     uint64 // of them
	RTT      time.Duration
}

// Loss is the share that was lost, 0 to 1.
func (q Quality) Loss() float64 {
	if q.Segments == 0 {
		return 0
	}
	return float64(q.Lost) / float64(q.Segments)
}

// Blocking is how long a segment waits on average for what another lost.
func (q Quality) Blocking() time.Duration { return time.Duration(q.Loss() * float64(q.RTT)) }

// Bad reports whether HTTP/3 had better take the way, as far as is known.
func (q Quality) Bad() bool {
	return q.Segments >= minSegments && q.Lost >= minLost && q.Blocking() >= Dear
}

// String is q in the form that Parse reads, as in "lost=12, sent=4312, rtt=23ms".
func (q Quality) String() string {
	return fmt.Sprintf("lost=%d, sent=%d, rtt=%v", q.Lost, q.Segments, q.RTT.Round(10*time.Microsecond))
}

// Parse reads what String wrote.
func Parse(text string) (Quality, error) {
	var q Quality
	var rtt string
	if _, err := fmt.Sscanf(text, "lost=%d, sent=%d, rtt=%s", &q.Lost, &q.Segments, &rtt); err != nil {
		return Quality{}, fmt.Errorf("quality of a path %.64q: %w", text, err)
	}
	var err error
	if q.RTT, err = time.ParseDuration(rtt); err != nil {
		return Quality{}, fmt.Errorf("quality of a path %.64q: %w", text, err)
	}
	if q.Lost > q.Segments || q.Segments > math.MaxUint32 || q.RTT < 0 || q.RTT > time.Minute {
		return Quality{}, fmt.Errorf("quality of a path %.64q is none", text)
	}
	return q, nil
}

// Judge knows the ways to peers. The zero value knows none. It is safe for concurrent use.
type Judge struct {
	mu    sync.Mutex
	peers map[netip.Addr]*peer
}

type peer struct {
	watched []*watched
	ours    Quality // of what we send
	theirs  Quality // of what the peer says that it sends

	bad  Quality // why the way was taken for bad
	till time.Time
	hold time.Duration // of the next time
}

// watched is a connection that the way is known by.
type watched struct {
	conn   syscall.Conn
	looked time.Time
	seen   counts
}

// counts are those of a connection since its beginning.
type counts struct {
	segments, lost uint64
	bytes          uint64        // that arrived
	busy           time.Duration // while something was under way
}

// fast reports whether so much arrived since before that losses did not hold it up.
func (c counts) fast(before counts) bool {
	return float64(c.bytes-before.bytes) >= fast*(c.busy-before.busy).Seconds() && c.busy > before.busy
}

// Watch has the connection to addr tell of the way, until it closes or there are newer ones.
func (j *Judge) Watch(addr netip.Addr, conn syscall.Conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.peerLocked(addr)
	if slices.ContainsFunc(p.watched, func(w *watched) bool { return w.conn == conn }) {
		return
	}
	if len(p.watched) >= maxWatched {
		p.watched = slices.Delete(p.watched, 0, 1)
	}
	p.watched = append(p.watched, &watched{conn: conn})
}

func (j *Judge) peerLocked(addr netip.Addr) *peer {
	p := j.peers[addr]
	if p == nil {
		if j.peers == nil || len(j.peers) >= maxPeers {
			j.peers = make(map[netip.Addr]*peer)
		}
		p = &peer{hold: minHold}
		j.peers[addr] = p
	}
	return p
}

// Hear takes what the peer says of what it sends.
func (j *Judge) Hear(addr netip.Addr, q Quality) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.peerLocked(addr).theirs = q
}

// Ours is the quality of what we send to addr.
func (j *Judge) Ours(addr netip.Addr) Quality {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.peers[addr]
	if p == nil {
		return Quality{}
	}
	p.look(time.Now())
	return p.ours
}

// Bad reports whether HTTP/3 had better take the way to addr, and by what that is known: the worse
// of both directions. What was found to be bad stays so for a while, and is found out anew then.
func (j *Judge) Bad(addr netip.Addr) (bool, Quality) {
	now := time.Now()
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.peers[addr]
	if p == nil {
		return false, Quality{}
	}
	if now.Before(p.till) {
		return true, p.bad
	}
	p.look(now)
	worse := p.ours
	if p.theirs.Bad() && p.theirs.Blocking() > p.ours.Blocking() || p.ours.Segments < minSegments {
		worse = p.theirs
	}
	if !worse.Bad() {
		return false, worse
	}
	p.bad, p.till = worse, now.Add(p.hold)
	p.hold = min(2*p.hold, maxHold)
	p.watched, p.ours, p.theirs = nil, Quality{}, Quality{}
	return true, worse
}

// look adds what the connections have seen since it looked last.
func (p *peer) look(now time.Time) {
	p.watched = slices.DeleteFunc(p.watched, func(w *watched) bool {
		if now.Sub(w.looked) < pause {
			return false
		}
		seen, rtt, ok := info(w.conn)
		if !ok {
			return true
		}
		seen.lost = max(seen.lost, w.seen.lost)
		p.ours.Segments += seen.segments - w.seen.segments
		if !seen.fast(w.seen) {
			p.ours.Lost += seen.lost - w.seen.lost
		}
		p.ours.RTT = rtt
		w.looked, w.seen = now, seen
		return false
	})
	if p.ours.Segments > memory {
		p.ours.Segments /= 2
		p.ours.Lost /= 2
	}
}
