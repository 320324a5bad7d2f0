package hbone

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUncertain marks an Open that failed after first bytes were sent and in a way that leaves
// open whether the peer handed them on. It must not be tried again: a request could be done
// twice.
var ErrUncertain = errors.New("the peer may have handed on the first bytes")

// Beginning is a socket that first bytes come from. Nobody else reads it while it is in an Open.
type Beginning interface {
	// Recv is read(2) without waiting: EAGAIN when there is nothing, 0 at the end.
	Recv(p []byte) (int, error)
	// Notify sends to ready, once, when there is something to read, an end or an error, be it after the
	// Open. conn carries the stream.
	Notify(conn *Conn, ready chan<- struct{})
}

// First is what an application says before its stream is open. It travels behind the CONNECT
// without waiting for the answer, and is kept until then: an Open that the peer refused, or
// that it answered with another status than 200, did not reach the peer's application, and the
// same bytes go along with the next, be it to another peer.
//
//	application ─► buf ─┬─► DATA behind CONNECT ─► 200: forgotten
//	                    └─────────────────────── refused: again, on another session
//
// It belongs to the goroutine of the Open.
type First struct {
	from  Beginning
	buf   []byte
	n     int   // bytes of buf
	sent  int   // of n, in the present stream
	ended bool  // the application has ended its direction behind them
	err   error // why there is no stream to open any more
	ready chan struct{}
}

// NewFirst reads from as far as buf is long.
func NewFirst(from Beginning, buf []byte) *First {
	return &First{from: from, buf: buf, ready: make(chan struct{}, 1)}
}

// Len is how many bytes were read; 0 of nil.
func (f *First) Len() int {
	if f == nil {
		return 0
	}
	return f.n
}

// read takes what is there.
func (f *First) read() {
	switch n, err := f.from.Recv(f.buf[f.n:]); {
	case errors.Is(err, unix.EAGAIN):
	case err != nil:
		f.err = fmt.Errorf("read first bytes: %w", os.NewSyscallError("read", err))
	case n == 0:
		f.ended = true
	default:
		f.n += n
	}
}

// wanting reports whether there is room for more, and somebody who may say it.
func (f *First) wanting() bool { return f != nil && f.err == nil && !f.ended && f.n < len(f.buf) }

// begin sends CONNECT and behind it what is there.
func (f *First) begin(o Opening) {
	if f == nil {
		o.Send(nil, false)
		return
	}
	f.sent = 0
	if f.wanting() {
		f.read()
	}
	f.send(o)
}

func (f *First) send(o Opening) { f.sent += o.Send(f.buf[f.sent:f.n], f.ended) }

// follow sends what comes until o, which conn carries, has an outcome, ctx ends, or nothing more fits.
func (f *First) follow(ctx context.Context, conn *Conn, o Opening) {
	for f.wanting() {
		f.from.Notify(conn, f.ready)
		select {
		case <-f.ready:
		case <-o.Settled():
			return
		case <-ctx.Done():
			return
		}
		before := f.n
		if f.read(); f.n > before || f.ended {
			f.send(o)
		}
	}
}

// failed is why the application is not to be waited for any more.
func (f *First) failed() error {
	if f == nil {
		return nil
	}
	return f.err
}

// finish sends what did not fit before the answer.
func (f *First) finish(ctx context.Context, s Stream) error {
	if f == nil || f.sent == f.n && !f.ended {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	var err error
	if f.sent < f.n {
		var n int
		n, err = s.Write(f.buf[f.sent:f.n])
		f.sent += n
	}
	if err == nil && f.ended {
		err = s.CloseWrite()
	}
	if !stop() {
		return ctx.Err()
	}
	return err
}
