package h3

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/quic-go/qpack"
	"github.com/quic-go/quic-go"
)

// exchange is the stream of one request, on either end. Its reading belongs to one goroutine at a
// time.
type exchange struct {
	conn   *conn
	q      *quic.Stream
	window *window
	in     input
	left   uint64 // of the DATA frame that is being read

	wmu   sync.Mutex // held while writing
	leave func()     // takes it out of its connection; may be called again
}

func newExchange(c *conn, q *quic.Stream, w *window, leave func()) *exchange {
	return &exchange{
		conn: c, q: q, window: w, in: input{from: reader{q, c.quic, w}},
		leave: sync.OnceFunc(func() {
			w.give()
			leave()
		}),
	}
}

// reset ends both directions. What has ended stays as it is, but quic-go keeps a stream, and the
// peer's place for it, until its user has ended both.
func (x *exchange) reset(code code) {
	x.q.CancelWrite(quic.StreamErrorCode(code))
	x.q.CancelRead(quic.StreamErrorCode(code))
}

// judge acts on an error of reading: the peer is told if it broke the protocol. It returns the
// error for the exchange's user.
func (x *exchange) judge(err error) error {
	var offence *streamError
	var broke *connError
	switch {
	case errors.As(err, &broke):
		x.conn.shut(broke, broke.code)
		return fmt.Errorf("%w: %w", errLost, broke)
	case errors.As(err, &offence):
		x.reset(offence.code)
		return offence
	case errors.Is(err, errTruncated):
		x.reset(codeIncomplete)
		return errTruncated
	}
	return x.conn.fault(err)
}

// data gives the next bytes of DATA frames, which are good until the next call. io.EOF is the
// clean end: behind a whole frame.
func (x *exchange) data() ([]byte, error) {
	for x.left == 0 {
		kind, length, err := x.in.header()
		switch {
		case err != nil:
			return nil, err
		case kind == frameData:
			x.left = length
			continue
		case known(kind): // on a connected stream there is only DATA (RFC 9114 section 4.4)
			return nil, &connError{codeUnexpected, fmt.Sprintf("frame of type %#x on a tunnel", kind)}
		}
		if err := x.in.skip(length); err != nil {
			return nil, err
		}
	}
	p, err := x.in.next(x.left)
	if err != nil {
		return nil, cut(err)
	}
	x.left -= uint64(len(p))
	x.conn.moved.Add(uint64(len(p)))
	return p, nil
}

// sendHeaders sends a message's header, and waits for the room to.
func (x *exchange) sendHeaders(fields []qpack.HeaderField) error {
	x.wmu.Lock()
	defer x.wmu.Unlock()
	_, err := x.q.Write(headersFrame(fields))
	return err
}

// isEnd reports whether err is a direction's clean end.
func isEnd(err error) bool { return errors.Is(err, io.EOF) }
