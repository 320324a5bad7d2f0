package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// Successor is an agent that wants to serve the node, as the one that serves it knows it.
type Successor struct {
	Agent

	wire    *wire
	done    chan struct{} // closed when it has taken all pods over
	gone    chan struct{} // closed when the connection has ended
	reading sync.WaitGroup
}

// Grant tells it that the node is its own.
func (s *Successor) Grant() error {
	if err := s.wire.send(message{Step: stepGiven}); err != nil {
		return fmt.Errorf("give the node to a successor: %w", err)
	}
	return nil
}

// Done is closed when the successor serves every pod.
func (s *Successor) Done() <-chan struct{} { return s.done }

// Gone is closed when the successor has ended, or has given the node back.
func (s *Successor) Gone() <-chan struct{} { return s.gone }

// Close tells it that we take nothing back any more. It may be called again.
func (s *Successor) Close() error {
	err := s.wire.Close()
	s.reading.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (s *Successor) read() {
	defer close(s.gone)
	for told := false; ; {
		m, err := s.wire.receive(0)
		if err != nil {
			return
		}
		if m.Step == stepDone && !told {
			told = true
			close(s.done)
		}
	}
}

// Listener waits for successors.
type Listener struct {
	self     Agent
	listener *net.UnixListener
	log      *slog.Logger
	asked    chan *Successor
}

// Listen listens at path, where nobody else may listen: its caller owns the node. Run or Close
// releases it.
func Listen(path string, self Agent, log *slog.Logger) (*Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the socket of an earlier agent: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for successors: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict %s to its owner: %w", path, err), l.Close())
	}
	return &Listener{self: self, listener: l, log: log, asked: make(chan *Successor)}, nil
}

// Asked delivers a successor that asks for the node. Whoever receives it grants and closes it.
func (l *Listener) Asked() <-chan *Successor { return l.asked }

// Close removes the socket. It may be called again.
func (l *Listener) Close() error {
	if err := l.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Run talks to agents that come until ctx ends, and returns nil then. Those that were not
// delivered are sent away.
func (l *Listener) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })() // again below, with its error
	var talks sync.WaitGroup
	defer talks.Wait()
	for {
		conn, err := l.listener.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // too late: it will find the next agent
			}
			return l.Close()
		}
		if err != nil {
			l.log.Warn("accept a successor", "error", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		talks.Go(func() { l.talk(ctx, newWire(conn)) })
	}
}

// talk owns w until a successor is delivered with it.
func (l *Listener) talk(ctx context.Context, w *wire) {
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	s, err := l.meet(w)
	if err != nil {
		stop()
		l.log.Debug("no successor", "error", errors.Join(err, w.Close()))
		return
	}
	stop() // from here on the connection is the successor's
	s.reading.Go(s.read)
	select {
	case l.asked <- s:
	case <-ctx.Done():
		if err := s.Close(); err != nil { // it will find the next agent
			l.log.Debug("send a successor away", "error", err)
		}
	}
}

// meet waits for the successor to ask.
func (l *Listener) meet(w *wire) (*Successor, error) {
	if err := checkPeer(w.UnixConn); err != nil {
		return nil, errors.Join(err, w.send(message{Error: err.Error()}))
	}
	hello, err := w.receive(answerTimeout)
	if err != nil {
		return nil, err
	}
	if hello.Agent == nil || hello.Agent.Node != l.self.Node {
		err := fmt.Errorf("this agent serves node %s, and no other can take its state over", l.self.Node)
		return nil, errors.Join(err, w.send(message{Error: err.Error()}))
	}
	if err := w.send(message{Agent: &l.self}); err != nil {
		return nil, err
	}
	for {
		m, err := w.receive(0)
		if err != nil {
			return nil, err
		}
		if m.Step == stepTake {
			return &Successor{Agent: *hello.Agent, wire: w, done: make(chan struct{}), gone: make(chan struct{})}, nil
		}
	}
}
