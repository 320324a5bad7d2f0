package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ServerConfig is what a Server needs. TLS, Transport and Handler are required.
type ServerConfig struct {
	// TLS requires and verifies client certificates, in versions that its owner chose.
	// NextProtos is the transport's; a config from its GetConfigForClient must say so itself.
	TLS *tls.Config
	// Transport serves the connections of Serve; h2.Server in practice.
	Transport ServerTransport
	// Handler serves each CONNECT on a goroutine of its own.
	Handler Handler
	// Datagrams serves each request for UDP likewise. nil answers them with 501.
	Datagrams Handler
	// MaxHandshakes bounds the handshakes that go on at once; more wait in the kernel's
	// backlog, or are refused where there is none (ServeEndpoint). One address may have a
	// quarter of them, and more are closed: whoever connects and says nothing must not keep
	// everybody else out. 0 means 128.
	MaxHandshakes int
	// HandshakeTimeout bounds one. 0 means 10 seconds.
	HandshakeTimeout time.Duration
	// MaxConns bounds the tunnel connections of one listener; more are closed. 0 means
	// 10,000.
	MaxConns int
	// OnHandshakeError, if set, is told of every connection that did not become a tunnel
	// connection: a *TLSError, ErrTooManyConns or ErrTooManyHandshakes. It is called from
	// several goroutines.
	OnHandshakeError func(remote netip.AddrPort, err error)
	// Log receives what no caller is told. nil discards it.
	Log *slog.Logger
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.MaxHandshakes <= 0 {
		c.MaxHandshakes = 128
	}
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.MaxConns <= 0 {
		c.MaxConns = 10_000
	}
	if c.OnHandshakeError == nil {
		c.OnHandshakeError = func(netip.AddrPort, error) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Datagrams == nil {
		c.Datagrams = func(r *ServerRequest) { r.Reject(501) }
	}
	c.TLS = c.TLS.Clone()
	c.TLS.NextProtos = []string{alpn}
	return c
}

// Server accepts tunnels. Its bounds on handshakes are shared by all its listeners.
type Server struct {
	cfg        ServerConfig
	handshakes chan struct{} // a token for each handshake that may start

	mu     sync.Mutex
	peers  map[netip.Addr]int    // handshakes under way, by address
	live   map[*serving]struct{} // connections that are served
	rounds int                   // how often Retire was called
}

// serving is a connection that is served.
type serving struct {
	tls   tls.ConnectionState
	drain context.CancelFunc
}

// NewServer starts nothing; Serve and ServeEndpoint do.
func NewServer(cfg ServerConfig) *Server {
	cfg = cfg.withDefaults()
	return &Server{cfg: cfg, handshakes: make(chan struct{}, cfg.MaxHandshakes), peers: make(map[netip.Addr]int), live: make(map[*serving]struct{})}
}

// Serve accepts tunnel connections on l until ctx ends. Then it accepts no more, tells its
// peers to open no more streams (GOAWAY), and returns when the streams that run have ended,
// or once force is done, which cuts them. It returns nil after an end that ctx asked for.
// l stays open where it can be told to stop accepting otherwise (it has SetDeadline, as
// *net.TCPListener does), and is closed where not. Every goroutine has ended on return.
func (s *Server) Serve(ctx, force context.Context, l net.Listener) error {
	if d, ok := l.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Time{}) // of an earlier Serve; Accept tells if l is closed
	}
	stop := context.AfterFunc(ctx, func() { stopAccepting(l) })
	defer stop()
	var work sync.WaitGroup
	defer work.Wait()
	slots := make(chan struct{}, s.cfg.MaxConns)
	for {
		select {
		case s.handshakes <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		raw, err := l.Accept()
		if err != nil {
			<-s.handshakes
			if ctx.Err() != nil {
				return nil
			}
			if retry := acceptRetry(err); retry > 0 {
				s.cfg.Log.Warn("accept tunnel connections", "listener", l.Addr(), "error", err)
				pause(ctx, retry)
				continue
			}
			return fmt.Errorf("accept tunnel connections on %s: %w", l.Addr(), err)
		}
		a, err := s.take(raw, slots)
		if err != nil {
			<-s.handshakes
			_ = raw.Close() // its peer sees that; nothing was promised
			s.cfg.OnHandshakeError(addrPort(raw.RemoteAddr()), err)
			continue
		}
		work.Go(func() {
			defer func() { <-slots }()
			s.serveConn(ctx, force, raw, a)
		})
	}
}

// take counts raw among the connections and its peer's handshakes, or says which bound it
// exceeds.
func (s *Server) take(raw net.Conn, slots chan<- struct{}) (*Admission, error) {
	a, err := s.admit(addrPort(raw.RemoteAddr()))
	if err != nil {
		return nil, err
	}
	select {
	case slots <- struct{}{}:
		return a, nil
	default:
		a.settle()
		return nil, ErrTooManyConns
	}
}

// serveConn owns raw.
func (s *Server) serveConn(ctx, force context.Context, raw net.Conn, a *Admission) {
	// A peer that connected before the drain gets its handshake, and is then told.
	conn, err := s.handshake(force, raw)
	a.settle() // first: whoever gets the token may be of the same address
	<-s.handshakes
	if err != nil {
		if force.Err() == nil {
			s.cfg.OnHandshakeError(a.remote, NewTLSError(a.remote, err))
		}
		return
	}
	s.serveUntilExpiry(ctx, conn.ConnectionState(), a, func(ctx context.Context) error {
		return s.cfg.Transport.ServeConn(ctx, force, conn, s.serve)
	})
}

// serveUntilExpiry has serve serve a connection until the certificate that the peer showed ends.
// The connection drains then: streams run on, and new ones need a connection with a certificate
// of the day. A peer that is never idle would otherwise outlive its identity for as long as it
// likes. Retire ends it likewise.
func (s *Server) serveUntilExpiry(ctx context.Context, state tls.ConnectionState, a *Admission, serve func(context.Context) error) {
	var cancel context.CancelFunc
	if shown := state.PeerCertificates; len(shown) > 0 {
		ctx, cancel = context.WithDeadline(ctx, shown[0].NotAfter)
	} else {
		ctx, cancel = context.WithCancel(ctx)
	}
	defer cancel()
	c := &serving{tls: state, drain: cancel}
	s.enter(c, a.round)
	defer s.leave(c)
	if err := serve(ctx); err != nil {
		s.cfg.Log.Debug("tunnel connection ended", "remote", a.remote, "error", err)
	}
}

func (s *Server) serve(r *ServerRequest) {
	if r.Protocol == UDP {
		s.cfg.Datagrams(r)
		return
	}
	s.cfg.Handler(r)
}

// Retire takes the connections that match out of use: live streams run on, and the peer is told
// to open new ones on another connection (GOAWAY). A connection whose handshake is under way is
// taken for one that matches, since it may have been verified by what counts no more.
func (s *Server) Retire(match func(tls.ConnectionState) bool) {
	s.mu.Lock()
	s.rounds++
	live := slices.Collect(maps.Keys(s.live))
	s.mu.Unlock()
	for _, c := range live {
		if match(c.tls) {
			c.drain()
		}
	}
}

// enter makes a connection known to Retire. Its handshake began in round.
func (s *Server) enter(c *serving, round int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[c] = struct{}{}
	if round != s.rounds {
		c.drain()
	}
}

func (s *Server) leave(c *serving) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, c)
}

// handshake closes raw when it fails.
func (s *Server) handshake(ctx context.Context, raw net.Conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	conn := tls.Server(NewWire(raw), s.cfg.TLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the handshake's error is the one to report
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = errors.Join(err, ctx.Err())
		}
		return nil, err
	}
	if conn.ConnectionState().NegotiatedProtocol != alpn {
		_ = conn.Close()
		return nil, errALPN
	}
	return conn, nil
}

// stopAccepting makes Accept return.
func stopAccepting(l net.Listener) {
	if d, ok := l.(interface{ SetDeadline(time.Time) error }); ok {
		if d.SetDeadline(time.Unix(1, 0)) == nil {
			return
		}
	}
	_ = l.Close() // whoever owns it closes it again
}

// acceptRetry is how long to wait before the next Accept after err, 0 for never. Running
// out of descriptors or memory passes; so does a connection that died in the backlog.
func acceptRetry(err error) time.Duration {
	var temporary interface{ Temporary() bool }
	if errors.Is(err, net.ErrClosed) || !errors.As(err, &temporary) || !temporary.Temporary() {
		return 0
	}
	return 50 * time.Millisecond
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
