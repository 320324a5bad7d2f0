package h2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// opening is a hbone.Opening: a client's stream until it is answered.
//
//	Start ─► HEADERS queued ─► Send: DATA behind it ─┬─► 200: the stream is its user's
//	                                                 └─► refused, another status, lost
type opening struct{ *stream }

// silentAfter a PING without an answer a peer may be gone: it gets CONNECT, which can be tried
// again if it is, and no first bytes, which could not.
const silentAfter = time.Second

// isSilentLocked reports whether the peer may be gone.
func (c *conn) isSilentLocked() bool {
	return c.pinged && time.Duration(c.lastRead.Load()) < c.ping && time.Since(c.start)-c.ping > silentAfter
}

// Send queues a copy: whoever writes now may hold the connection for as long as the network
// takes nothing.
func (o opening) Send(p []byte, end bool) int {
	c := o.conn
	c.mu.Lock()
	defer c.release() // CONNECT as well
	if o.writeErrLocked() != nil || c.isSilentLocked() {
		return 0
	}
	n := int(max(0, min(int64(len(p)), o.sendWindow, c.sendWindow, initialFrame)))
	if end = end && n == len(p); n == 0 && !end {
		return 0
	}
	o.sendWindow -= int64(n)
	c.sendWindow -= int64(n)
	o.early = true
	o.sentEnd = end
	c.pushLocked(control{kind: controlData, stream: o.id, data: bytes.Clone(p[:n]), end: end})
	return n
}

// Settled is closed when there is an outcome.
func (o opening) Settled() <-chan struct{} { return o.settled }

// Answer tells the outcome. A stream is refused when the peer says that it did not process it,
// and when the connection dies before the answer and nothing but CONNECT was sent: nothing is
// lost by another try then.
func (o opening) Answer(ctx context.Context) (hbone.Stream, *hbone.Response, error) {
	select {
	case <-o.settled:
	case <-ctx.Done():
		o.Close()
	}
	c := o.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case o.status != 0:
		return nil, nil, &hbone.StatusError{Status: o.status}
	case o.closed:
		return nil, nil, o.uncertain(ctx.Err())
	case o.answered: // an end that came behind it is for the stream's user
		response := o.response
		o.settled, o.response = nil, nil // an idle stream keeps none of it
		return o.stream, response, nil
	case errors.Is(o.err, hbone.ErrRefused):
		return nil, nil, o.err
	case c.err != nil && errors.Is(o.err, c.err):
		return nil, nil, o.lostLocked()
	default:
		return nil, nil, o.uncertain(o.err)
	}
}

// lostLocked is for a connection that died before the answer. A peer that has not sent SETTINGS
// has not accepted our certificate, so it has handed nothing on.
func (o opening) lostLocked() error {
	err := fmt.Errorf("%w: %w", errNoAnswer, o.conn.err)
	if o.early && o.conn.sawSettings {
		return o.uncertain(err)
	}
	return refused(err)
}

// uncertain is err, unless bytes may have reached the peer's application.
func (o opening) uncertain(err error) error {
	if o.early {
		return fmt.Errorf("%w: %w", hbone.ErrUncertain, err)
	}
	return err
}

// Close gives the stream up.
func (o opening) Close() { _ = o.stream.Close() } // never fails
