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

	"github.com/raceway-mesh/raceway/dataplane/netns"
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
	conn *netns.Conn
	name string // for errors: "the application" …

	timed bool // the socket has a read deadline: looking at the clock for each read costs more
	moved bool // something was read since it was set

	mu       sync.Mutex
	lot      *lot   // where the socket is parked
	place    uint64 // in it; 0 when it is not parked
	released bool   // closed, or about to be
}

// keepAlive finds a peer whose host is gone after about two minutes. Applications have none: what
// passes over lo does not lose its host.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}
}

// newTCPLeg takes conn over and makes its end a reset until finish or closeWrite.
func newTCPLeg(conn *netns.Conn, name string) (*tcpLeg, error) {
	if err := conn.SetLinger(0); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("prepare the socket of %s: %w", name, err)
	}
	return &tcpLeg{conn: conn, name: name}, nil
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
		err := l.conn.AwaitReadable()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return l.fail("read from", err)
		}
		l.timed = false
		if !l.moved {
			return errIdle
		}
	}
}

// park has visit called when one of events, an error or a hang-up comes to the socket, in place of what
// was called before. Nothing is called any more once the leg is released. The error is that there is no
// room in the lot.
func (l *tcpLeg) park(lot *lot, events uint32, visit visit) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released {
		return nil
	}
	if l.place != 0 && l.lot == lot && lot.again(l.place, events, visit) {
		return nil
	}
	l.unparkLocked()
	closed := l.conn.Use(func(fd int) { l.place, err = lot.park(fd, events, visit) })
	if closed != nil { // then everything has ended
		return nil
	}
	l.lot = lot
	return err
}

// parkOrLook is park, or a look now and then.
func (l *tcpLeg) parkOrLook(lot *lot, events uint32, visit visit) {
	if l.park(lot, events, visit) != nil {
		time.AfterFunc(idleAfter, func() { look(visit) }) // again, and costs a little more
	}
}

// look is a visit to a socket for which there was no room in a lot.
func look(visit visit) {
	r := &round{events: unix.EPOLLRDHUP}
	next := visit(r)
	r.push()
	if next == nil {
		next = func() { time.AfterFunc(idleAfter, func() { look(visit) }) }
	}
	next()
}

// unpark takes the socket out of the lot, if it is there.
func (l *tcpLeg) unpark() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unparkLocked()
}

func (l *tcpLeg) unparkLocked() {
	if l.place != 0 {
		l.lot.leave(l.place)
		l.place = 0
	}
}

// release has nobody wait for the socket any more, which is about to be closed.
func (l *tcpLeg) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released = true
	if l.place != 0 {
		l.lot.forget(l.place)
		l.place = 0
	}
}

// read never waits: it returns errAgain when there is nothing.
func (l *tcpLeg) read(p []byte) (int, error) {
	n, err := l.conn.Recv(p)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return 0, errAgain
	case err != nil:
		return 0, l.fail("read from", err)
	case n == 0:
		return 0, io.EOF
	}
	l.moved = true
	return n, nil
}

// write never waits: it returns how much the socket took, and errAgain when that is not all.
func (l *tcpLeg) write(p []byte, last bool) (int, error) {
	n, err := l.conn.Send(p, last)
	if errors.Is(err, unix.EAGAIN) {
		return n, errAgain
	}
	return n, l.fail("write to", err)
}

func (l *tcpLeg) offer(p []byte, last bool, _ *round) (int, error) { return l.write(p, last) }

func (l *tcpLeg) offerEnd(last bool, _ *round) bool { return l.closeWrite(last) == nil }

func (l *tcpLeg) awaitWritable() error { return l.fail("write to", l.conn.AwaitWritable()) }

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
	err := l.conn.Use(func(fd int) {
		info, err := nonblock.TCPInfo(uintptr(fd))
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

// abort resets the connection.
func (l *tcpLeg) abort() {
	l.release()
	reset(l.conn)
}

// lingering is a TCP socket.
type lingering interface {
	SetLinger(sec int) error
	Close() error
}

// reset closes c so that the other end sees a reset and never a clean end.
func reset(c lingering) {
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
