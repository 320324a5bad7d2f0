package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// Limits of the server.
const (
	requestTimeout = 5 * time.Second  // to read a request
	answerTimeout  = 30 * time.Second // to work out an answer; a plugin waits no longer
	writeTimeout   = 5 * time.Second  // for the plugin to take it
	drainTimeout   = 5 * time.Second  // at shutdown
	maxHeaderBytes = 4 << 10
	maxBodyBytes   = 64 << 10
)

// Config is what a Server needs. All of it is required.
type Config struct {
	Socket  string // path of the unix socket
	Handler Handler
	Log     *slog.Logger
}

// Server is the agent's end.
type Server struct {
	listener *listener
	handler  Handler
	log      *slog.Logger
}

// Listen takes the socket, also from an agent that runs: call it when this one can answer.
// Run or Close releases it.
func Listen(c Config) (*Server, error) {
	l, err := listen(c.Socket)
	if err != nil {
		return nil, err
	}
	return &Server{listener: l, handler: c.Handler, log: c.Log}, nil
}

// Close releases the socket of a server that does not run; it may be called again.
func (s *Server) Close() error { return s.listener.Close() }

// Run serves until ctx ends, and returns nil then. What is under way has a moment to end.
func (s *Server) Run(ctx context.Context) error {
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	server := &http.Server{
		Handler:        s.routes(),
		ReadTimeout:    requestTimeout,
		WriteTimeout:   requestTimeout + answerTimeout + writeTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:    func(net.Listener) context.Context { return serving },
		ConnContext:    withPeer,
	}
	server.SetKeepAlivesEnabled(false) // each plugin asks once
	stop, stopped := context.WithCancel(ctx)
	var stopping sync.WaitGroup
	stopping.Go(func() {
		<-stop.Done()
		grace, done := context.WithTimeout(serving, drainTimeout)
		defer done()
		if err := server.Shutdown(grace); err != nil {
			s.log.Debug("CNI requests were cut", "error", errors.Join(err, server.Close()))
		}
	})
	err := server.Serve(s.listener)
	stopped()
	stopping.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("serve the CNI plugin: %w", err)
	}
	return errors.Join(err, s.listener.Close())
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathAdd, s.serve(s.handler.Add))
	mux.HandleFunc("POST "+pathCheck, s.serve(withoutCapture(s.handler.Check)))
	mux.HandleFunc("POST "+pathDel, s.serve(withoutCapture(s.handler.Del)))
	mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) {
		s.reply(w, http.StatusNotFound, answer{Error: fmt.Sprintf("there is no %s %s: this agent may be older than the plugin", q.Method, q.URL.Path)})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if err := authorize(q.Context()); err != nil {
			s.reply(w, http.StatusForbidden, answer{Error: err.Error()})
			return
		}
		mux.ServeHTTP(w, q)
	})
}

type verb func(context.Context, discovery.Sandbox) (bool, error)

func withoutCapture(fn func(context.Context, discovery.Sandbox) error) verb {
	return func(ctx context.Context, s discovery.Sandbox) (bool, error) { return false, fn(ctx, s) }
}

func (s *Server) serve(do verb) http.HandlerFunc {
	return func(w http.ResponseWriter, q *http.Request) {
		asked, err := read(w, q)
		if err != nil {
			s.reply(w, http.StatusBadRequest, answer{Error: err.Error()})
			return
		}
		ctx, cancel := context.WithTimeout(q.Context(), answerTimeout)
		defer cancel()
		captured, err := do(ctx, asked)
		switch {
		case errors.Is(err, ErrNotReady):
			s.reply(w, http.StatusServiceUnavailable, answer{Error: err.Error()})
		case err != nil:
			s.log.Warn("CNI request failed", "verb", q.URL.Path, "pod", asked.Pod, "netns", asked.NetNS, "error", err)
			s.reply(w, http.StatusInternalServerError, answer{Error: err.Error()})
		default:
			s.reply(w, http.StatusOK, answer{Captured: captured})
		}
	}
}

func read(w http.ResponseWriter, q *http.Request) (discovery.Sandbox, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, q.Body, maxBodyBytes))
	if err != nil {
		return discovery.Sandbox{}, fmt.Errorf("read the request: %w", err)
	}
	var in sandbox
	if err := json.Unmarshal(body, &in); err != nil {
		return discovery.Sandbox{}, fmt.Errorf("read the request: %w", err)
	}
	if in.Pod.Namespace == "" || in.Pod.Name == "" {
		return discovery.Sandbox{}, errors.New("the request names no pod")
	}
	for i, a := range in.Addrs {
		in.Addrs[i] = a.Unmap()
	}
	return discovery.Sandbox(in), nil
}

func (s *Server) reply(w http.ResponseWriter, status int, a answer) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(a); err != nil {
		s.log.Debug("CNI plugin is gone", "error", err)
	}
}
