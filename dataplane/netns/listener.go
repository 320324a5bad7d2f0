package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// Listener is a *net.TCPListener whose connections are Conns: what package net spends on each, a place
// in the poller and six options of the socket, is for who needs it.
type Listener struct {
	file   *os.File
	raw    syscall.RawConn
	addr   net.Addr
	closed atomic.Bool
}

var (
	_ net.Listener = (*Listener)(nil)
	_ syscall.Conn = (*Listener)(nil)
)

// TakeListener makes a Listener of l, which is closed. Connections have TCP_NODELAY.
func TakeListener(l *net.TCPListener) (*Listener, error) {
	file, err := l.File()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take over the listener %s: %w", l.Addr(), err), l.Close())
	}
	raw, err := file.SyscallConn()
	var failure error
	if err == nil { // accepted sockets are the listener's clones (tcp(7), accept(2))
		err = raw.Control(func(fd uintptr) {
			failure = setInt(int(fd), "TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1)
		})
	}
	if err := errors.Join(err, failure, l.Close()); err != nil {
		return nil, errors.Join(fmt.Errorf("take over the listener %s: %w", l.Addr(), err), file.Close())
	}
	return &Listener{file: file, raw: raw, addr: l.Addr()}, nil
}

// Accept is AcceptConn.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptConn()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptConn waits for a connection. Its errors are those of the system calls, inside a *net.OpError,
// as are net.ErrClosed and os.ErrDeadlineExceeded.
func (l *Listener) AcceptConn() (*Conn, error) {
	var fd int
	var remote netip.AddrPort
	var failure error
	err := l.raw.Read(func(listener uintptr) bool {
		fd, remote, failure = acceptNow(listener)
		return !errors.Is(failure, unix.EAGAIN)
	})
	switch {
	case err == nil && failure == nil:
		return newConn(fd, remote), nil
	case l.closed.Load():
		err = net.ErrClosed
	case err == nil:
		err = os.NewSyscallError("accept4", failure) // an OpError knows of this alone whether it passes
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: err}
}

// acceptNow passes over connections that were reset before anybody accepted them.
func acceptNow(listener uintptr) (int, netip.AddrPort, error) {
	for {
		if fd, remote, err := nonblock.Accept(listener); !errors.Is(err, unix.ECONNABORTED) {
			return fd, remote, err
		}
	}
}

// Addr is what was bound.
func (l *Listener) Addr() net.Addr { return l.addr }

// SetDeadline is for AcceptConn.
func (l *Listener) SetDeadline(t time.Time) error { return l.explain(l.file.SetReadDeadline(t)) }

// SyscallConn is the socket itself.
func (l *Listener) SyscallConn() (syscall.RawConn, error) { return l.raw, l.explain(nil) }

func (l *Listener) explain(err error) error {
	if l.closed.Load() {
		return net.ErrClosed
	}
	return err
}

// Close ends an AcceptConn that waits.
func (l *Listener) Close() error {
	if l.closed.Swap(true) {
		return net.ErrClosed
	}
	return l.file.Close()
}
