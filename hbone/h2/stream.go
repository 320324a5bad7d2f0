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
	window     window // of what we receive
	sendWindow int64
	blocked    bool // it is in conn.blocked

	recvEnd, sentEnd bool
	closed           bool
	err              error
	reset            chan struct{} // closed with err or closed set; nil until asked for

	// A client's: settled is closed when response or err is there, and tell called.
	settled  chan struct{}
	tell     func() // nil when nobody asked
	early    bool   // DATA was sent before
	response *hbone.Response
	status   int

	// A server's.
	answered bool
	cancel   context.CancelFunc
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
	defer s.conn.mu.Unlock()
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
		switch m := min(int64(n), s.sendWindow, c.sendWindow, int64(c.peer.maxFrame), maxWriteFrame); {
		case m > 0:
			s.sendWindow -= m
			c.sendWindow -= m
			c.moved += uint64(m)
			return int(m), nil
		case s.sendWindow > 0 && !s.blocked:
			s.blocked = true
			c.blocked = append(c.blocked, s)
		}
		s.writable.Wait()
	}
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

// CloseWrite sends END_STREAM.
func (s *stream) CloseWrite() error {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.sentEnd && !s.closed {
		return nil
	}
	if err := s.writeErrLocked(); err != nil {
		return err
	}
	s.sentEnd = true
	c.pushLocked(control{kind: controlEnd, stream: s.id})
	s.writable.Broadcast()
	if s.recvEnd {
		c.forgetLocked(s)
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
	defer s.conn.mu.Unlock()
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

// failLocked ends a stream with err; what arrived before stays readable.
func (s *stream) failLocked(err error) {
	if s.err == nil {
		s.err = err
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
	s.tellResetLocked()
	if s.cancel != nil {
		s.cancel()
	}
	s.conn.forgetLocked(s)
}

// Reset returns a channel that is closed when the stream has ended other than cleanly.
func (s *stream) Reset() <-chan struct{} {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	if s.reset == nil {
		s.reset = make(chan struct{})
		if s.err != nil || s.closed {
			close(s.reset)
		}
	}
	return s.reset
}

func (s *stream) tellResetLocked() {
	if s.reset == nil {
		return
	}
	select {
	case <-s.reset:
	default:
		close(s.reset)
	}
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
		if s.tell != nil {
			s.tell()
		}
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
