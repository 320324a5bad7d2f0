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
	"sync"
	"time"
)

// ServerConfig is what a Server needs. TLS, Transport and Handler are required.
type ServerConfig struct {
	// TLS requires and verifies client certificates, in versions that its owner chose.
	// NextProtos is set to h2; a config from its GetConfigForClient must say so itself.
	TLS *tls.Config
	// Transport serves connections; h2.Server in practice.
	Transport ServerTransport
	// Handler serves each CONNECT on a goroutine of its own.
	Handler Handler
	// Datagrams serves each request for UDP likewise. nil answers them with 501.
	Datagrams Handler
	// MaxHandshakes bounds the handshakes that go on at once; more wait in the kernel's
	// backlog. One address may have a quarter of them, and more are closed: whoever
	// connects and says nothing must not keep everybody else out. 0 means 128.
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

// ErrTooManyConns is told to OnHandshakeError when a listener's MaxConns bites.
var ErrTooManyConns = errors.New("too many tunnel connections")

// ErrTooManyHandshakes is told to OnHandshakeError when one address has its share of
// MaxHandshakes under way.
var ErrTooManyHandshakes = errors.New("too many handshakes of one address")

// Server accepts tunnels. Its bounds on handshakes are shared by all its listeners.
type Server struct {
	cfg        ServerConfig
	handshakes chan struct{} // a token for each handshake that may start

	mu     sync.Mutex
	peers  map[netip.Addr]int               // handshakes under way, by address
	live   map[*tls.Conn]context.CancelFunc // connections that are served, and what drains them
	rounds int                              // how often Retire was called
}

// NewServer starts nothing; Serve does.
func NewServer(cfg ServerConfig) *Server {
	cfg = cfg.withDefaults()
	return &Server{cfg: cfg, handshakes: make(chan struct{}, cfg.MaxHandshakes), peers: make(map[netip.Addr]int), live: make(map[*tls.Conn]context.CancelFunc)}
}

// admit counts a handshake of peer, unless peer has its share under way; settle ends it.
func (s *Server) admit(peer netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[peer] >= max(1, s.cfg.MaxHandshakes/4) {
		return false
	}
	s.peers[peer]++
	return true
}

func (s *Server) settle(peer netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[peer]--; s.peers[peer] == 0 {
		delete(s.peers, peer)
	}
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
		if err := s.take(raw, slots); err != nil {
			<-s.handshakes
			_ = raw.Close() // its peer sees that; nothing was promised
			s.cfg.OnHandshakeError(addrPort(raw.RemoteAddr()), err)
			continue
		}
		work.Go(func() {
			defer func() { <-slots }()
			s.serveConn(ctx, force, raw)
		})
	}
}

// take counts raw among the connections and its peer's handshakes, or says which bound it
// exceeds.
func (s *Server) take(raw net.Conn, slots chan<- struct{}) error {
	peer := addrPort(raw.RemoteAddr()).Addr()
	if !s.admit(peer) {
		return ErrTooManyHandshakes
	}
	select {
	case slots <- struct{}{}:
		return nil
	default:
		s.settle(peer)
		return ErrTooManyConns
	}
}

// serveConn owns raw.
func (s *Server) serveConn(ctx, force context.Context, raw net.Conn) {
	round := s.round()
	// A peer that connected before the drain gets its handshake, and is then told.
	conn, err := s.handshake(force, raw)
	remote := addrPort(raw.RemoteAddr())
	s.settle(remote.Addr()) // first: whoever gets the token may be of the same address
	<-s.handshakes
	if err != nil {
		if force.Err() == nil {
			s.cfg.OnHandshakeError(remote, NewTLSError(remote, err))
		}
		return
	}
	ctx, cancel := untilExpiry(ctx, conn)
	defer cancel()
	s.enter(conn, cancel, round)
	defer s.leave(conn)
	if err := s.cfg.Transport.ServeConn(ctx, force, conn, s.serve); err != nil {
		s.cfg.Log.Debug("tunnel connection ended", "remote", remote, "error", err)
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
	live := maps.Clone(s.live)
	s.mu.Unlock()
	for conn, drain := range live {
		if match(conn.ConnectionState()) {
			drain()
		}
	}
}

func (s *Server) round() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rounds
}

// enter makes a connection known to Retire. Its handshake began in round.
func (s *Server) enter(conn *tls.Conn, drain context.CancelFunc, round int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[conn] = drain
	if round != s.rounds {
		drain()
	}
}

func (s *Server) leave(conn *tls.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, conn)
}

// untilExpiry ends when the certificate that the peer showed does. The connection drains
// then: streams run on, and new ones need a connection with a certificate of the day. A peer
// that is never idle would otherwise outlive its identity for as long as it likes.
func untilExpiry(ctx context.Context, conn *tls.Conn) (context.Context, context.CancelFunc) {
	shown := conn.ConnectionState().PeerCertificates
	if len(shown) == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, shown[0].NotAfter)
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
