package h3

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// maxWrite is the longest DATA frame that is sent, smallWrite the longest one that is copied to
// its header, to leave in one piece.
const (
	maxWrite   = 128 << 10
	smallWrite = 1200
)

// stream is a hbone.Stream. Read and a Sink's pump are one reader; mu guards what follows it.
type stream struct {
	*exchange
	rmu     sync.Mutex // held by Read
	scratch []byte     // of small writes; guarded by wmu

	gone chan struct{} // closed by Close

	mu      sync.Mutex
	sink    hbone.Sink
	waiting []byte        // what the sink had no room for
	resumed chan struct{} // tells the pump that it has taken it
	closed  bool
	recvEnd bool
	sentEnd bool
}

func newStream(x *exchange) *stream {
	return &stream{exchange: x, gone: make(chan struct{}), resumed: make(chan struct{}, 1)}
}

// Read copies what arrived to p.
func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	waiting := s.waiting
	s.mu.Unlock()
	if len(waiting) == 0 {
		var err error
		if waiting, err = s.data(); err != nil {
			return 0, s.ended(err)
		}
	}
	n := copy(p, waiting)
	s.mu.Lock()
	s.waiting = waiting[n:]
	s.mu.Unlock()
	return n, nil
}

// ended notes the end of what is received, and says how. Once we gave the stream up, quic-go's Peek
// may take the reset that the peer answers with for a clean end.
func (s *stream) ended(err error) error {
	s.in.release()
	if isEnd(err) && !s.isClosed() {
		s.mu.Lock()
		s.recvEnd = true
		both := s.sentEnd
		s.mu.Unlock()
		if both {
			s.leave()
		}
		return io.EOF
	}
	err = s.judge(err)
	if s.isClosed() {
		return net.ErrClosed
	}
	s.leave()
	return err
}

func (s *stream) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *stream) hasSink() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sink != nil
}

// Write sends p as the peer's windows allow.
func (s *stream) Write(p []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	n := 0
	for {
		if err := s.writable(); err != nil {
			return n, err
		}
		part := p[n:min(n+maxWrite, len(p))]
		if len(part) == 0 {
			return n, nil
		}
		m, err := s.writeFrame(part)
		n += m
		s.conn.moved.Add(uint64(m))
		if err != nil {
			if s.isClosed() {
				return n, net.ErrClosed
			}
			return n, s.conn.fault(err)
		}
	}
}

// writable says why nothing can be written.
func (s *stream) writable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return net.ErrClosed
	case s.sentEnd:
		return errWriteEnd
	}
	return nil
}

// writeFrame sends p as one DATA frame, and returns how much of it was sent.
func (s *stream) writeFrame(p []byte) (int, error) {
	s.scratch = appendDataHeader(s.scratch[:0], len(p))
	if len(p) > smallWrite {
		if _, err := s.q.Write(s.scratch); err != nil {
			return 0, err
		}
		return s.q.Write(p)
	}
	header := len(s.scratch)
	s.scratch = append(s.scratch, p...)
	n, err := s.q.Write(s.scratch)
	return max(0, n-header), err
}

// Offer takes nothing: quic-go packs what is written at the same time by itself, but may wait.
func (s *stream) Offer([]byte) bool { return false }

// OfferEnd does nothing, as Offer.
func (s *stream) OfferEnd() bool { return false }

// Push has nothing to send.
func (s *stream) Push() {}

// CloseWrite sends the stream's end. It waits for a Write that goes on.
func (s *stream) CloseWrite() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return net.ErrClosed
	case s.sentEnd:
		s.mu.Unlock()
		return nil
	}
	s.sentEnd = true
	both := s.recvEnd
	s.mu.Unlock()
	if err := s.q.Close(); err != nil {
		return s.conn.fault(err)
	}
	if both {
		s.leave()
	}
	return nil
}

// Close releases the stream. A direction that has ended cleanly is left to QUIC to deliver.
func (s *stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	close(s.gone)
	if !s.sentEnd {
		s.q.CancelWrite(quic.StreamErrorCode(codeCancelled))
	}
	if !s.recvEnd {
		s.q.CancelRead(quic.StreamErrorCode(codeCancelled))
	}
	s.leave()
	return nil
}

// Deliver starts the pump, since a quic.Stream can only be waited for by reading it.
func (s *stream) Deliver(sink hbone.Sink) {
	s.mu.Lock()
	s.sink = sink
	s.mu.Unlock()
	s.conn.spawn(s.pump)
}

// pump hands what arrives to the sink.
func (s *stream) pump() {
	for {
		p, err := s.nextForSink()
		if err != nil {
			s.tellEnd(s.ended(err))
			return
		}
		for len(p) > 0 && !s.isClosed() {
			n := s.sink.Take(p, false)
			if n == len(p) {
				break
			}
			s.mu.Lock()
			s.waiting = p[n:]
			s.mu.Unlock()
			s.window.stopped()
			s.sink.Full()
			if err := s.awaitRoom(); err != nil {
				s.abandon()
				s.sink.End(err)
				return
			}
			p = nil
		}
		if s.abandoned() {
			return
		}
	}
}

// awaitRoom waits for Resume, or Close. An error is a connection lost meanwhile, or a reset as far
// as our own direction tells of it.
func (s *stream) awaitRoom() error {
	for broken := s.q.Context(); ; broken = s.conn.quic.Context() {
		select {
		case <-s.resumed:
			return nil
		case <-s.gone:
			return nil
		case <-broken.Done():
			if s.isClosed() {
				return nil
			}
			if !errors.Is(context.Cause(broken), quic.ErrStreamClosed) { // by CloseWrite
				return s.conn.fault(context.Cause(broken))
			}
		}
	}
}

// abandoned reports whether the stream was closed.
func (s *stream) abandoned() bool {
	closed := s.isClosed()
	if closed {
		s.abandon()
	}
	return closed
}

// abandon ends reading. What waits may be in the hands of a Resume that runs, and stays its own.
func (s *stream) abandon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) > 0 {
		s.in.buf = nil
	}
	s.in.release()
}

// nextForSink is data, behind what Read has left.
func (s *stream) nextForSink() ([]byte, error) {
	s.mu.Lock()
	p := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	if len(p) > 0 {
		return p, nil
	}
	return s.data()
}

// tellEnd tells the sink. After a clean end it is told of a reset while it writes.
func (s *stream) tellEnd(err error) {
	switch {
	case s.isClosed():
	case isEnd(err):
		s.sink.End(nil)
		<-s.q.Context().Done() // written to the end, reset, or lost
		if cause := s.writeCause(); cause != nil && !s.isClosed() {
			s.sink.End(cause)
		}
	default:
		s.sink.End(err)
	}
}

// writeCause is why our direction ended, nil for its clean end.
func (s *stream) writeCause() error {
	if err := context.Cause(s.q.Context()); !errors.Is(err, quic.ErrStreamClosed) {
		return s.conn.fault(err)
	}
	return nil
}

// Resume hands over what waits.
func (s *stream) Resume() bool {
	s.mu.Lock()
	p := s.waiting
	s.mu.Unlock()
	if len(p) > 0 {
		n := s.sink.Take(p, false)
		s.mu.Lock()
		s.waiting = p[n:]
		s.mu.Unlock()
		if n < len(p) {
			return false
		}
	}
	select {
	case s.resumed <- struct{}{}:
	default:
	}
	return true
}
