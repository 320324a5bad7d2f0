package netns

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a TCP connection around a socket that is connected already. It is what a
// *net.TCPConn is, without what net.FileConn spends on making one: a second descriptor, a
// second place in the poller, and ten system calls that ask for, or set, what is known.
type Conn struct {
	file   *os.File
	raw    syscall.RawConn
	remote netip.AddrPort
	closed atomic.Bool
}

var (
	_ net.Conn     = (*Conn)(nil)
	_ syscall.Conn = (*Conn)(nil)
)

// newConn owns fd, which does not block.
func newConn(fd int, remote netip.AddrPort) (*Conn, error) {
	file := os.NewFile(uintptr(fd), "tcp connection")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Conn{file: file, raw: raw, remote: remote}, nil
}

// Read and Write are a net.Conn's.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.file.Read(p)
	return n, c.explain(err)
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.file.Write(p)
	return n, c.explain(err)
}

// explain says of a closed connection what package net would: os has another error for it, and
// none that can be told where the file is used through its RawConn.
func (c *Conn) explain(err error) error {
	if err != nil && c.closed.Load() {
		return net.ErrClosed
	}
	return err
}

// Close closes the socket.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	return c.file.Close()
}

// CloseWrite ends our direction.
func (c *Conn) CloseWrite() error {
	return c.control("shutdown", func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) })
}

// SetLinger is that of a *net.TCPConn.
func (c *Conn) SetLinger(sec int) error {
	l := unix.Linger{Onoff: 1, Linger: int32(sec)}
	if sec < 0 {
		l = unix.Linger{}
	}
	return c.control("setsockopt SO_LINGER", func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &l)
	})
}

func (c *Conn) control(deed string, fn func(fd int) error) error {
	var failure error
	err := c.raw.Control(func(fd uintptr) { failure = fn(int(fd)) })
	return errors.Join(c.explain(err), os.NewSyscallError(deed, failure))
}

// SyscallConn is the socket itself.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return rawConn{c}, nil }

type rawConn struct{ c *Conn }

func (r rawConn) Control(f func(fd uintptr)) error    { return r.c.explain(r.c.raw.Control(f)) }
func (r rawConn) Read(f func(fd uintptr) bool) error  { return r.c.explain(r.c.raw.Read(f)) }
func (r rawConn) Write(f func(fd uintptr) bool) error { return r.c.explain(r.c.raw.Write(f)) }

// LocalAddr asks the socket. Like RemoteAddr it returns a *net.TCPAddr, an invalid one once the
// connection is closed.
func (c *Conn) LocalAddr() net.Addr {
	var local netip.AddrPort
	_ = c.control("getsockname", func(fd int) error {
		sa, err := unix.Getsockname(fd)
		local = addrPort(sa)
		return err
	})
	return net.TCPAddrFromAddrPort(local)
}

// RemoteAddr is what was connected to.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}

// SetDeadline and the others are a net.Conn's.
func (c *Conn) SetDeadline(t time.Time) error      { return c.explain(c.file.SetDeadline(t)) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.explain(c.file.SetReadDeadline(t)) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.explain(c.file.SetWriteDeadline(t)) }
