package h2

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
)

// flow is a hbone.DatagramStream: capsules on a stream (RFC 9297 section 3), whose Sink it is.
type flow struct {
	*stream
	inbox    hbone.Inbox
	capsules hbone.Capsules // of the stream's receiver

	out  []byte      // of Send
	busy atomic.Bool // the rest of a capsule is on its way

	sendFull, foreign atomic.Uint64 // datagrams dropped
}

// Send sends p as a capsule. What the peer's window has no room for is dropped; a capsule that
// fits in part is sent to its end, and what comes until then is dropped.
func (f *flow) Send(p []byte, _ bool) error {
	if len(p) > hbone.MaxDatagram {
		return &hbone.TooLargeError{Max: hbone.MaxDatagram}
	}
	if f.inbox.Closed() {
		return net.ErrClosed
	}
	if f.busy.Load() {
		f.sendFull.Add(1)
		return nil
	}
	f.out = hbone.AppendCapsule(f.out[:0], p)
	n, err := f.windowNow(len(f.out))
	switch {
	case err != nil:
		return err
	case n == 0:
		f.sendFull.Add(1)
		return nil
	case n < len(f.out):
		return f.sendInParts(n)
	}
	return f.conn.writeData(f.stream, f.out)
}

// windowNow takes at most n of the window, without waiting.
func (s *stream) windowNow(n int) (int, error) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.writeErrLocked(); err != nil {
		return 0, err
	}
	m := max(0, min(int64(n), s.sendWindow, c.sendWindow))
	s.spendLocked(m)
	return int(m), nil
}

// sendInParts sends n bytes of out now and the others when there is room.
func (f *flow) sendInParts(n int) error {
	out := f.out
	f.out = nil
	if err := f.conn.writeData(f.stream, out[:n]); err != nil {
		return err
	}
	c := f.conn
	c.mu.Lock() // orders it before the Wait of run
	defer c.mu.Unlock()
	if err := f.writeErrLocked(); err != nil {
		return err
	}
	f.busy.Store(true)
	c.background.Go(func() {
		defer f.busy.Store(false)
		_, _ = f.Write(out[n:]) // its failure is the flow's end
	})
	return nil
}

// Deliver hands over what waits, and then what arrives.
func (f *flow) Deliver(sink hbone.DatagramSink) { f.inbox.Deliver(sink) }

// Take finds the datagrams in what arrives. It always has room.
func (f *flow) Take(p []byte, _ bool) int {
	foreign := f.capsules.Foreign
	err := f.capsules.Feed(p, f.inbox.Arrived)
	f.foreign.Add(f.capsules.Foreign - foreign)
	if err != nil {
		f.malformed(err)
	}
	return len(p)
}

// malformed ends the flow for what the peer sent.
func (f *flow) malformed(err error) {
	f.close(http2.ErrCodeProtocol)
	f.inbox.End(err)
}

// Full is never called.
func (f *flow) Full() {}

// End is how the stream ended.
func (f *flow) End(err error) {
	var reset *hbone.ResetError
	if errors.As(err, &reset) && reset.Remote {
		switch http2.ErrCode(reset.Code) {
		case http2.ErrCodeConnect:
			err = fmt.Errorf("flow: %w", hbone.PortClosedError{})
		case http2.ErrCodeNo: // Close
			err = nil
		}
	}
	if err == nil {
		err = f.capsules.End()
	}
	f.inbox.End(err)
}

// Drops is what was dropped so far.
func (f *flow) Drops() hbone.DatagramDrops {
	return hbone.DatagramDrops{SendFull: f.sendFull.Load(), ReceiveFull: f.inbox.Full(), Foreign: f.foreign.Load()}
}

// Refuse resets the stream with CONNECT_ERROR, as RFC 9113 section 8.5 has it for TCP.
func (f *flow) Refuse() error {
	if f.inbox.Close() {
		f.close(http2.ErrCodeConnect)
	}
	return nil
}

// Close ends our direction cleanly, unless a capsule is on its way, and then the stream.
func (f *flow) Close() error {
	if !f.inbox.Close() {
		return nil
	}
	if !f.busy.Load() {
		_ = f.CloseWrite() // fails when the peer was first
	}
	f.close(http2.ErrCodeNo)
	return nil
}

func (f *flow) close(code http2.ErrCode) {
	f.conn.mu.Lock()
	defer f.conn.release()
	f.closeLocked(code)
}

// accept answers 200 to a request for UDP.
func (f *flow) accept(response hbone.Response) (hbone.DatagramStream, error) {
	if _, err := f.stream.accept(response); err != nil {
		return nil, err
	}
	f.stream.Deliver(f)
	return f, nil
}

// abandon closes a flow that was accepted and not delivered.
func (f *flow) abandon() {
	f.conn.mu.Lock()
	accepted := f.sink != nil
	f.conn.mu.Unlock()
	if accepted {
		_ = f.Close() // never fails
	}
}

// OpenDatagrams sends an extended CONNECT when the peer's SETTINGS have said that it takes it
// (RFC 8441 section 3), and the first datagrams as far as their capsules fit behind it.
func (s *session) OpenDatagrams(ctx context.Context, r *hbone.Request, first [][]byte) (hbone.DatagramStream, *hbone.Response, error) {
	if err := s.awaitExtendedConnect(ctx); err != nil {
		s.Release()
		return nil, nil, err
	}
	o, err := s.begin(r, hbone.UDP)
	if err != nil {
		return nil, nil, err
	}
	o.Send(nil, false)
	for len(first) > 0 && o.sendWhole(hbone.AppendCapsule(nil, first[0])) {
		first = first[1:]
	}
	_, response, err := o.Answer(ctx)
	if err != nil {
		return nil, nil, err
	}
	f := &flow{stream: o.stream}
	f.stream.Deliver(f)
	for _, p := range first {
		if err := f.Send(p, true); err != nil {
			break // its user is told by End
		}
	}
	return f, response, nil
}

// awaitExtendedConnect waits until it is known whether the peer takes it.
func (s *session) awaitExtendedConnect(ctx context.Context) error {
	select {
	case <-s.client.settings:
	case <-s.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.conn.err != nil:
		return refused(s.conn.err)
	case !s.peer.connectProtocol:
		return hbone.ErrNoDatagrams
	}
	return nil
}

// sendWhole queues p behind the request, all or nothing. It may be sent again with another try.
func (o opening) sendWhole(p []byte) bool {
	c := o.conn
	c.mu.Lock()
	defer c.release()
	if o.writeErrLocked() != nil || int64(len(p)) > min(o.sendWindow, c.sendWindow, initialFrame) {
		return false
	}
	o.sendWindow -= int64(len(p))
	c.sendWindow -= int64(len(p))
	c.pushLocked(control{kind: controlData, stream: o.id, data: p})
	return true
}
