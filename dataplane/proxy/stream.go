package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// streamLeg is the end of a connection that is a tunnelled stream.
type streamLeg struct {
	stream hbone.Stream
	name   string
	// done ends when the stream does other than cleanly; nil where nothing tells.
	done <-chan struct{}
	over chan struct{} // closed by finish and abort
}

func newStreamLeg(s hbone.Stream, name string, done <-chan struct{}) *streamLeg {
	return &streamLeg{stream: s, name: name, done: done, over: make(chan struct{})}
}

// read waits for bytes.
func (l *streamLeg) read(p []byte) (int, error) {
	n, err := l.stream.Read(p)
	if errors.Is(err, io.EOF) && n == 0 {
		return 0, io.EOF
	}
	if n > 0 {
		return n, nil // an error comes again
	}
	return 0, l.fail("read from", err)
}

// write waits for the peer's window.
func (l *streamLeg) write(p []byte) (int, error) {
	n, err := l.stream.Write(p)
	return n, l.fail("write to", err)
}

func (l *streamLeg) closeWrite() error { return l.fail("end the stream to", l.stream.CloseWrite()) }

// resetPoll is how often a stream that nothing tells about is asked whether it still lives.
// Only connections that the peer half closed and that are idle are.
const resetPoll = 5 * time.Second

// awaitReset returns an error once the stream was reset, after its clean end was read, and
// nil once it was closed here.
func (l *streamLeg) awaitReset() error {
	if l.done != nil {
		select {
		case <-l.over:
			return nil
		case <-l.done:
			return fmt.Errorf("%s reset the stream", l.name)
		}
	}
	ticker := time.NewTicker(resetPoll)
	defer ticker.Stop()
	for {
		select {
		case <-l.over:
			return nil
		case <-ticker.C:
			if _, err := l.stream.Write(nil); err != nil {
				return l.fail("write to", err)
			}
		}
	}
}

func (l *streamLeg) finish() {
	close(l.over)
	_ = l.stream.Close()
}

func (l *streamLeg) abort() { l.finish() } // Close resets what has not ended cleanly

func (l *streamLeg) fail(deed string, err error) error {
	var remote *hbone.ResetError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &remote) && remote.Remote:
		return fmt.Errorf("%s reset the stream: %w", l.name, err)
	case errors.Is(err, net.ErrClosed):
		return err
	}
	return fmt.Errorf("%s %s: %w", deed, l.name, err)
}
