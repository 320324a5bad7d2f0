package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"syscall"
)

// Predecessor is the agent that serves the node, as its successor knows it.
type Predecessor struct {
	Agent

	wire    *wire
	answers chan message  // to take
	gone    chan struct{} // closed when the connection has ended
	reading sync.WaitGroup
}

// Meet tells the agent that listens at path who is there. It returns nil when there is none,
// and an error when that agent will not have us as its successor. Close ends it.
func Meet(path string, self Agent) (*Predecessor, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("meet the agent that serves the node: %w", err)
	}
	p := &Predecessor{wire: newWire(conn), answers: make(chan message, 1), gone: make(chan struct{})}
	hello, err := p.greet(self)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("meet the agent that serves the node (%s): %w", path, err), conn.Close())
	}
	p.Agent = *hello.Agent
	p.reading.Go(p.read)
	return p, nil
}

func (p *Predecessor) greet(self Agent) (message, error) {
	if err := p.wire.send(message{Agent: &self}); err != nil {
		return message{}, err
	}
	hello, err := p.wire.receive(answerTimeout)
	if err == nil && hello.Agent == nil {
		err = errors.New("it does not say who it is")
	}
	return hello, err
}

func (p *Predecessor) read() {
	defer close(p.gone)
	for {
		m, err := p.wire.receive(0)
		if err != nil {
			return
		}
		select {
		case p.answers <- m:
		default: // nobody asked
		}
	}
}

// Take returns when the node is ours: the predecessor has let go of it, or is gone.
func (p *Predecessor) Take(ctx context.Context) error {
	if err := p.wire.send(message{Step: stepTake}); err != nil {
		return p.unlessGone(fmt.Errorf("take the node over: %w", err))
	}
	select {
	case m := <-p.answers:
		if m.Step != stepGiven {
			return fmt.Errorf("take the node over: the answer is %q", m.Step)
		}
		return nil
	case <-p.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("take the node over: %w", context.Cause(ctx))
	}
}

func (p *Predecessor) unlessGone(err error) error {
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

// Done tells that every pod is served by us.
func (p *Predecessor) Done() error {
	if err := p.wire.send(message{Step: stepDone}); err != nil {
		return p.unlessGone(fmt.Errorf("tell the predecessor that all is taken over: %w", err))
	}
	return nil
}

// Gone is closed when the predecessor has ended, or is about to: it takes nothing back then.
func (p *Predecessor) Gone() <-chan struct{} { return p.gone }

// Close gives the node back, if the predecessor is still there and we have let go of it. It
// may be called again.
func (p *Predecessor) Close() error {
	err := p.wire.Close()
	p.reading.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
