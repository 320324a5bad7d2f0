package h2

import (
	"errors"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// inputSize is how much is decrypted before it is handed on: bulk then reaches the application
// in few system calls. maxRecord is what one TLS record holds (RFC 8446 section 5.1).
const (
	inputSize = 128 << 10
	maxRecord = 16 << 10
)

var inputs = sync.Pool{New: func() any { return new([inputSize]byte) }}

// input is what was received and not parsed yet. It belongs to readLoop, and holds no memory
// while it waits.
type input struct {
	c    *conn
	buf  *[inputSize]byte // nil when empty
	r, w int
}

// Read is for the Framer.
func (in *input) Read(p []byte) (int, error) {
	b, err := in.next(len(p))
	return copy(p, b), err
}

// next gives 1 to n bytes, which are good until the next call, and waits if there are none.
func (in *input) next(n int) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	b := in.buf[in.r:min(in.w, in.r+n)]
	in.r += len(b)
	return b, nil
}

// discard skips n bytes.
func (in *input) discard(n int) error {
	for n > 0 {
		b, err := in.next(n)
		if err != nil {
			return err
		}
		n -= len(b)
	}
	return nil
}

// fill decrypts the records that have arrived, as many as there is room for. What they made
// us say is said before we wait for more.
func (in *input) fill() error {
	in.r, in.w = 0, 0
	wire := in.c.wire
	wire.NoWait(true)
	defer wire.NoWait(false)
	for in.w == 0 {
		if !wire.Buffered() {
			if in.buf != nil {
				inputs.Put(in.buf)
				in.buf = nil
			}
			in.c.kick()
			if err := wire.Await(); err != nil {
				return err
			}
		}
		if in.buf == nil {
			in.buf = inputs.Get().(*[inputSize]byte)
		}
		if err := in.decrypt(); err != nil {
			return err
		}
	}
	in.c.lastRead.Store(int64(time.Since(in.c.start)))
	return nil
}

// decrypt fills buf with what is there. An error that comes behind bytes comes again.
func (in *input) decrypt() error {
	for in.w+maxRecord <= inputSize {
		n, err := in.c.tls.Read(in.buf[in.w:])
		in.w += n
		switch {
		case errors.As(err, new(hbone.NotYet)):
			return nil
		case err != nil && in.w == 0:
			return err
		case err != nil || !in.c.wire.Buffered():
			return nil
		}
	}
	return nil
}
