package h3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/quic-go/qpack"
	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// clientState is what only a client's connection has, guarded by conn.mu.
type clientState struct {
	opened   map[quic.StreamID]*reply
	reserved int
	draining bool      // no more streams: GOAWAY was received, or it retires
	told     bool      // we have sent ours
	fullAt   time.Time // when the peer allowed no more streams
	load     hbone.Load
}

// fullPause is how long a session that the peer allows no more streams counts as full. quic-go
// does not tell when it allows more.
const fullPause = 50 * time.Millisecond

// Connect makes a session with key.Remote: a QUIC connection from the endpoint's socket.
func (e *Endpoint) Connect(ctx context.Context, key hbone.Key, cfg *tls.Config) (hbone.Session, *hbone.Conn, error) {
	memory, err := reserve(e.cfg.Budget, connReserved)
	if err != nil {
		return nil, nil, err
	}
	cfg = cfg.Clone()
	cfg.NextProtos = []string{alpn}
	cfg.MinVersion = tls.VersionTLS13 // RFC 9001 section 4.2
	config := e.config()
	config.MaxIncomingStreams = -1
	if deadline, ok := ctx.Deadline(); ok {
		config.HandshakeIdleTimeout = time.Until(deadline)
	}
	q, err := e.transport.Dial(ctx, net.UDPAddrFromAddrPort(key.Remote), cfg, config)
	if err != nil {
		memory.give()
		return nil, nil, connectError(ctx, key.Remote, err)
	}
	info := connInfo(q)
	if !info.Local.IsValid() || info.Local.Addr().IsUnspecified() { // the socket is of all addresses
		info.Local = netip.AddrPortFrom(key.Local, info.Local.Port())
	}
	c := newConn(q, info, &e.cfg)
	c.client = &clientState{opened: make(map[quic.StreamID]*reply), load: hbone.NewLoad()}
	if err := c.start(settings{maxFieldSection: hbone.MaxResponseHeaderList}); err != nil {
		c.shut(err, codeInternal)
		c.join()
		memory.give()
		return nil, nil, fmt.Errorf("start a session with %s: %w", key.Remote, err)
	}
	s := &session{conn: c, done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed { // its transport ends the connection
		c.join()
		memory.give()
		return nil, nil, &hbone.DialError{Remote: key.Remote, Err: net.ErrClosed}
	}
	e.sessions.Go(func() {
		<-q.Context().Done()
		c.join()
		memory.give()
		close(s.done)
	})
	return s, info, nil
}

// connectError classes a dial that did not succeed: a peer that kept silent, or a handshake.
func connectError(ctx context.Context, remote netip.AddrPort, err error) error {
	var silent *quic.HandshakeTimeoutError
	var idle *quic.IdleTimeoutError
	var transport *quic.TransportError
	switch {
	case errors.As(err, &silent), errors.As(err, &idle):
		return &hbone.DialError{Remote: remote, Err: errors.Join(err, context.DeadlineExceeded)}
	case ctx.Err() != nil:
		return &hbone.DialError{Remote: remote, Err: ctx.Err()}
	case errors.As(err, &transport) && !transport.ErrorCode.IsCryptoError():
		return &hbone.DialError{Remote: remote, Err: err} // as CONNECTION_REFUSED
	case errors.As(err, &transport):
		return hbone.NewTLSError(remote, handshakeCause(err))
	}
	return &hbone.DialError{Remote: remote, Err: err}
}

// connInfo describes a connection whose handshake has completed.
func connInfo(q *quic.Conn) *hbone.Conn {
	return &hbone.Conn{Local: addrPort(q.LocalAddr()), Remote: addrPort(q.RemoteAddr()), TLS: q.ConnectionState().TLS}
}

func addrPort(a net.Addr) netip.AddrPort {
	udp, ok := a.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := udp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// session is a hbone.Session.
type session struct {
	*conn
	done chan struct{}
}

// begin opens the stream of a request with fields, which are yet to be sent.
func (s *session) begin(fields []qpack.HeaderField) (*reply, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.client.reserved = max(0, s.client.reserved-1)
	switch {
	case s.quic.Context().Err() != nil:
		return nil, refused(connCause(context.Cause(s.quic.Context())))
	case s.client.draining:
		return nil, refused(errDrained)
	}
	if most := s.peer.maxFieldSection; most > 0 && fieldsSize(fields) > most {
		return nil, fmt.Errorf("request headers of %d bytes are more than the peer takes (%d)", fieldsSize(fields), most)
	}
	w, err := s.cfg.newWindow()
	if err != nil {
		return nil, err
	}
	q, err := s.quic.OpenStream()
	if err != nil {
		w.give()
		if s.quic.Context().Err() != nil {
			return nil, refused(connCause(context.Cause(s.quic.Context())))
		}
		s.client.fullAt = time.Now()
		return nil, refused(errFull)
	}
	r := &reply{fields: fields, settled: make(chan struct{})}
	r.exchange = newExchange(s.conn, q, w, func() { s.forget(q.StreamID()) })
	s.client.opened[q.StreamID()] = r
	return r, nil
}

// forget takes a stream out of the session, which ends with the last one when it drains.
func (s *session) forget(id quic.StreamID) {
	s.mu.Lock()
	delete(s.client.opened, id)
	delete(s.flows, id)
	s.mu.Unlock()
	s.finish(finishTimeout)
}

// finishTimeout is how long a server has to close a connection that its client has finished with:
// its application may still be reading. closeTimeout is that of a client that must end.
const (
	finishTimeout = time.Minute
	closeTimeout  = time.Second
)

// finish ends a draining connection without streams: the server is told that we have read all,
// and closes when it has.
func (c *conn) finish(timeout time.Duration) {
	c.mu.Lock()
	over := c.client.draining && len(c.client.opened) == 0
	tell := over && !c.client.told
	c.client.told = c.client.told || over
	c.mu.Unlock()
	if tell {
		c.sendGoAway(0) // a client's names a push (RFC 9114 section 5.2)
	}
	if over {
		ended := time.AfterFunc(timeout, func() { c.shut(errDrained, codeNo) })
		context.AfterFunc(c.quic.Context(), func() { ended.Stop() })
	}
}

// goneAway takes in a GOAWAY. A server's: no more streams, and those from id on were not
// processed. A client's: it has read all that it wants.
func (c *conn) goneAway(id uint64) error {
	if c.client == nil {
		c.mu.Lock()
		c.server.peerDone = true
		c.mu.Unlock()
		c.settle()
		return nil
	}
	if id%4 != 0 {
		return &connError{codeID, fmt.Sprintf("GOAWAY %d", id)}
	}
	c.mu.Lock()
	c.client.draining = true
	var unprocessed []*reply
	for _, r := range c.client.opened {
		if uint64(r.q.StreamID()) >= id {
			unprocessed = append(unprocessed, r)
		}
	}
	c.mu.Unlock()
	for _, r := range unprocessed {
		if r.fail(refused(fmt.Errorf("peer sent GOAWAY %d", id))) {
			r.reset(codeCancelled)
		}
	}
	c.finish(finishTimeout)
	return nil
}

// Reserve sets a place aside.
func (s *session) Reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.capacityLocked() == 0 {
		return false
	}
	s.client.reserved++
	return true
}

// Release gives a reservation back.
func (s *session) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.client.reserved = max(0, s.client.reserved-1)
}

// Capacity is how many more streams it takes, as far as is known.
func (s *session) Capacity() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.capacityLocked()
}

// maxOpen is what a session is thought to carry while its peer refuses nothing.
const maxOpen = 1 << 16

func (s *session) capacityLocked() int {
	if s.quic.Context().Err() != nil || s.client.draining || time.Since(s.client.fullAt) < fullPause {
		return 0
	}
	return max(0, maxOpen-len(s.client.opened)-s.client.reserved)
}

// Streams is how many it carries.
func (s *session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.client.opened)
}

// Done is closed when the connection has ended.
func (s *session) Done() <-chan struct{} { return s.done }

// Close ends it at once, if it carries streams, else when the server has read what it got.
func (s *session) Close() error {
	s.mu.Lock()
	idle := len(s.client.opened) == 0
	s.client.draining = true
	s.mu.Unlock()
	if idle {
		s.finish(closeTimeout)
	} else {
		s.shut(errConnClosed, codeNo)
	}
	return nil
}

// Retire ends it when its streams have ended and the server has read what it got.
func (s *session) Retire() error {
	s.mu.Lock()
	s.client.draining = true
	s.mu.Unlock()
	s.finish(finishTimeout)
	return nil
}

// Busy tells of the time since it was asked last.
func (s *session) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client.load.Busy(s.moved.Load())
}
