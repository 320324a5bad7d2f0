package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of the server. None of them bounds how long a stream lives.
const (
	headerTimeout  = 5 * time.Second  // to read a request's header
	bodyTimeout    = 5 * time.Second  // to read its body
	answerTimeout  = time.Minute      // to work out an answer; a check of 200 pods takes its time
	writeTimeout   = 10 * time.Second // for the reader to take an answer, or one record of a stream
	idleTimeout    = time.Minute
	drainTimeout   = 2 * time.Second // at shutdown
	maxHeaderBytes = 16 << 10
	maxBodyBytes   = 4 << 10
	maxParameter   = 1 << 10
)

// Config is what a Server needs. All of it is required.
type Config struct {
	Socket  string // path of the unix socket
	Backend Backend
	Log     *slog.Logger
}

// Server is the agent's end of the API.
type Server struct {
	listener *listener
	backend  Backend
	log      *slog.Logger
}

// New takes the socket. Run or Close releases it.
func New(c Config) (*Server, error) {
	l, err := listen(c.Socket)
	if err != nil {
		return nil, err
	}
	return &Server{listener: l, backend: c.Backend, log: c.Log}, nil
}

// Close releases the socket of a server that does not run; it may be called again.
func (s *Server) Close() error { return s.listener.Close() }

// Run serves until ctx ends; streams end with it. It returns nil then.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	server := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withPeer,
	}
	var stopping sync.WaitGroup
	stopping.Go(func() {
		<-ctx.Done()
		grace, done := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer done()
		if err := server.Shutdown(grace); err != nil {
			s.log.Debug("admin requests were cut", "error", errors.Join(err, server.Close()))
		}
	})
	err := server.Serve(s.listener)
	cancel()
	stopping.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("serve the admin API: %w", err)
	}
	return errors.Join(err, s.listener.Close())
}

// Serve serves backend on a unix socket until ctx ends. It returns at once when another
// agent has the socket.
func Serve(ctx context.Context, socketPath string, backend Backend, log *slog.Logger) error {
	s, err := New(Config{Socket: socketPath, Backend: backend, Log: log})
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

type peerKey struct{}

// withPeer judges a connection once; every request on it gets the verdict. It answers 403
// rather than to hang up, for an operator who forgot sudo.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, peerVerdict{checkPeer(conn)})
}

type peerVerdict struct{ err error }

// authorize fails closed: a request without a verdict is refused.
func authorize(ctx context.Context) error {
	v, ok := ctx.Value(peerKey{}).(peerVerdict)
	if !ok {
		return errors.New("the connection's peer is not known")
	}
	return v.err
}
