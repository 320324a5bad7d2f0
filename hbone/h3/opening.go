package h3

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/quic-go/qpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// maxFirst is how many first bytes travel with a CONNECT.
const maxFirst = 16 << 10

// reply is a request that waits for its answer.
type reply struct {
	*exchange
	fields []qpack.HeaderField // of the request, until they are sent

	settled chan struct{} // closed when one of the following is there

	mu       sync.Mutex
	response *hbone.Response
	status   int
	err      error
}

// settle notes the outcome, once, and reports whether it is this one.
func (r *reply) settle(response *hbone.Response, status int, err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.settled:
		return false
	default:
	}
	r.response, r.status, r.err = response, status, err
	close(r.settled)
	return true
}

func (r *reply) fail(err error) bool { return r.settle(nil, 0, err) }

// await reads the answer.
func (r *reply) await() {
	for {
		fields, err := r.in.headers(hbone.MaxResponseHeaderList)
		if err != nil {
			r.fail(r.unanswered(err))
			return
		}
		status, response, err := parseResponse(fields)
		switch {
		case err != nil:
			r.fail(r.judge(err))
			return
		case status < 200:
		case status == 200:
			r.settle(response, 0, nil)
			return
		default:
			r.settle(nil, status, nil)
			r.reset(codeCancelled)
			return
		}
	}
}

// unanswered is the error of an answer that cannot be read.
func (r *reply) unanswered(err error) error {
	switch {
	case codeOf(err) == codeRejected: // RFC 9114 section 4.1.1: not processed
		return refused(r.conn.fault(err))
	case errors.Is(err, errTooLarge):
		return r.judge(&streamError{codeLoad, "response headers are too large"})
	}
	return r.judge(err)
}

// opening is a hbone.Opening. The header leaves with the first Send, and in the background when
// there is no room for it.
type opening struct {
	*reply
	sent  bool // the header, or it is being sent
	early bool // bytes behind it
	ended bool
}

// Start opens a stream for CONNECT.
func (s *session) Start(r *hbone.Request) (hbone.Opening, error) {
	fields, err := connectFields(r, hbone.TCP, s.info.Remote)
	if err != nil {
		s.Release()
		return nil, err
	}
	reply, err := s.begin(fields)
	if err != nil {
		return nil, err
	}
	s.spawn(reply.await)
	return &opening{reply: reply}, nil
}

// Send queues what there is room for now.
func (o *opening) Send(p []byte, end bool) int {
	p2 := p[:min(len(p), maxFirst)]
	if !o.sent {
		o.sent = true
		header := headersFrame(o.fields)
		if len(p2) > 0 && o.try(header, p2) {
			return o.sentBytes(p, len(p2), end)
		}
		if o.q.TryWriteAll(header) != nil { // no room even for it, or reset
			o.conn.spawn(func() {
				o.wmu.Lock()
				defer o.wmu.Unlock()
				_, _ = o.q.Write(header) // await tells why it cannot be written
			})
			return 0
		}
		if len(p2) > 0 {
			return 0
		}
	}
	if len(p2) > 0 && !o.try(nil, p2) {
		return 0
	}
	return o.sentBytes(p, len(p2), end)
}

// try queues header and one DATA frame of p, all or nothing.
func (o *opening) try(header, p []byte) bool {
	b := append(appendDataHeader(header[:len(header):len(header)], len(p)), p...)
	return o.q.TryWriteAll(b) == nil
}

// sentBytes notes that n of p were queued, and ends our direction behind all of it.
func (o *opening) sentBytes(p []byte, n int, end bool) int {
	o.early = o.early || n > 0
	if end && n == len(p) && !o.ended {
		o.ended = o.q.Close() == nil
		o.early = o.early || o.ended
	}
	return n
}

// Settled is closed when there is an outcome.
func (o *opening) Settled() <-chan struct{} { return o.settled }

// Answer tells the outcome.
func (o *opening) Answer(ctx context.Context) (hbone.Stream, *hbone.Response, error) {
	response, err := o.outcome(ctx)
	if err == nil {
		s := newStream(o.exchange)
		s.sentEnd = o.ended
		return s, response, nil
	}
	var status *hbone.StatusError
	if o.early && !errors.As(err, &status) && !errors.Is(err, hbone.ErrRefused) {
		return nil, nil, fmt.Errorf("%w: %w", hbone.ErrUncertain, err)
	}
	return nil, nil, err
}

// outcome waits for the answer. A request is refused when the peer says that it did not process
// it, and when the connection dies before the answer and nothing but CONNECT was sent, or by an
// alert: a peer that does not accept our certificate has handed nothing on.
func (o *opening) outcome(ctx context.Context) (*hbone.Response, error) {
	response, err := o.wait(ctx)
	if errors.Is(err, errLost) {
		err = fmt.Errorf("%w: %w", errNoAnswer, err)
		if !o.early || isAlert(err) {
			err = refused(err)
		}
	}
	return response, err
}

// isAlert knows a TLS alert from the peer, as handshakeCause puts it.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// wait waits for what settles r, or gives it up.
func (r *reply) wait(ctx context.Context) (*hbone.Response, error) {
	select {
	case <-r.settled:
	case <-ctx.Done():
		r.give(ctx.Err())
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.err != nil:
		r.reset(codeCancelled) // both directions, or quic-go keeps the stream
		r.leave()
		return nil, r.err
	case r.status != 0:
		r.leave()
		return nil, &hbone.StatusError{Status: r.status}
	}
	return r.response, nil
}

// give gives it up because of err.
func (r *reply) give(err error) {
	r.fail(err)
	r.reset(codeCancelled)
	r.leave()
}

// Close gives it up, unless it was answered.
func (o *opening) Close() {
	select {
	case <-o.settled:
		o.mu.Lock()
		answered := o.response != nil
		o.mu.Unlock()
		if answered {
			return
		}
	default:
	}
	o.give(net.ErrClosed)
}

// OpenDatagrams opens a stream for CONNECT-UDP, when the peer has said that it takes it.
func (s *session) OpenDatagrams(ctx context.Context, r *hbone.Request, first [][]byte) (hbone.DatagramStream, *hbone.Response, error) {
	f, response, err := s.openDatagrams(ctx, r, first)
	if err != nil {
		return nil, nil, err
	}
	return f, response, nil
}

func (s *session) openDatagrams(ctx context.Context, r *hbone.Request, first [][]byte) (*flow, *hbone.Response, error) {
	fields, err := s.datagramFields(ctx, r)
	if err != nil {
		s.Release()
		return nil, nil, err
	}
	reply, err := s.begin(fields)
	if err != nil {
		return nil, nil, err
	}
	f := newFlow(reply.exchange)
	s.enter(f)
	stop := context.AfterFunc(ctx, func() { reply.give(ctx.Err()) })
	defer stop()
	if err := f.sendHeaders(fields); err == nil {
		for _, p := range first {
			if f.Send(p, true) != nil {
				break // await tells why
			}
		}
	}
	reply.await()
	response, err := reply.wait(ctx)
	if err == nil && !stop() {
		err = ctx.Err()
	}
	var reset *hbone.ResetError
	if errors.As(err, &reset) && reset.Remote && code(reset.Code) == codeConnect {
		err = hbone.PortClosedError{} // the reset overtook the 200
	}
	if err != nil {
		if errors.Is(err, errLost) {
			err = refused(fmt.Errorf("%w: %w", errNoAnswer, err))
		}
		return nil, nil, err
	}
	s.spawn(f.read)
	return f, response, nil
}

// datagramFields waits for the peer's SETTINGS, without which extended CONNECT may not be sent
// (RFC 9220 section 3).
func (s *session) datagramFields(ctx context.Context, r *hbone.Request) ([]qpack.HeaderField, error) {
	peer, err := s.awaitSettings(ctx)
	switch {
	case err != nil && ctx.Err() == nil:
		return nil, refused(err)
	case err != nil:
		return nil, err
	case !peer.connectProtocol:
		return nil, hbone.ErrNoDatagrams
	}
	return connectFields(r, hbone.UDP, s.info.Remote)
}
