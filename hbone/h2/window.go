package h2

import (
	"time"

	"golang.org/x/net/http2"
)

// What a peer may send is reserved from the budget before it is told so, because HTTP/2
// cannot take a window back. A stream starts with a small window. It grows while the window
// is what holds it back, and no longer when nobody reads it:
//
//	open ─► floorWindow, which SETTINGS announces ─► startWindow, with the 200 or the CONNECT
//	   ─► ×4 … StreamWindow       while an eighth of the window is read within a PING's round trip,
//	                              or within leastProbe where that is longer
//	   ─► startWindow             when it was idle: given back with the bytes that come next
//	   ─► what is unread ─► 0     after the end
//
// The connection's window bounds nothing: bytes count for it until they have arrived, so that
// streams that nobody reads leave it to the others.
const (
	floorWindow = 4 << 10
	startWindow = 64 << 10
	shortWindow = 16 << 10 // where there are many streams

	// StreamFloor is what a stream takes of a hbone.Budget at least, in bytes.
	StreamFloor = floorWindow + 2*smallChunk

	// A new stream's window leaves room for as many others of its kind, and growth for as
	// many streams of that size: the larger a stream, the earlier it stops.
	startSpare = 256
	growSpare  = 4

	// growShare of what is read within a probe is a window that is not what holds a stream back. To
	// be able to send as much as is read meanwhile is not enough: a stream that shares its connection is
	// read in bursts, and its peer sends whole chunks where there is room for several.
	growShare = 8

	// leastProbe is how long a probe lasts at least. Between two nodes of a rack a round trip is
	// shorter than it takes to wake either end: a window for no longer has both of them wait.
	leastProbe = time.Millisecond

	// maxPause windows at most are read before a stream that did not grow asks again.
	maxPause = 8

	// idleAfter without a byte a stream counts as idle.
	idleAfter = 10 * time.Second
)

// growPing marks the PING that measures what streams read in a round trip.
var growPing = [8]byte{'w', 'i', 'n', 'd', 'o', 'w', 's', '?'}

// window is a stream's receiving side of flow control, guarded by conn.mu.
type window struct {
	target   int // what the peer may send beyond what was read; 0 after the end
	open     int // what it may send now. Negative if it sent before it knew our SETTINGS
	unread   int // what it sent and was not read, what arrives just now included
	reserved int // of the budget

	chunk int // the largest that the stream uses
	spare int // memory that chunks may leave unused

	read    int    // in the probe
	probe   uint32 // which that was
	ask     int    // bytes until the next
	pause   int    // windows until the one after it, if the stream does not grow
	lastUse int64  // when bytes were read last, on the clock of conn.lastRead
}

// floor is the window of a new stream.
func (v *values) floor() int { return min(floorWindow, int(v.streamWindow)) }

// sized is w with another target and the chunks that suit it.
func (w window) sized(target int) window {
	w.target = target
	switch {
	case target <= floorWindow:
		w.chunk, w.spare = smallChunk, 0
	case target <= startWindow:
		w.chunk, w.spare = mediumChunk, 0
	default:
		w.chunk, w.spare = largeChunk, target/8
	}
	return w
}

// need is the memory that the stream may come to hold: beside the bytes, what its chunks
// leave unused, the last one in the queue and the one that is being read included.
func (w *window) need() int {
	if w.target == 0 && w.unread == 0 {
		return 0
	}
	return max(w.target, w.unread+max(w.open, 0)) + w.spare + 2*w.chunk
}

// reserveLocked gives a new stream the smallest window, or says that there is no memory.
func (s *stream) reserveLocked() bool {
	w := s.window.sized(s.conn.values.floor())
	w.open = w.target
	w.ask, w.pause = w.target/4, 1
	if w.reserved = w.need(); !s.conn.values.budget.Take(w.reserved) {
		s.conn.values.budget.Short()
		return false
	}
	s.window = w
	s.conn.promised += w.target
	return true
}

// startLocked raises the window when the stream is about to be used.
func (s *stream) startLocked() {
	for _, target := range []int{startWindow, shortWindow} {
		target = min(target, int(s.conn.values.streamWindow))
		if s.window.target == 0 || s.window.target >= target || s.growLocked(target, startSpare) {
			return
		}
	}
}

// growLocked raises the window to target if the budget leaves room for others.
func (s *stream) growLocked(target, others int) bool {
	c := s.conn
	if c.promised+target-s.window.target > int(c.values.connWindow) {
		return false
	}
	w := s.window.sized(target)
	need := w.need()
	if more := need - w.reserved; more > 0 {
		if !c.values.budget.Grow(more, others*need) {
			return false
		}
		w.reserved = need
	}
	// Sooner a probe would measure what the peer sent before it had heard of this.
	w.ask, w.pause = target/2, 1
	c.promised += target - s.window.target
	s.window = w
	s.creditLocked()
	return true
}

// creditLocked tells the peer what it may send beyond what it knows.
func (s *stream) creditLocked() {
	w := &s.window
	if n := w.target - w.unread - w.open; n > 0 && n >= w.target/4 {
		w.open += n
		s.conn.pushLocked(control{kind: controlWindow, stream: s.id, n: uint32(n)})
	}
}

// admitLocked charges a frame of n bytes to the window, or returns why the stream ends.
func (s *stream) admitLocked(n int) http2.ErrCode {
	w := &s.window
	w.open -= n
	w.unread += n
	if w.open >= 0 || n == 0 {
		return http2.ErrCodeNo
	}
	// Before the peer has seen our SETTINGS it may use RFC 9113's initial window.
	if s.conn.acked || w.open < s.conn.values.floor()-initialWindow {
		return http2.ErrCodeFlowControl
	}
	if more := w.need() - w.reserved; more > 0 {
		if !s.conn.values.budget.Take(more) {
			s.conn.values.budget.Short()
			return http2.ErrCodeEnhanceYourCalm
		}
		w.reserved += more
	}
	return http2.ErrCodeNo
}

// consumedLocked notes that n bytes were read, or that they came to nothing.
func (s *stream) consumedLocked(n int) {
	c, w := s.conn, &s.window
	if s.closed {
		return
	}
	if w.unread -= n; n > 0 && w.target > 0 {
		now := c.lastRead.Load()
		if w.lastUse > 0 && now-w.lastUse > int64(idleAfter) {
			s.shrinkLocked()
		}
		w.lastUse = now
		s.creditLocked()
		s.probeLocked(n)
	}
	s.giveLocked()
}

// shrinkLocked makes the window that of a new stream, though the peer keeps what it has got.
func (s *stream) shrinkLocked() {
	target := min(startWindow, s.window.target)
	s.conn.promised -= s.window.target - target
	if s.window.unread == 0 {
		s.window = s.window.sized(target)
	} else {
		s.window.target = target // its chunks are still there
	}
}

// probeLocked counts n bytes that were read, and starts a measurement when it is time.
func (s *stream) probeLocked(n int) {
	c, w := s.conn, &s.window
	if w.probe != c.probe {
		w.probe, w.read = c.probe, 0
	}
	w.read += n
	w.ask -= n
	if c.answered {
		c.probedLocked()
	}
	if w.ask > 0 || c.probing || w.target >= int(c.values.streamWindow) {
		return
	}
	w.ask, w.pause = w.pause*w.target, min(2*w.pause, maxPause)
	c.probing, c.answered, c.asked = true, false, c.lastRead.Load()
	c.probe++
	c.pushLocked(control{kind: controlPing, ping: growPing})
}

// probedLocked ends a measurement whose PING was answered, if it lasted long enough: a stream
// that read much of its window meanwhile was held back by it.
func (c *conn) probedLocked() {
	if c.answered = c.lastRead.Load()-c.asked < int64(leastProbe); c.answered {
		return // goes on with what is read next
	}
	c.probing = false
	limit := int(c.values.streamWindow)
	for _, s := range c.streams {
		w := &s.window
		if w.probe != c.probe || w.target == 0 || w.target >= limit || growShare*w.read < w.target {
			continue
		}
		if !s.growLocked(min(4*w.target, limit), growSpare) && !s.growLocked(min(2*w.target, limit), growSpare) {
			c.values.budget.Short()
		}
	}
}

// closeWindowLocked is called when nothing more can come.
func (s *stream) closeWindowLocked() {
	s.conn.promised -= s.window.target
	s.window.target, s.window.open = 0, 0
	s.giveLocked()
}

// giveLocked returns what the stream does not need any more.
func (s *stream) giveLocked() {
	if n := s.window.reserved - s.window.need(); n > 0 {
		s.window.reserved -= n
		s.conn.values.budget.Give(n)
	}
}
