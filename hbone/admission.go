package hbone

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// ErrTooManyConns is told to OnHandshakeError when a listener's MaxConns bites.
var ErrTooManyConns = errors.New("too many tunnel connections")

// ErrTooManyHandshakes is told to OnHandshakeError when one address has its share of
// MaxHandshakes under way.
var ErrTooManyHandshakes = errors.New("too many handshakes of one address")

// Admission is a handshake that a server has let begin.
type Admission struct {
	server *Server
	remote netip.AddrPort
	round  int // Server.rounds at its beginning
}

// admit counts a handshake of remote, unless its address has its share under way.
func (s *Server) admit(remote netip.AddrPort) (*Admission, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[remote.Addr()] >= s.share() {
		return nil, ErrTooManyHandshakes
	}
	s.peers[remote.Addr()]++
	return &Admission{server: s, remote: remote, round: s.rounds}, nil
}

// share is how many handshakes one address may have under way.
func (s *Server) share() int { return max(1, s.cfg.MaxHandshakes/4) }

// settle is called once, when the handshake has ended.
func (a *Admission) settle() {
	s := a.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[a.remote.Addr()]--; s.peers[a.remote.Addr()] == 0 {
		delete(s.peers, a.remote.Addr())
	}
}

// Gate bounds the handshakes of an Endpoint as its Server does those on TCP. Its methods may be
// called from any goroutine, and return at once.
type Gate struct {
	server *Server
	// Timeout bounds a handshake.
	Timeout time.Duration
}

// Crowded reports whether an address has to prove that it is remote's before its handshake
// begins (stateless retry, RFC 9000 section 8.1.2): so many go on already that senders of forged
// addresses could take the places of others.
func (g *Gate) Crowded(remote netip.AddrPort) bool {
	s := g.server
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.handshakes) >= s.share() || s.peers[remote.Addr()] >= max(1, s.share()/2)
}

// Admit lets a handshake begin that is ended by Done, or says which bound it exceeds.
func (g *Gate) Admit(remote netip.AddrPort) (*Admission, error) {
	select {
	case g.server.handshakes <- struct{}{}:
	default:
		return nil, g.refused(remote, ErrTooManyHandshakes)
	}
	a, err := g.server.admit(remote)
	if err != nil {
		<-g.server.handshakes
		return nil, g.refused(remote, err)
	}
	return a, nil
}

func (g *Gate) refused(remote netip.AddrPort, err error) error {
	g.server.cfg.OnHandshakeError(remote, err)
	return err
}

// Done ends a handshake: with nil when it completed, with why it did not. It is called once.
func (a *Admission) Done(err error) {
	a.settle()
	<-a.server.handshakes
	if err != nil {
		a.server.cfg.OnHandshakeError(a.remote, NewTLSError(a.remote, err))
	}
}

// ServeEndpoint accepts tunnel connections of e as Serve does those of a listener.
func (s *Server) ServeEndpoint(ctx, force context.Context, e Endpoint) error {
	l, err := e.Listen(s.cfg.TLS, &Gate{server: s, Timeout: s.cfg.HandshakeTimeout})
	if err != nil {
		return fmt.Errorf("accept tunnel connections: %w", err)
	}
	var work sync.WaitGroup
	defer work.Wait()
	slots := make(chan struct{}, s.cfg.MaxConns)
	for {
		conn, err := l.Accept(ctx)
		if err != nil {
			err = errors.Join(err, l.Close())
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept tunnel connections: %w", err)
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Refuse()
			s.cfg.OnHandshakeError(conn.Conn().Remote, ErrTooManyConns)
			continue
		}
		work.Go(func() {
			defer func() { <-slots }()
			s.serveUntilExpiry(ctx, conn.Conn().TLS, conn.Admission(), func(ctx context.Context) error {
				return conn.Serve(ctx, force, s.serve)
			})
		})
	}
}
