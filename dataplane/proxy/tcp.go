package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

var (
	// errAgain is a socket that has nothing to read, or no room to write, now.
	errAgain = errors.New("would block")
	// errIdle is one from which nothing came for idleAfter.
	errIdle = errors.New("idle")
)

// idleAfter is how long a goroutine waits for a socket before it leaves that to the lot.
const idleAfter = time.Second

// tcpLeg is the end of a connection that is a TCP socket. One goroutine reads and one writes.
type tcpLeg struct {
	conn Socket
	raw  syscall.RawConn
	name string // for errors: "the application" …

	in, out transfer
	timed   bool // the socket has a read deadline: looking at the clock for each read costs more
	moved   bool // something was read since it was set

	mu       sync.Mutex
	lot      *lot   // where the socket is parked
	place    uint64 // in it; 0 when it is not parked
	released bool   // closed, or about to be
}

// transfer is the state of one direction: what the poller's callbacks work on. They are
// made once, so that moving a chunk allocates nothing.
type transfer struct {
	p      []byte
	n      int
	err    error
	polled bool

	move, wait func(fd uintptr) bool
	peek       func(fd uintptr) // move for one that nobody waits for
}

// keepAlive finds a peer whose host is gone after about two minutes. Applications have none: what
// passes over lo does not lose its host.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}
}

// newTCPLeg takes conn over and makes its end a reset until finish or closeWrite.
func newTCPLeg(conn Socket, name string) (*tcpLeg, error) {
	raw, err := conn.SyscallConn()
	if err == nil {
		err = conn.SetLinger(0)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("prepare the socket of %s: %w", name, err)
	}
	l := &tcpLeg{conn: conn, raw: raw, name: name}
	l.in.move, l.in.wait = l.in.read, func(fd uintptr) bool { return l.in.ready(fd, unix.POLLIN|unix.POLLRDHUP) }
	l.in.peek = func(fd uintptr) { l.in.read(fd) }
	l.out.move, l.out.wait = l.out.write, func(fd uintptr) bool { return l.out.ready(fd, unix.POLLOUT) }
	return l, nil
}

// awaitReadable returns when there may be bytes or an end to read, or errIdle. It holds nothing.
func (l *tcpLeg) awaitReadable() error {
	for {
		if !l.timed {
			l.timed, l.moved = true, false
			if err := l.conn.SetReadDeadline(time.Now().Add(idleAfter)); err != nil {
				return l.fail("read from", err)
			}
		}
		l.in.polled = false
		err := l.raw.Read(l.in.wait)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return l.fail("read from", err)
		}
		l.timed = false
		if !l.moved {
			return errIdle
		}
	}
}

// park has visit called when one of events, an error or a hang-up comes to the socket. Nothing is
// called any more once the leg is released.
func (l *tcpLeg) park(lot *lot, events uint32, visit visit) {
	// The lock comes first: nobody waits for it in a Control, which would hold up whoever closes
	// the socket. An error is that of a socket that is closed: then everything has ended.
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.raw.Control(func(fd uintptr) {
		if l.released {
			return
		}
		var err error
		if l.place, err = lot.park(int(fd), events, visit); err != nil {
			time.AfterFunc(idleAfter, func() { look(visit) }) // again, and costs a little more
		}
		l.lot = lot
	})
}

// look is a visit to a socket for which there was no room in a lot.
func look(visit visit) {
	r := &round{}
	next := visit(r)
	r.push()
	if next == nil {
		next = func() { time.AfterFunc(idleAfter, func() { look(visit) }) }
	}
	next()
}

// unpark takes the socket out of the lot, if it is there.
func (l *tcpLeg) unpark() {
	l.mu.Lock() // as in park
	defer l.mu.Unlock()
	l.unparkLocked()
}

func (l *tcpLeg) unparkLocked() {
	if l.place != 0 {
		l.lot.leave(l.place)
		l.place = 0
	}
}

// release has nobody wait for the socket any more.
func (l *tcpLeg) release() {
	l.mu.Lock() // as in park
	defer l.mu.Unlock()
	l.released = true
	l.unparkLocked()
}

// ready is called by the poller: at once, and again when the socket became ready. Its first
// answer must come from the socket itself, because the poller only tells of changes.
func (t *transfer) ready(fd uintptr, events int16) bool {
	if t.polled {
		return true
	}
	t.polled = true
	return nonblock.Ready(fd, events)
}

// read never waits: it returns errAgain when there is nothing.
func (l *tcpLeg) read(p []byte) (int, error) {
	l.in.p = p
	err := l.raw.Read(l.in.move)
	l.in.p = nil
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, errAgain // awaitReadable sets another
	case err != nil:
		return 0, l.fail("read from", err)
	}
	return l.gave()
}

// readParked is read while the socket is parked: deadlines and whoever waits are none of its.
func (l *tcpLeg) readParked(p []byte) (int, error) {
	l.in.p = p
	err := l.raw.Control(l.in.peek)
	l.in.p = nil
	if err != nil {
		return 0, l.fail("read from", err)
	}
	return l.gave()
}

// gave is what the last read found.
func (l *tcpLeg) gave() (int, error) {
	switch {
	case errors.Is(l.in.err, unix.EAGAIN):
		return 0, errAgain
	case l.in.err != nil:
		return 0, l.fail("read from", l.in.err)
	case l.in.n == 0:
		return 0, io.EOF
	}
	l.moved = true
	return l.in.n, nil
}

func (t *transfer) read(fd uintptr) bool {
	t.n, t.err = nonblock.Read(fd, t.p)
	return true
}

// write never waits: it returns how much the socket took, and errAgain when that is not all.
func (l *tcpLeg) write(p []byte) (int, error) {
	l.out.p, l.out.n = p, 0
	if err := l.raw.Write(l.out.move); err != nil {
		return 0, l.fail("write to", err)
	}
	l.out.p = nil
	switch {
	case errors.Is(l.out.err, unix.EAGAIN):
		return l.out.n, errAgain
	case l.out.err != nil:
		return l.out.n, l.fail("write to", l.out.err)
	}
	return l.out.n, nil
}

func (t *transfer) write(fd uintptr) bool {
	t.err = nil
	for len(t.p) > 0 {
		n, err := nonblock.Write(fd, t.p)
		if err != nil {
			t.err = err
			break
		}
		t.n += n
		t.p = t.p[n:]
	}
	return true
}

func (l *tcpLeg) writeLast(p []byte) (int, error) { return l.write(p) }

func (l *tcpLeg) offer(p []byte, _ *round) (int, error) { return l.write(p) }

func (l *tcpLeg) awaitWritable() error {
	l.out.polled = false
	return l.fail("write to", l.raw.Write(l.out.wait))
}

// closeWrite hands the other side's clean end on. From here on the end of this process does
// not reset the socket: what the application gets is complete, and the kernel delivers it. Where finish
// comes right behind, that ends the stream as well: everything that the other side sent was read.
func (l *tcpLeg) closeWrite(last bool) error {
	l.mu.Lock() // not to undo what abort sets
	defer l.mu.Unlock()
	if l.released {
		return l.fail("end the stream to", net.ErrClosed)
	}
	if !last {
		if err := l.conn.CloseWrite(); err != nil {
			return l.fail("end the stream to", err)
		}
	}
	return l.fail("end the stream to", l.conn.SetLinger(-1))
}

// broken returns an error once the socket was reset.
func (l *tcpLeg) broken() error {
	closed := false
	err := l.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		closed = err != nil || info.State == tcpClosed
	})
	if err != nil || !closed {
		return nil
	}
	return fmt.Errorf("%s reset the connection", l.name)
}

// tcpClosed is TCP_CLOSE of the kernel's include/net/tcp_states.h.
const tcpClosed = 7

// finish releases the socket after both directions ended cleanly.
func (l *tcpLeg) finish() {
	l.release()
	_ = l.conn.Close()
}

// abort resets the connection. It does not hold the lock, since Close waits for who uses the socket.
func (l *tcpLeg) abort() {
	l.release()
	reset(l.conn)
}

// reset closes c so that the other end sees a reset and never a clean end.
func reset(c Socket) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func (l *tcpLeg) fail(deed string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%s reset the connection", l.name)
	case errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("%s %s: its host does not answer any more: %w", deed, l.name, err)
	}
	return fmt.Errorf("%s %s: %w", deed, l.name, err)
}
