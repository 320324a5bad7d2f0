package hbone

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// wireSize is how much a Wire moves with one system call: eight full records, of 16,406 bytes each
// in TLS 1.3 (RFC 8446 section 5.2), and so the 128 KiB that fill a transport's buffer at once.
const wireSize = 132 << 10

// Wire is the connection beneath TLS. crypto/tls reads and writes record by record, 16 KiB at
// the most; a Wire moves many with one system call, and holds no memory while nothing comes.
//
//	kernel ──► in ──► a record at a time ──► crypto/tls ──► transport
//	kernel ◄── out, while it is held, until Flush ◄── crypto/tls ◄── transport
//
// A transport finds it as the tls.Conn's NetConn. One goroutine reads; Hold and Flush belong
// to whoever writes.
type Wire struct {
	net.Conn
	raw syscall.RawConn // nil where there is no file descriptor

	// The reader's.
	in      *[wireSize]byte // nil when it is empty
	r, w    int             // in[r:w] is yet to be read
	part    []byte          // in[:w] of a wire that waits, when too many have a whole buffer
	holding bool            // it waits with one
	record  int             // what is left of the record that is being read
	noWait  bool
	n       int // of the last system call, as is err
	err     error
	receive func(fd uintptr) bool

	mu       sync.Mutex // crypto/tls answers key updates and sends alerts beside the transport
	held     bool
	out      *[]byte // nil when it is empty
	sent     int     // of out
	send     func(fd uintptr) bool
	stuck    bool // it waits with a whole buffer
	borrowed bool // out is a whole buffer
}

var (
	wireInputs  = sync.Pool{New: func() any { return new([wireSize]byte) }}
	wireOutputs = sync.Pool{New: func() any { b := make([]byte, 0, wireSize+12<<10); return &b }}
)

// maxHolding is how many whole buffers may be with wires that wait: for the rest of a record, or for their
// peer to take something. Others hold what is there and no more, so that peers that send parts of
// records, or do not read, cost little.
const maxHolding = 64

var holding atomic.Int64

// recordHeader is the size of a TLS record's header (RFC 8446 section 5.1).
const recordHeader = 5

// NewWire wraps conn, which it owns.
func NewWire(conn net.Conn) *Wire {
	w := &Wire{Conn: conn}
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			w.raw = raw
		}
	}
	w.receive, w.send = w.receiveNow, w.sendNow
	return w
}

// Read gives what is left of a record, as far as it has arrived and fits p.
func (w *Wire) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for w.record == 0 && !w.parse() || w.r == w.w {
		if w.noWait {
			return 0, errNotYet
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.in[w.r:min(w.w, w.r+w.record)])
	w.record -= n
	if w.r += n; w.r == w.w {
		w.release()
	}
	return n, nil
}

// parse begins the next record if its header is there.
func (w *Wire) parse() bool {
	if w.w-w.r < recordHeader {
		return false
	}
	w.record = w.length()
	return true
}

// length is that of the record at r, whose header is there.
func (w *Wire) length() int {
	return recordHeader + int(w.in[w.r+3])<<8 + int(w.in[w.r+4])
}

// NotYet is the error of a read that would have to wait. crypto/tls takes it for a passing one,
// and goes on where it was when it is called again.
type NotYet struct{}

var errNotYet net.Error = NotYet{}

// Error says so.
func (NotYet) Error() string { return "nothing to read yet" }

// Timeout and Temporary are what net.Error wants.
func (NotYet) Timeout() bool { return true }

// Temporary tells crypto/tls that the connection is not broken.
func (NotYet) Temporary() bool { return true }

// NoWait has Read return NotYet where it would wait, or not any more.
func (w *Wire) NoWait(on bool) { w.noWait = on }

// Buffered reports whether the whole of the next record is there. It need not hold bytes for
// the transport: a session ticket is one, too.
func (w *Wire) Buffered() bool {
	return w.record == 0 && w.w-w.r >= recordHeader && w.w-w.r >= w.length()
}

// Await returns when more has arrived than was there at the last NotYet, or reading has ended.
// It holds no memory unless a part of a record is there.
func (w *Wire) Await() error {
	if w.Buffered() || w.record > 0 && w.w > w.r {
		return nil
	}
	return w.fill()
}

// fill waits until more has arrived.
func (w *Wire) fill() error {
	if w.r > 0 { // the rest is less than a record's header, or nothing
		w.r, w.w = 0, copy(w.in[:], w.in[w.r:w.w])
	}
	if w.raw == nil {
		w.take()
		w.n, w.err = w.Conn.Read(w.in[w.w:])
	} else if err := w.raw.Read(w.receive); err != nil {
		w.resume()
		w.release()
		return err
	}
	switch {
	case w.n > 0:
		w.w += w.n
		return nil
	case w.err == nil || w.err == io.EOF: //nolint:errorlint // of this very call
		return io.EOF
	case w.raw == nil:
		return w.err
	}
	return &net.OpError{Op: "read", Net: "tcp", Source: w.LocalAddr(), Addr: w.RemoteAddr(), Err: os.NewSyscallError("read", w.err)}
}

// receiveNow is called by the poller when there may be something.
func (w *Wire) receiveNow(fd uintptr) bool {
	w.resume()
	w.take()
	w.n, w.err = nonblock.Read(fd, w.in[w.w:])
	if errors.Is(w.err, unix.EAGAIN) {
		w.pause()
		return false
	}
	return true
}

// pause gives up what a wire that waits need not hold.
func (w *Wire) pause() {
	switch {
	case w.r == w.w:
		w.release()
	case holding.Add(1) <= maxHolding:
		w.holding = true
	default:
		holding.Add(-1)
		w.part = bytes.Clone(w.in[:w.w])
		wireInputs.Put(w.in)
		w.in = nil
	}
}

// resume undoes pause.
func (w *Wire) resume() {
	if w.holding {
		holding.Add(-1)
		w.holding = false
	}
	if w.part != nil {
		w.take()
		copy(w.in[:], w.part)
		w.part = nil
	}
}

func (w *Wire) take() {
	if w.in == nil {
		w.in = wireInputs.Get().(*[wireSize]byte)
	}
}

// release gives the buffer back if there is nothing in it.
func (w *Wire) release() {
	if w.in != nil && w.r == w.w {
		wireInputs.Put(w.in)
		w.in, w.r, w.w = nil, 0, 0
	}
}

// Hold has Write gather until Flush.
func (w *Wire) Hold() {
	w.mu.Lock()
	w.held = true
	w.mu.Unlock()
}

// Write sends p, or keeps it for Flush.
func (w *Wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.held {
		return w.Conn.Write(p)
	}
	w.borrowLocked()
	if len(*w.out)+len(p) > cap(*w.out) {
		if err := w.flushLocked(); err != nil {
			return 0, err
		}
		w.borrowLocked()
	}
	*w.out = append(*w.out, p...)
	return len(p), nil
}

// Flush ends Hold and sends what was gathered. It waits for the peer to take it.
func (w *Wire) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = false
	return w.flushLocked()
}

func (w *Wire) flushLocked() error {
	if w.out == nil {
		return nil
	}
	var err error
	if w.raw != nil {
		err = w.raw.Write(w.send)
	}
	if err == nil && w.sent < len(*w.out) {
		w.stickLocked()
		_, err = w.Conn.Write((*w.out)[w.sent:])
	}
	w.emptyLocked()
	return err
}

// TryFlush is Flush that does not wait: false means that something is left, and that the
// connection is still held.
func (w *Wire) TryFlush() (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out != nil {
		var err error
		if w.raw != nil {
			err = w.raw.Write(w.send)
		}
		if err == nil && w.sent < len(*w.out) {
			w.stickLocked()
			return false, nil
		}
		w.held = false
		w.emptyLocked()
		return true, err
	}
	w.held = false
	return true, nil
}

// sendNow is called by the poller; what goes wrong here shows again in Flush.
func (w *Wire) sendNow(fd uintptr) bool {
	for w.sent < len(*w.out) {
		n, err := nonblock.Write(fd, (*w.out)[w.sent:])
		if err != nil {
			break
		}
		w.sent += n
	}
	return true
}

func (w *Wire) borrowLocked() {
	if w.out == nil {
		w.out, w.borrowed = wireOutputs.Get().(*[]byte), true
	}
}

// stuckSpare is room for what crypto/tls says meanwhile: an alert, an answer to a key update.
const stuckSpare = 256

// stickLocked is called before the wire waits for its peer to take the rest of out.
func (w *Wire) stickLocked() {
	if w.stuck || !w.borrowed {
		return
	}
	if holding.Add(1) <= maxHolding {
		w.stuck = true
		return
	}
	holding.Add(-1)
	rest := (*w.out)[w.sent:]
	rest = append(make([]byte, 0, len(rest)+stuckSpare), rest...)
	w.returnLocked()
	w.out, w.sent = &rest, 0
}

func (w *Wire) emptyLocked() {
	if w.out == nil {
		return
	}
	if w.stuck {
		holding.Add(-1)
		w.stuck = false
	}
	w.returnLocked()
	w.out, w.sent = nil, 0
}

// returnLocked gives back what was borrowed.
func (w *Wire) returnLocked() {
	if w.borrowed {
		*w.out = (*w.out)[:0]
		wireOutputs.Put(w.out)
		w.borrowed = false
	}
}
