package proxy

import (
	"errors"
	"fmt"
	"net"

	"github.com/raceway-mesh/raceway/hbone"
)

// streamLeg is the end of a connection that is a tunnelled stream.
type streamLeg struct {
	stream hbone.Stream
	name   string
}

func newStreamLeg(s hbone.Stream, name string) *streamLeg { return &streamLeg{stream: s, name: name} }

func (l *streamLeg) deliver(sink hbone.Sink) { l.stream.Deliver(sink) }

// write waits for the peer's window. The last bytes it leaves to closeWrite if that needs no waiting.
func (l *streamLeg) write(p []byte, last bool) (int, error) {
	if last && l.stream.Offer(p) {
		return len(p), nil
	}
	n, err := l.stream.Write(p)
	return n, l.fail("write to", err)
}

// offer has p sent with what others offer in r, or not at all.
func (l *streamLeg) offer(p []byte, _ bool, r *round) (int, error) {
	if !l.stream.Offer(p) {
		return 0, errAgain
	}
	r.offered(l.stream)
	return len(p), nil
}

// offerEnd is likewise for a clean end.
func (l *streamLeg) offerEnd(_ bool, r *round) bool {
	if !l.stream.OfferEnd() {
		return false
	}
	r.offered(l.stream)
	return true
}

func (l *streamLeg) closeWrite(bool) error { return l.fail("end the stream to", l.stream.CloseWrite()) }

func (l *streamLeg) finish() { _ = l.stream.Close() }

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
