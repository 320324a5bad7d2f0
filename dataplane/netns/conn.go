package netns

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// Conn is a TCP connection around a socket that is connected already. It is what a
// *net.TCPConn is, but for what few need: it enters Go's poller, and becomes an *os.File, only when
// somebody waits for it or sets a deadline. Until then each call is its system call and no more.
type Conn struct {
	fd     int
	remote netip.AddrPort

	users  atomic.Int32 // who uses the socket, and one until Close: the last one closes it
	closed atomic.Bool
	making sync.Mutex
	polled atomic.Pointer[polled] // nil before somebody waits
}

// polled is a socket in Go's poller.
type polled struct {
	file *os.File
	raw  syscall.RawConn
}

var (
	_ net.Conn     = (*Conn)(nil)
	_ syscall.Conn = (*Conn)(nil)
)

// newConn owns fd, which does not block.
func newConn(fd int, remote netip.AddrPort) *Conn {
	c := &Conn{fd: fd, remote: remote}
	c.users.Store(1)
	return c
}

// Take makes a Conn of c, which is closed. It is for connections that others make, as tests do.
func Take(c *net.TCPConn) (*Conn, error) {
	remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	var fd int
	var failure error
	err = raw.Control(func(old uintptr) { fd, failure = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, os.NewSyscallError("fcntl", failure), c.Close()); err != nil {
		return nil, err
	}
	return newConn(fd, netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())), nil
}

// do calls fn with the socket, which stays open meanwhile.
func (c *Conn) do(fn func(fd int) error) error {
	for {
		n := c.users.Load()
		if n == 0 || c.closed.Load() {
			return net.ErrClosed
		}
		if c.users.CompareAndSwap(n, n+1) {
			break
		}
	}
	defer func() { _ = c.leave() }() // Close says what is to be said
	return fn(c.fd)
}

func (c *Conn) leave() error {
	if c.users.Add(-1) > 0 {
		return nil
	}
	if p := c.polled.Load(); p != nil {
		return p.file.Close()
	}
	return os.NewSyscallError("close", nonblock.Close(uintptr(c.fd)))
}

// poll has Go's poller know the socket. It is called within do.
func (c *Conn) poll() (*polled, error) {
	if p := c.polled.Load(); p != nil {
		return p, nil
	}
	c.making.Lock()
	defer c.making.Unlock()
	if p := c.polled.Load(); p != nil {
		return p, nil
	}
	file := os.NewFile(uintptr(c.fd), "tcp connection")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &polled{file: file, raw: raw}
	c.polled.Store(p)
	if c.closed.Load() { // whoever closes it looks for p behind that
		return nil, net.ErrClosed
	}
	return p, nil
}

// wait calls use with the socket as a file.
func (c *Conn) wait(use func(*polled) error) error {
	return c.do(func(int) error { return c.waitIn(use) })
}

// waitIn is wait within do.
func (c *Conn) waitIn(use func(*polled) error) error {
	p, err := c.poll()
	if err != nil {
		return err
	}
	return c.explain(use(p))
}

// Read and Write are a net.Conn's.
func (c *Conn) Read(b []byte) (n int, err error) {
	err = c.wait(func(p *polled) error {
		n, err = p.file.Read(b)
		return err
	})
	return n, err
}

func (c *Conn) Write(b []byte) (n int, err error) {
	err = c.wait(func(p *polled) error {
		n, err = p.file.Write(b)
		return err
	})
	return n, err
}

// explain says of a closed connection what package net would: who waits for it is woken by a deadline.
func (c *Conn) explain(err error) error {
	if err != nil && c.closed.Load() {
		return net.ErrClosed
	}
	return err
}

// Close wakes who waits for the socket, and closes it when nobody uses it any more.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	if p := c.polled.Load(); p != nil {
		_ = p.file.SetDeadline(time.Unix(1, 0)) // it is open
	}
	return c.leave()
}

// Recv is read(2), which does not wait: EAGAIN when there is nothing, 0 at the end.
func (c *Conn) Recv(p []byte) (n int, err error) {
	err = c.do(func(fd int) error {
		n, err = nonblock.Read(uintptr(fd), p)
		return err
	})
	return n, err
}

// Send writes as much of p as the socket takes, and returns EAGAIN when that is not all. Behind the last
// bytes CloseWrite or Close comes at once, which sends both in one packet if it can.
func (c *Conn) Send(p []byte, last bool) (sent int, err error) {
	write := nonblock.Write
	if last {
		write = nonblock.WriteMore
	}
	err = c.do(func(fd int) error {
		for sent < len(p) {
			n, err := write(uintptr(fd), p[sent:])
			sent += n
			if err != nil {
				return err
			}
		}
		return nil
	})
	return sent, err
}

// AwaitReadable waits until there is something to read, an end or an error, or until the read deadline;
// AwaitWritable until there is room, or the write deadline.
func (c *Conn) AwaitReadable() error {
	return c.await(syscall.RawConn.Read, unix.POLLIN|unix.POLLRDHUP)
}

func (c *Conn) AwaitWritable() error { return c.await(syscall.RawConn.Write, unix.POLLOUT) }

func (c *Conn) await(wait func(syscall.RawConn, func(fd uintptr) bool) error, events int16) error {
	return c.wait(func(p *polled) error {
		asked := false
		return wait(p.raw, func(fd uintptr) bool {
			if asked { // the poller tells of changes alone: what was there before the socket says
				return true
			}
			asked = true
			return nonblock.Ready(fd, events)
		})
	})
}

// CloseWrite ends our direction.
func (c *Conn) CloseWrite() error {
	return c.do(func(fd int) error { return os.NewSyscallError("shutdown", nonblock.CloseWrite(uintptr(fd))) })
}

// SetLinger is that of a *net.TCPConn.
func (c *Conn) SetLinger(sec int) error {
	l := unix.Linger{Onoff: 1, Linger: int32(sec)}
	if sec < 0 {
		l = unix.Linger{}
	}
	return c.do(func(fd int) error {
		return os.NewSyscallError("setsockopt SO_LINGER", nonblock.Set(uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, &l))
	})
}

// SetKeepAliveConfig is that of a *net.TCPConn, with nothing left to defaults.
func (c *Conn) SetKeepAliveConfig(cfg net.KeepAliveConfig) error {
	enable := 0
	if cfg.Enable {
		enable = 1
	}
	return c.do(func(fd int) error {
		return errors.Join(
			setInt(fd, "TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, int(cfg.Idle/time.Second)),
			setInt(fd, "TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL, int(cfg.Interval/time.Second)),
			setInt(fd, "TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT, cfg.Count),
			setInt(fd, "SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, enable),
		)
	})
}

// Use calls fn with the socket, which stays open meanwhile.
func (c *Conn) Use(fn func(fd int)) error {
	return c.do(func(fd int) error {
		fn(fd)
		return nil
	})
}

// SyscallConn is the socket itself. Its Read and Write call their function once without the poller: one
// that says that it is done needs none.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return (*rawConn)(c), nil }

type rawConn Conn

func (r *rawConn) Control(f func(fd uintptr)) error {
	return (*Conn)(r).Use(func(fd int) { f(uintptr(fd)) })
}

func (r *rawConn) Read(f func(fd uintptr) bool) error {
	return r.try(f, syscall.RawConn.Read)
}

func (r *rawConn) Write(f func(fd uintptr) bool) error {
	return r.try(f, syscall.RawConn.Write)
}

func (r *rawConn) try(f func(fd uintptr) bool, wait func(syscall.RawConn, func(fd uintptr) bool) error) error {
	c := (*Conn)(r)
	return c.do(func(fd int) error {
		if c.polled.Load() == nil && f(uintptr(fd)) {
			return nil
		}
		return c.waitIn(func(p *polled) error { return wait(p.raw, f) })
	})
}

// LocalAddr asks the socket. Like RemoteAddr it returns a *net.TCPAddr, an invalid one once the
// connection is closed.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.Local()) }

// Local is LocalAddr, and zero once the connection is closed.
func (c *Conn) Local() (local netip.AddrPort) {
	_ = c.do(func(fd int) (err error) {
		local, err = nonblock.Local(uintptr(fd))
		return err
	})
	return local
}

// RemoteAddr is what was connected to, or who connected.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// Remote is RemoteAddr.
func (c *Conn) Remote() netip.AddrPort { return c.remote }

// SetDeadline and the others are a net.Conn's.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.wait(func(p *polled) error { return p.file.SetDeadline(t) })
}

func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.wait(func(p *polled) error { return p.file.SetReadDeadline(t) })
}

func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.wait(func(p *polled) error { return p.file.SetWriteDeadline(t) })
}
