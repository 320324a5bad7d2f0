package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ClientConfig is what a Client needs. TLS is required, and Dial and Transport or a Connector.
type ClientConfig struct {
	// Dial makes the TCP connection to key.Remote from key.Local. ctx ends after
	// ConnectTimeout, or when nobody waits for the connection any more.
	Dial func(ctx context.Context, key Key) (net.Conn, error)
	// TLS is the configuration for a session of key: it verifies that the peer is
	// key.Peer and shows our certificate as key.Source. NextProtos is the transport's. It may
	// wait for a certificate, and wraps ErrNoCertificate when there is none. It is called
	// before Dial and shares HandshakeTimeout with the handshake.
	TLS func(ctx context.Context, key Key) (*tls.Config, error)
	// Transport makes sessions; h2.Client in practice.
	Transport ClientTransport
	// Connector makes sessions in place of Dial and Transport; h3.Endpoint in practice.
	Connector Connector
	// MaxStreamsPerConn bounds the streams of one session beside the peer's own bound.
	// 0 means 100.
	MaxStreamsPerConn int
	// Stripes bounds the sessions of one key while they are busy: more are made only when
	// those have no room. 0 means 1.
	Stripes int
	// MaxHandshakes bounds the handshakes that go on at once; more wait. 0 means 32.
	MaxHandshakes int
	// Handshakes, if set, bounds by its capacity those of all clients that share it.
	Handshakes chan struct{}
	// IdleTimeout is how long a session without streams is kept. 0 means 5 minutes.
	IdleTimeout time.Duration
	// ConnectTimeout bounds a dial, HandshakeTimeout what follows until the session is
	// up; a Connector has ConnectTimeout for both. 0 means 10 seconds.
	ConnectTimeout   time.Duration
	HandshakeTimeout time.Duration
	// Log receives what no caller is told. nil discards it.
	Log *slog.Logger
}

func (c ClientConfig) withDefaults() ClientConfig {
	if c.MaxStreamsPerConn <= 0 {
		c.MaxStreamsPerConn = 100
	}
	if c.Stripes <= 0 {
		c.Stripes = 1
	}
	if c.MaxHandshakes <= 0 {
		c.MaxHandshakes = 32
	}
	if c.IdleTimeout <= 0 {
		c.IdleTimeout = 5 * time.Minute
	}
	if c.ConnectTimeout <= 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// maxAttempts bounds how often one Open is tried when peers refuse it unprocessed.
const maxAttempts = 3

// Client opens tunnels over pooled sessions. It is safe for concurrent use.
type Client struct {
	cfg        ClientConfig
	handshakes chan struct{} // one for each that goes on
	// work counts dials and session watchers; Close waits for them.
	work sync.WaitGroup

	mu     sync.Mutex
	closed bool
	pools  map[Key]*pool
	seq    uint64 // of the session made last
	stats  PoolStats
}

// NewClient starts nothing: sessions are made when they are needed. Close ends them.
func NewClient(cfg ClientConfig) *Client {
	cfg = cfg.withDefaults()
	return &Client{cfg: cfg, handshakes: make(chan struct{}, cfg.MaxHandshakes), pools: make(map[Key]*pool)}
}

// Tunnel is an open stream and what is known of the way that it takes. Close must be called.
type Tunnel struct {
	Stream
	Response *Response // who holds the tunnel for long need not hold it as well
	Conn     *Conn     // shared by the streams of a session; not to be modified
	Reused   bool      // whether the session was there before

	place place
}

// Close closes the stream and gives its place in the session back.
func (t *Tunnel) Close() error {
	err := t.Stream.Close()
	t.place.leave()
	return err
}

// place is one in a session, until leave is called.
type place struct {
	client *Client
	member *member
	left   atomic.Bool
}

func (p *place) leave() {
	if !p.left.Swap(true) {
		p.client.release(p.member)
	}
}

// Open makes a tunnel to r.Authority through a session of key: a pooled one with room, else
// a new one whose dial is shared with others who wait. ctx bounds the opening alone.
// A stream that was certainly not processed, or whose session died before the answer and had
// got nothing to hand on, is tried again on a session made since, a few times. Its error is or
// wraps a *DialError, *TLSError, *StatusError, ErrRefused, ErrUncertain, ErrClosed, or ctx's
// error when time ran out.
func (c *Client) Open(ctx context.Context, key Key, r *Request) (*Tunnel, error) {
	return c.OpenWith(ctx, key, r, nil)
}

// OpenWith is Open, with first bytes of the stream that do not wait for it; they are sent, and
// ended if they did, when it succeeds. After an error other than ErrUncertain first can be used
// again. It may be nil.
func (c *Client) OpenWith(ctx context.Context, key Key, r *Request, first *First) (*Tunnel, error) {
	t := &Tunnel{}
	m, reused, err := c.try(ctx, key, r, func(m *member) error {
		stream, response, err := open(ctx, m, r, first)
		if err == nil {
			t.Stream, t.Response = stream, response
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Conn, t.Reused, t.place.client, t.place.member = m.conn, reused, c, m
	return t, nil
}

// Flow is an open flow of datagrams and what is known of the way that it takes. Close must be
// called.
type Flow struct {
	DatagramStream
	Response Response
	Conn     *Conn // shared by the streams of a session; not to be modified
	Reused   bool  // whether the session was there before

	place place
}

// Close closes the flow and gives its place in the session back.
func (f *Flow) Close() error {
	err := f.DatagramStream.Close()
	f.place.leave()
	return err
}

// OpenDatagrams makes a flow of datagrams to r.Authority, as Open makes a tunnel. The payloads
// of first are sent behind the request and do not wait for the answer; as datagrams may, they
// get lost, and may arrive twice when the request is tried again. Its error is as Open's, and
// ErrNoDatagrams when the peer cannot carry any; never ErrUncertain.
func (c *Client) OpenDatagrams(ctx context.Context, key Key, r *Request, first [][]byte) (*Flow, error) {
	f := &Flow{}
	m, reused, err := c.try(ctx, key, r, func(m *member) error {
		stream, response, err := m.session.OpenDatagrams(ctx, r, first)
		if err == nil {
			f.DatagramStream, f.Response = stream, *response
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	f.Conn, f.Reused, f.place.client, f.place.member = m.conn, reused, c, m
	return f, nil
}

// try has open use a place in a session of key, and returns the session and whether it was
// there before. What was refused is tried again in another session, a few times.
func (c *Client) try(ctx context.Context, key Key, r *Request, open func(*member) error) (*member, bool, error) {
	if err := r.Validate(); err != nil {
		return nil, false, fmt.Errorf("CONNECT: %w", err)
	}
	var newerThan uint64
	var refused error
	for range maxAttempts {
		m, newest, err := c.acquire(ctx, key, newerThan)
		if err != nil {
			return nil, false, errors.Join(err, refused)
		}
		reused := m.used.Swap(true)
		if err = open(m); err == nil {
			return m, reused, nil
		}
		c.release(m)
		switch {
		case isRemoteAlert(err) && !errors.Is(err, ErrUncertain):
			return nil, false, c.countTLSError(NewTLSError(key.Remote, err))
		case !errors.Is(err, ErrRefused):
			return nil, false, openError(ctx, key, r, err)
		}
		refused = fmt.Errorf("CONNECT %s through %s: %w", r.Authority, key.Remote, err)
		newerThan = newest
		c.count(func(s *PoolStats) { s.Retries++ })
	}
	return nil, false, fmt.Errorf("gave up after %d sessions: %w", maxAttempts, refused)
}

// open opens a stream in a place of m that is reserved.
func open(ctx context.Context, m *member, r *Request, first *First) (Stream, *Response, error) {
	o, err := m.session.Start(r)
	if err != nil {
		return nil, nil, err
	}
	first.begin(o)
	first.follow(ctx, m.conn, o)
	if err := first.failed(); err != nil {
		o.Close()
		return nil, nil, err
	}
	stream, response, err := o.Answer(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := first.finish(ctx, stream); err != nil {
		_ = stream.Close()
		return nil, nil, fmt.Errorf("%w: %w", ErrUncertain, err)
	}
	return stream, response, nil
}

// isRemoteAlert knows a TLS alert from the peer: in TLS 1.3 the verdict on our certificate
// comes with the first read after the handshake.
func isRemoteAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

func openError(ctx context.Context, key Key, r *Request, err error) error {
	if cause := ctx.Err(); cause != nil && errors.Is(err, cause) && isTimeout(err) {
		return fmt.Errorf("CONNECT %s through %s: no answer in time: the peer's agent may be overloaded, or its application does not accept: %w",
			r.Authority, key.Remote, err)
	}
	return fmt.Errorf("CONNECT %s through %s: %w", r.Authority, key.Remote, err)
}

// connect makes a session of key, from the TLS configuration to the transport.
func (c *Client) connect(ctx context.Context, key Key) (Session, *Conn, error) {
	handshake, cancel := context.WithTimeout(ctx, c.cfg.HandshakeTimeout)
	defer cancel()
	cfg, err := c.cfg.TLS(handshake, key)
	if err != nil {
		return nil, nil, c.countTLSError(NewTLSError(key.Remote, err))
	}
	if c.cfg.Connector != nil {
		return c.connectBy(ctx, c.cfg.Connector, key, cfg)
	}
	if len(cfg.NextProtos) != 1 || cfg.NextProtos[0] != alpn {
		cfg = cfg.Clone()
		cfg.NextProtos = []string{alpn}
	}
	raw, err := c.dialTCP(ctx, key)
	if err != nil {
		c.count(func(s *PoolStats) { s.DialFailures++ })
		return nil, nil, &DialError{Remote: key.Remote, Err: err}
	}
	handshake, cancel = context.WithTimeout(ctx, c.cfg.HandshakeTimeout)
	defer cancel()
	conn, err := c.handshake(handshake, raw, cfg)
	if err != nil {
		_ = raw.Close() // the handshake's error is the one to report
		return nil, nil, c.countTLSError(NewTLSError(key.Remote, err))
	}
	session, err := c.cfg.Transport.NewSession(handshake, conn)
	if err != nil {
		return nil, nil, fmt.Errorf("start a session with %s: %w", key.Remote, err)
	}
	return session, NewConn(conn), nil
}

// connectBy has connector make the session. Its handshake waits for its turn when it is about to
// verify the peer: one that does not answer must not keep others from theirs.
func (c *Client) connectBy(ctx context.Context, connector Connector, key Key, cfg *tls.Config) (Session, *Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	cfg = cfg.Clone()
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		done, err := c.turn(ctx)
		if err != nil {
			return err
		}
		defer done()
		if verify == nil {
			return nil
		}
		return verify(state)
	}
	session, conn, err := connector.Connect(ctx, key, cfg)
	var dial *DialError
	var failed *TLSError
	switch {
	case err == nil:
		return session, conn, nil
	case errors.As(err, &dial):
		c.count(func(s *PoolStats) { s.DialFailures++ })
	case errors.As(err, &failed):
		_ = c.countTLSError(failed) // which is wrapped in err
	}
	return nil, nil, err
}

// turn waits for one among the handshakes; done ends it. When a node loses its connections to
// many, their handshakes would slow down everything that it still has.
func (c *Client) turn(ctx context.Context) (done func(), err error) {
	var taken []chan struct{}
	done = func() {
		for _, turns := range taken {
			<-turns
		}
	}
	for _, turns := range []chan struct{}{c.handshakes, c.cfg.Handshakes} {
		if turns == nil {
			continue
		}
		select {
		case turns <- struct{}{}:
			taken = append(taken, turns)
		case <-ctx.Done():
			done()
			return nil, fmt.Errorf("wait for other handshakes: %w", ctx.Err())
		}
	}
	return done, nil
}

func (c *Client) handshake(ctx context.Context, raw net.Conn, cfg *tls.Config) (*tls.Conn, error) {
	done, err := c.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	conn := tls.Client(NewWire(raw), cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if conn.ConnectionState().NegotiatedProtocol != alpn {
		return nil, errALPN
	}
	return conn, nil
}

func (c *Client) dialTCP(ctx context.Context, key Key) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	conn, err := c.cfg.Dial(ctx, key)
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = errors.Join(err, ctx.Err()) // a dialer may hide that it ran out of time
	}
	return conn, err
}

func (c *Client) countTLSError(err *TLSError) *TLSError {
	c.count(func(s *PoolStats) {
		if s.TLSFailures == nil {
			s.TLSFailures = make(map[TLSCause]uint64)
		}
		s.TLSFailures[err.Cause]++
	})
	return err
}

func (c *Client) count(f func(*PoolStats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.stats)
}

// Close ends every session at once, live streams with an error, and waits for dials to end.
// It may be called again.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.closeKeys(func(Key) bool { return true }, ErrClosed)
	c.work.Wait()
	return nil
}

// CloseKeys ends the sessions of every key that match wants ended, live streams with an
// error, and fails the Opens that wait for one. Later Opens make new sessions.
func (c *Client) CloseKeys(match func(Key) bool) {
	c.closeKeys(match, errors.New("its sessions were closed meanwhile"))
}

func (c *Client) closeKeys(match func(Key) bool, cause error) {
	c.mu.Lock()
	var sessions []Session
	for key, p := range c.pools {
		if !match(key) {
			continue
		}
		for _, m := range p.members {
			sessions = append(sessions, m.session)
		}
		p.failLocked(len(p.waiters), fmt.Errorf("tunnel to %s: %w", key.Remote, cause))
		p.cancelDialsLocked(true)
	}
	c.mu.Unlock()
	for _, s := range sessions {
		if err := s.Close(); err != nil {
			c.cfg.Log.Debug("close session", "error", err)
		}
	}
}

// RetireKeys takes the sessions of every key that match wants out of use: live streams run
// on, and a session ends with its last one. A rotated certificate takes effect so.
func (c *Client) RetireKeys(match func(Key) bool) {
	c.mu.Lock()
	var idle []Session
	for key, p := range c.pools {
		if !match(key) {
			continue
		}
		for _, m := range p.members {
			m.retired = true
			if m.streams == 0 {
				idle = append(idle, m.session)
			}
		}
		for _, d := range p.dials {
			d.retired = true
		}
	}
	c.mu.Unlock()
	for _, s := range idle {
		if err := s.Retire(); err != nil {
			c.cfg.Log.Debug("retire session", "error", err)
		}
	}
}

// PoolStats is a snapshot of a Client's pool: numbers now, then totals since it was made.
type PoolStats struct {
	Keys     int // keys with a session, a dial or a waiter
	Sessions int
	Streams  int
	Dialing  int
	Waiting  int // Opens that wait for a session

	Dials        uint64
	DialFailures uint64
	TLSFailures  map[TLSCause]uint64
	Retries      uint64 // Opens tried again because they were refused unprocessed
	IdleClosed   uint64
}

// Stats is a snapshot.
func (c *Client) Stats() PoolStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.TLSFailures = make(map[TLSCause]uint64, len(c.stats.TLSFailures))
	for cause, n := range c.stats.TLSFailures {
		s.TLSFailures[cause] = n
	}
	s.Keys = len(c.pools)
	for _, p := range c.pools {
		s.Sessions += len(p.members)
		s.Dialing += len(p.dials)
		s.Waiting += len(p.waiters)
		for _, m := range p.members {
			s.Streams += m.streams
		}
	}
	return s
}

// alpn is the one application protocol of HBONE over TCP.
const alpn = "h2"

// remove takes one element out of s, keeping the order.
func remove[T comparable](s []T, x T) []T {
	if i := slices.Index(s, x); i >= 0 {
		return slices.Delete(s, i, i+1)
	}
	return s
}
