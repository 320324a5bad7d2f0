package h2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
)

// stream is one HBONE stream, a hbone.Stream once it is answered. All but the first three
// fields are guarded by conn.mu.
//
//	        sentEnd ─────┐
//	open ─┤              ├─► ended cleanly: the connection forgets it, its bytes stay
//	        recvEnd ─────┘   readable
//	   └─► err (reset by either side, connection lost)
//	   └─► closed (by its user; RST_STREAM unless it had ended)
type stream struct {
	conn *conn
	id   uint32

	rmu     sync.Mutex // held by Read
	current *chunk     // being read, out of in; guarded by rmu
	done    int        // the size of the last, all of it read; guarded by rmu

	readable, writable sync.Cond

	in         buffer
	sink       hbone.Sink // who takes what arrives, in place of Read; nil until Deliver
	full       bool       // the sink had no room: what arrives goes to in until Resume
	window     window     // of what we receive
	sendWindow int64
	blocked    bool // it is in conn.blocked

	recvEnd, sentEnd bool
	closed           bool
	err              error

	answered bool // with a 200; a server's with any status

	// A client's, until Answer: settled is closed when response or err is there.
	settled  chan struct{}
	early    bool // DATA was sent before
	response *hbone.Response
	status   int

	cancel context.CancelFunc // of a server's handler
}

var errWriteAfterEnd = errors.New("write on a stream after CloseWrite")

func (c *conn) newStreamLocked(id uint32) *stream {
	s := &stream{conn: c, id: id, sendWindow: c.peer.initialWindow}
	s.readable.L, s.writable.L = &c.mu, &c.mu
	c.streams[id] = s
	return s
}

// Read copies what arrived to p.
func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	n := 0
	for n < len(p) {
		if s.current == nil {
			var err error
			if s.current, err = s.next(n == 0); err != nil {
				return n, err
			}
			if s.current == nil {
				break
			}
		}
		c := s.current
		m := copy(p[n:], c.data[c.r:c.w])
		n += m
		if c.r += m; c.r == c.w {
			s.done += c.w
			putChunk(c)
			s.current = nil
		}
	}
	return n, nil
}

// next takes a chunk that arrived. If none did it waits, or returns nil. The peer may send
// again as much as the last one held.
func (s *stream) next(wait bool) (*chunk, error) {
	s.conn.mu.Lock()
	defer s.conn.release()
	s.consumedLocked(s.done)
	s.done = 0
	for {
		switch {
		case s.closed && wait:
			return nil, net.ErrClosed
		case s.closed:
			return nil, nil
		case s.in.size > 0:
			return s.in.pop(), nil
		case !wait:
			return nil, nil
		case s.recvEnd:
			return nil, io.EOF
		case s.err != nil:
			return nil, s.err
		}
		s.readable.Wait()
	}
}

// Write sends p as the peer's window allows.
func (s *stream) Write(p []byte) (int, error) {
	n := 0
	for {
		m, err := s.takeWindow(len(p) - n)
		if err != nil || m == 0 {
			return n, err
		}
		if err := s.conn.writeData(s, p[n:n+m]); err != nil {
			return n, err
		}
		n += m
	}
}

// Offer queues a copy of p for whoever writes next.
func (s *stream) Offer(p []byte) bool {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	size := frameHeader + len(p)
	if s.writeErrLocked() != nil || c.offered+size > maxOffered ||
		int64(len(p)) > min(s.sendWindow, c.sendWindow, initialFrame) {
		return false
	}
	s.spendLocked(int64(len(p)))
	c.offered += size
	ch := getChunk(len(p))
	ch.w = copy(ch.data, p)
	c.pushLocked(control{kind: controlData, stream: s.id, data: ch.data[:ch.w], chunk: ch})
	return true
}

// Push writes what was offered, unless somebody writes: then they will.
func (s *stream) Push() { s.conn.kick() }

// takeWindow waits for window and takes at most n of it; 0 only if n is.
func (s *stream) takeWindow(n int) (int, error) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if err := s.writeErrLocked(); err != nil {
			return 0, err
		}
		if n == 0 {
			return 0, nil
		}
		switch m := min(int64(n), s.sendWindow, c.sendWindow, maxWrite); {
		case m > 0:
			s.spendLocked(m)
			return int(m), nil
		case s.sendWindow > 0 && !s.blocked:
			s.blocked = true
			c.blocked = append(c.blocked, s)
		}
		s.writable.Wait()
	}
}

// spendLocked takes n bytes of both windows.
func (s *stream) spendLocked(n int64) {
	s.sendWindow -= n
	s.conn.sendWindow -= n
	s.conn.moved += uint64(n)
}

// writeErrLocked says why nothing can be written.
func (s *stream) writeErrLocked() error {
	switch {
	case s.closed:
		return net.ErrClosed
	case s.err != nil:
		return s.err
	case s.sentEnd:
		return errWriteAfterEnd
	default:
		return nil
	}
}

// CloseWrite sends END_STREAM. A client's that ends the stream has nobody wait for it who has more to
// say: it may go with what is sent next.
func (s *stream) CloseWrite() error {
	s.conn.mu.Lock()
	defer s.conn.release()
	return s.closeWriteLocked()
}

// OfferEnd queues END_STREAM for whoever writes next.
func (s *stream) OfferEnd() bool {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return s.closeWriteLocked() == nil
}

func (s *stream) closeWriteLocked() error {
	c := s.conn
	if s.sentEnd && !s.closed {
		return nil
	}
	if err := s.writeErrLocked(); err != nil {
		return err
	}
	mayWait := s.recvEnd && c.client != nil && !c.draining && !c.pending.Load()
	s.sentEnd = true
	c.pushEndLocked(s.id)
	s.writable.Broadcast()
	if s.recvEnd {
		c.forgetLocked(s)
	}
	if mayWait {
		c.kickSoonLocked()
	}
	return nil
}

// Close releases the stream.
func (s *stream) Close() error {
	if s.rmu.TryLock() { // whoever is in Read keeps its chunk until the stream is garbage
		if s.current != nil {
			putChunk(s.current)
			s.current = nil
		}
		s.rmu.Unlock()
	}
	s.conn.mu.Lock()
	defer s.conn.release()
	s.closeLocked(http2.ErrCodeCancel)
	return nil
}

func (s *stream) closeLocked(code http2.ErrCode) {
	if s.closed {
		return
	}
	if s.err == nil && !(s.recvEnd && s.sentEnd) {
		s.conn.pushResetLocked(s, code, false)
	}
	s.closed = true
	s.in.discard()
	s.window.unread = 0
	s.endLocked()
}

// failLocked ends a stream with err; what arrived before stays readable. A sink is told from
// elsewhere: it may call back, and we hold the lock.
func (s *stream) failLocked(err error) {
	if s.err == nil {
		s.err = err
		if s.sink != nil && !s.closed {
			s.conn.background.Go(func() { s.sink.End(err) })
		}
	}
	s.endLocked()
}

// resetLocked ends a stream on which the peer broke the protocol.
func (s *stream) resetLocked(code http2.ErrCode) {
	s.conn.pushResetLocked(s, code, true)
	s.failLocked(&hbone.ResetError{Code: uint32(code), Name: code.String()})
}

func (s *stream) endLocked() {
	s.closeWindowLocked()
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.settleLocked()
	if s.cancel != nil {
		s.cancel()
	}
	s.conn.forgetLocked(s)
}

// settleLocked tells a client's Open that there is an outcome.
func (s *stream) settleLocked() {
	if s.settled == nil {
		return
	}
	select {
	case <-s.settled:
	default:
		close(s.settled)
	}
}

// Deliver hands over what has arrived, and then what arrives.
func (s *stream) Deliver(sink hbone.Sink) {
	s.conn.mu.Lock()
	s.sink, s.full = sink, true
	err := s.err
	s.conn.mu.Unlock()
	switch {
	case !s.Resume():
		sink.Full()
	case err != nil:
		sink.End(err)
	}
}

// Resume hands over what waits. An end that came meanwhile is behind it.
func (s *stream) Resume() bool {
	c := s.conn
	c.mu.Lock()
	defer c.release()
	for s.in.size > 0 && !s.closed {
		ch := s.in.pop()
		last := s.recvEnd && s.in.size == 0
		c.mu.Unlock()
		n := s.sink.Take(ch.data[ch.r:ch.w], last)
		c.mu.Lock()
		s.consumedLocked(n)
		if ch.r += n; ch.r < ch.w && !s.closed {
			s.in.unpop(ch)
			return false
		}
		putChunk(ch)
	}
	s.full = false
	if s.err == nil && s.recvEnd && !s.closed {
		c.mu.Unlock()
		s.sink.End(nil)
		c.mu.Lock()
	}
	return true
}

// arrived hands p on, unless the stream's user has closed it in the meantime; last says that the end is
// right behind. It is readLoop's, as is complete.
func (s *stream) arrived(p []byte, last bool) {
	c := s.conn
	c.mu.Lock()
	direct := s.sink != nil && !s.full && !s.closed
	if direct {
		c.mu.Unlock()
		n := s.sink.Take(p, last)
		p = p[n:]
		c.mu.Lock()
		s.consumedLocked(n)
		s.full = len(p) > 0
	}
	s.queueLocked(p)
	c.mu.Unlock()
	if direct && len(p) > 0 {
		s.sink.Full()
	}
}

func (s *stream) queueLocked(p []byte) {
	if s.closed {
		return
	}
	for len(p) > 0 {
		ch := getChunk(min(len(p), s.window.chunk))
		ch.w = copy(ch.data, p)
		p = p[ch.w:]
		s.in.push(ch, s.window.spare)
	}
	s.readable.Signal()
}

// complete is called behind a DATA frame, of which n bytes were no payload.
func (s *stream) complete(n int, end bool) {
	c := s.conn
	c.mu.Lock()
	s.consumedLocked(n)
	tell := false
	if end && s.err == nil && !s.closed {
		s.endedLocked()
		tell = s.sink != nil && !s.full
	}
	c.mu.Unlock()
	if tell {
		s.sink.End(nil)
	}
}

// endedLocked notes the peer's END_STREAM.
func (s *stream) endedLocked() {
	s.recvEnd = true
	s.closeWindowLocked()
	s.readable.Broadcast()
	if s.sentEnd {
		s.conn.forgetLocked(s)
	}
}

// refused is the error of a stream that the peer did not process.
func refused(cause error) error { return fmt.Errorf("%w: %w", hbone.ErrRefused, cause) }
