package h3

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// attempt is a connection that a peer makes, in its context.
type attempt struct {
	admission *hbone.Admission
	memory    reserved
	done      sync.Once
}

type attemptKey struct{}

// settle tells the gate that the handshake has ended.
func (a *attempt) settle(err error) { a.done.Do(func() { a.admission.Done(err) }) }

func attemptOf(ctx context.Context) *attempt {
	a, _ := ctx.Value(attemptKey{}).(*attempt)
	return a
}

// crowded tells quic-go whether an address has to prove itself by a stateless retry.
func (e *Endpoint) crowded(remote net.Addr) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gate != nil && e.gate.Crowded(addrPort(remote))
}

// admit is called when a handshake begins, with a context that ends with the connection.
func (e *Endpoint) admit(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	e.mu.Lock()
	gate := e.gate
	e.mu.Unlock()
	if gate == nil {
		return nil, net.ErrClosed
	}
	memory, err := reserve(e.cfg.Budget, connReserved)
	if err != nil {
		return nil, err
	}
	admission, err := gate.Admit(addrPort(info.RemoteAddr))
	if err != nil {
		memory.give()
		return nil, err
	}
	a := &attempt{admission: admission, memory: memory}
	context.AfterFunc(ctx, func() { // does nothing for one that was accepted
		a.settle(handshakeCause(context.Cause(ctx)))
		a.memory.give()
	})
	return context.WithValue(ctx, attemptKey{}, a), nil
}

// Listen accepts connections as gate allows.
func (e *Endpoint) Listen(cfg *tls.Config, gate *hbone.Gate) (hbone.Listener, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.gate != nil {
		return nil, errors.New("HTTP/3 endpoint listens already")
	}
	config := e.config()
	config.MaxIncomingStreams = int64(e.cfg.MaxStreams)
	config.HandshakeIdleTimeout = gate.Timeout
	l, err := e.transport.Listen(serverTLS(cfg), config)
	if err != nil {
		return nil, err
	}
	e.gate = gate
	return &listener{endpoint: e, quic: l}, nil
}

// serverTLS is cfg for QUIC: its own ALPN, no tickets (0-RTT could be replayed, and what is
// resumed is not verified anew).
func serverTLS(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{alpn}
	cfg.MinVersion = tls.VersionTLS13
	cfg.SessionTicketsDisabled = true
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if chosen == nil || err != nil {
				return nil, err
			}
			return serverTLS(chosen), nil
		}
	}
	return cfg
}

// listener is a hbone.Listener.
type listener struct {
	endpoint *Endpoint
	quic     *quic.Listener
}

// Accept waits for a connection.
func (l *listener) Accept(ctx context.Context) (hbone.Accepted, error) {
	q, err := l.quic.Accept(ctx)
	if err != nil {
		return nil, err
	}
	a := attemptOf(q.Context())
	a.settle(nil)
	return &accepted{attempt: a, conn: newConn(q, connInfo(q), &l.endpoint.cfg)}, nil
}

// Close has the endpoint refuse new connections.
func (l *listener) Close() error {
	err := l.quic.Close()
	l.endpoint.mu.Lock()
	defer l.endpoint.mu.Unlock()
	l.endpoint.gate = nil
	return err
}

// accepted is a hbone.Accepted.
type accepted struct {
	*conn
	attempt *attempt
}

func (a *accepted) Conn() *hbone.Conn { return a.info }

func (a *accepted) Admission() *hbone.Admission { return a.attempt.admission }

// Refuse closes the connection.
func (a *accepted) Refuse() { a.shut(errConnClosed, codeLoad) }

// serverState is what only a server's connection has, guarded by conn.mu.
type serverState struct {
	force context.Context // parent of every request's context
	serve func(*hbone.ServerRequest)
	max   int

	handlers  int
	streams   int
	nuisances int // requests that came to nothing
	opened    bool
	lastID    quic.StreamID              // the newest that was accepted, when opened
	unread    map[quic.StreamID]struct{} // those whose request is not read yet
	final     bool                       // no more streams are served
	peerDone  bool                       // the peer opens no more, and has read all that it wants (GOAWAY)
	timer     *time.Timer
}

// isToComeLocked reports whether the request of a stream is yet to be read.
func (s *serverState) isToComeLocked(id quic.StreamID) bool {
	_, unread := s.unread[id]
	return unread || !s.opened || id > s.lastID
}

// drainPause is how long streams are still served that the peer may have opened before it saw the
// first GOAWAY, drainTimeout how long it has for its GOAWAY, or to close the connection, when all
// streams have ended.
const (
	drainPause   = time.Second
	drainTimeout = 5 * time.Second
)

// Serve serves the connection until it ends, or ctx does and it has drained, or force is done.
func (a *accepted) Serve(ctx, force context.Context, serve func(*hbone.ServerRequest)) error {
	c := a.conn
	c.server = &serverState{force: force, serve: serve, max: a.cfg.MaxStreams, unread: make(map[quic.StreamID]struct{})}
	err := c.start(settings{maxFieldSection: hbone.MaxHeaderList, connectProtocol: a.cfg.Datagrams})
	if err != nil {
		c.shut(err, codeInternal)
		c.join()
		return err
	}
	stopDrain := context.AfterFunc(ctx, c.drain)
	stopForce := context.AfterFunc(force, func() { c.shut(errForced, codeNo) })
	c.acceptRequests()
	stopDrain()
	stopForce()
	c.join()
	c.mu.Lock()
	if c.server.timer != nil {
		c.server.timer.Stop()
	}
	c.mu.Unlock()
	if err := c.ended(); !errors.Is(err, errPeerClosed) && !errors.Is(err, errForced) && !errors.Is(err, errDrained) {
		return err
	}
	return nil
}

// drain starts the graceful end: a GOAWAY that excludes nothing, and one that does when what was
// under way has come.
func (c *conn) drain() {
	c.mu.Lock()
	c.server.timer = time.AfterFunc(drainPause, c.finalGoAway)
	c.mu.Unlock()
	c.sendGoAway(1<<62 - 4)
}

func (c *conn) finalGoAway() {
	c.mu.Lock()
	c.server.final = true
	next := uint64(0)
	if c.server.opened {
		next = uint64(c.server.lastID) + 4
	}
	c.mu.Unlock()
	c.sendGoAway(next)
	c.settle()
}

// settle ends a connection that has nothing left to do. What closes a QUIC connection loses what
// the other end has not read, so a client says when it has (its GOAWAY), and the server closes.
func (c *conn) settle() {
	c.mu.Lock()
	s := c.server
	over := s.streams == 0 && s.handlers == 0
	if over && s.final && !s.peerDone {
		s.timer.Stop()
		s.timer = time.AfterFunc(drainTimeout, func() { c.shut(errDrained, codeNo) })
	}
	over = over && s.peerDone
	c.mu.Unlock()
	if over {
		c.shut(errDrained, codeNo)
	}
}

// acceptRequests accepts the peer's streams until the connection ends.
func (c *conn) acceptRequests() {
	for {
		q, err := c.quic.AcceptStream(context.Background()) // ends with the connection
		if err != nil {
			return
		}
		w, short := c.cfg.newWindow()
		x := newExchange(c, q, w, func() {
			c.mu.Lock()
			c.server.streams--
			delete(c.flows, q.StreamID())
			c.mu.Unlock()
			c.settle()
		})
		c.mu.Lock()
		c.server.opened, c.server.lastID = true, max(c.server.lastID, q.StreamID())
		c.server.streams++
		reject := c.server.final || c.server.handlers >= 2*c.server.max
		if !reject {
			c.server.handlers++
			c.server.unread[q.StreamID()] = struct{}{}
		}
		c.mu.Unlock()
		if reject {
			x.reset(codeRejected)
			x.leave()
			c.nuisance()
			continue
		}
		c.spawn(func() {
			c.request(x, short)
			c.mu.Lock()
			c.server.handlers--
			c.mu.Unlock()
			c.settle()
		})
	}
}

// nuisance counts what a peer makes us do for nothing; a peer that does little else is cut off.
func (c *conn) nuisance() {
	c.mu.Lock()
	c.server.nuisances++
	over := c.server.nuisances > 10*c.server.max
	c.mu.Unlock()
	if over {
		c.broken(&connError{codeLoad, "too many requests that come to nothing"})
	}
}

// headersTimeout bounds the wait for a request behind its stream's first byte.
const headersTimeout = 10 * time.Second

// request reads a request and serves it, if it has memory for what follows.
func (c *conn) request(x *exchange, short error) {
	if short != nil {
		c.forgetUnread(x.q.StreamID())
		x.answer(503)
		x.leave()
		return
	}
	_ = x.q.SetReadDeadline(time.Now().Add(headersTimeout)) // fails where reading does
	fields, err := x.in.headers(hbone.MaxHeaderList)
	_ = x.q.SetReadDeadline(time.Time{})
	var r *request
	if err == nil {
		r, err = parseRequest(fields)
	}
	if err == nil {
		c.handle(x, r)
		return
	}
	c.forgetUnread(x.q.StreamID())
	var bad *badRequest
	switch {
	case errors.As(err, &bad):
		x.answer(bad.status)
	case errors.Is(err, errTooLarge):
		x.answer(431)
	case errors.As(err, new(net.Error)):
		x.reset(codeIncomplete)
	default:
		_ = x.judge(err) // nobody is to be told but the peer
		x.reset(codeCancelled)
	}
	x.in.release()
	x.leave()
	c.nuisance()
}

// forgetUnread drops what came for a request that is none for UDP.
func (c *conn) forgetUnread(id quic.StreamID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.server.unread, id)
	c.takeEarlyLocked(id)
}

// answer answers with a status and ends the stream; H3_NO_ERROR asks the peer to send no more
// (RFC 9114 section 4.1).
func (x *exchange) answer(status int) {
	if x.sendHeaders(responseFields(status, hbone.Response{})) == nil {
		_ = x.q.Close() // fails when it was reset
	} else {
		x.q.CancelWrite(quic.StreamErrorCode(codeCancelled)) // quic-go keeps it otherwise
	}
	x.q.CancelRead(quic.StreamErrorCode(codeNo))
}

// asked is a request while its handler decides.
type asked struct {
	*exchange
	flow *flow // of a request for UDP

	mu       sync.Mutex
	answered bool
	stream   *stream // that was accepted
	accepted bool
}

// handle runs the handler of a request.
func (c *conn) handle(x *exchange, r *request) {
	ctx, cancel := context.WithCancel(c.server.force)
	defer cancel()
	stop := context.AfterFunc(x.q.Context(), func() {
		if !errors.Is(context.Cause(x.q.Context()), quic.ErrStreamClosed) { // our own end
			cancel()
		}
	})
	defer stop()
	a := &asked{exchange: x}
	s := &hbone.ServerRequest{
		Request: r.Request, Protocol: r.protocol, Target: r.target,
		Conn: c.info, Context: ctx, Reject: a.reject,
	}
	if r.protocol == hbone.UDP {
		a.flow = newFlow(x)
		c.enter(a.flow)
		s.AcceptDatagrams = a.acceptDatagrams
	} else {
		s.Accept = a.accept
	}
	c.forgetUnread(x.q.StreamID())
	c.server.serve(s)
	a.finish()
}

// take marks the request as answered, once.
func (a *asked) take() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := !a.answered
	a.answered = true
	return first
}

// ok answers 200.
func (a *asked) ok(r hbone.Response) error {
	if !a.take() {
		return errAnswered
	}
	if err := a.sendHeaders(responseFields(200, r)); err != nil {
		a.give(codeInternal)
		return a.conn.fault(err)
	}
	c := a.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server.nuisances = max(0, c.server.nuisances-1)
	return nil
}

// give gives the stream up.
func (a *asked) give(code code) {
	a.reset(code)
	a.in.release()
	a.leave()
}

func (a *asked) accept(r hbone.Response) (hbone.Stream, error) {
	if err := a.ok(r); err != nil {
		return nil, err
	}
	s := newStream(a.exchange)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream, a.accepted = s, true
	return s, nil
}

func (a *asked) acceptDatagrams(r hbone.Response) (hbone.DatagramStream, error) {
	if err := a.ok(r); err != nil {
		return nil, err
	}
	a.conn.spawn(a.flow.read)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.accepted = true
	return a.flow, nil
}

func (a *asked) reject(status int) {
	if !a.take() {
		return
	}
	a.answer(status)
	a.in.release()
	a.leave()
}

// finish ends what the handler left: a request that it did not answer, and a stream that no sink
// took.
func (a *asked) finish() {
	reset := a.take()
	a.mu.Lock()
	accepted, s := a.accepted, a.stream
	a.mu.Unlock()
	switch {
	case reset:
		if a.conn.server.force.Err() != nil { // the handler may be first to see it
			a.conn.shut(errForced, codeNo)
		}
		a.give(codeInternal)
	case !accepted: // it was rejected, or could not be answered
	case s != nil && !s.hasSink():
		_ = s.Close() // never fails
	case a.flow != nil && !a.flow.inbox.Delivered():
		_ = a.flow.Close() // never fails
	}
	if reset {
		a.conn.nuisance()
	}
}
