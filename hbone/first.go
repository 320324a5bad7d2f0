package hbone

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// ErrUncertain marks an Open that failed after first bytes were sent and in a way that leaves
// open whether the peer handed them on. It must not be tried again: a request could be done
// twice.
var ErrUncertain = errors.New("the peer may have handed on the first bytes")

// Beginning is a socket that first bytes come from. Nobody else reads it while it is in an Open,
// nor sets its read deadline, which there is none on return.
type Beginning interface {
	syscall.Conn
	SetReadDeadline(t time.Time) error
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
	raw   syscall.RawConn
	buf   []byte
	n     int   // bytes of buf
	sent  int   // of n, in the present stream
	ended bool  // the application has ended its direction behind them
	err   error // why there is no stream to open any more

	settled atomic.Bool // the present stream needs no more of it
}

// NewFirst reads from as far as buf is long.
func NewFirst(from Beginning, buf []byte) (*First, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("read first bytes: %w", err)
	}
	return &First{from: from, raw: raw, buf: buf}, nil
}

// Len is how many bytes were read; 0 of nil.
func (f *First) Len() int {
	if f == nil {
		return 0
	}
	return f.n
}

// read takes what is there, or waits for it, and reports whether there may be more to come.
func (f *First) read(wait bool) bool {
	var n int
	var failure error
	err := f.raw.Read(func(fd uintptr) bool {
		n, failure = nonblock.Read(fd, f.buf[f.n:])
		return !wait || !errors.Is(failure, unix.EAGAIN)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), err == nil && errors.Is(failure, unix.EAGAIN):
		return false
	case err != nil || failure != nil:
		f.err = fmt.Errorf("read first bytes: %w", errors.Join(err, os.NewSyscallError("read", failure)))
	case n == 0:
		f.ended = true
	default:
		f.n += n
	}
	return f.wanting()
}

// wanting reports whether there is room for more, and somebody who may say it.
func (f *First) wanting() bool { return f.err == nil && !f.ended && f.n < len(f.buf) }

// begin sends CONNECT and behind it what is there.
func (f *First) begin(o Opening) {
	if f == nil {
		o.Send(nil, false)
		return
	}
	f.sent = 0
	f.settled.Store(false)
	if f.wanting() {
		f.read(false)
	}
	f.send(o)
}

func (f *First) send(o Opening) { f.sent += o.Send(f.buf[f.sent:f.n], f.ended) }

// follow sends what comes until o has an outcome, ctx ends, or nothing more fits.
func (f *First) follow(ctx context.Context, o Opening) {
	if f == nil || !f.wanting() {
		return
	}
	o.OnSettled(func() {
		f.settled.Store(true)
		f.interrupt()
	})
	defer context.AfterFunc(ctx, f.interrupt)()
	for f.wanting() && !f.settled.Load() && ctx.Err() == nil {
		if n := f.n; f.read(true) || f.n > n || f.ended {
			f.send(o)
		} else {
			f.rearm() // an earlier Open's interrupt may have come late
			if f.settled.Load() || ctx.Err() != nil {
				return
			}
		}
	}
}

func (f *First) interrupt() { _ = f.from.SetReadDeadline(time.Unix(1, 0)) } // fails once closed, as a read does

// rearm takes an interrupt back.
func (f *First) rearm() {
	if f != nil {
		_ = f.from.SetReadDeadline(time.Time{})
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
	if f == nil {
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
	if !stop() { // also because follow's interrupt may come yet
		return ctx.Err()
	}
	return err
}
