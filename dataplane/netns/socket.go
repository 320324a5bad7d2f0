package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// ListenConfig says what Listen makes.
type ListenConfig struct {
	// Addr to bind; an IPv6 address listens for IPv4 as well (dual stack).
	Addr netip.AddrPort
	// Transparent sets IP_TRANSPARENT and IPV6_TRANSPARENT: the address need not exist,
	// and accepted connections may have any local address.
	Transparent bool
	// Control, if set, sees the socket before it is bound.
	Control func(fd int) error
}

// DialConfig says what Dial connects.
type DialConfig struct {
	Remote netip.AddrPort
	// Local to bind; zero lets the kernel choose, port zero lets it choose the port.
	Local netip.AddrPort
	// Transparent allows a Local that is not an address of the namespace.
	Transparent bool
	// Interface is the index of one that the socket is bound to; 0 is none.
	Interface int
	// DeferACK has the ACK that completes the handshake go with the first bytes, which come right
	// behind; else it goes by itself 200 ms later.
	DeferACK bool
	// Mark is SO_MARK; zero sets none.
	Mark uint32
	// Control, if set, sees the socket before it is bound.
	Control func(fd int) error
	// Pending, if set, sees the socket when its connect has begun but did not complete at
	// once. An error gives the dial up.
	Pending func(fd int) error
}

// backlog is cut down by the kernel to net.core.somaxconn.
const backlog = 65535

// Listen makes a TCP listener in the namespace. The caller closes it.
func (n *Namespace) Listen(cfg ListenConfig) (*net.TCPListener, error) {
	l, err := n.listen(cfg)
	if err != nil {
		return nil, fmt.Errorf("listen on %v in %s: %w", cfg.Addr, n.path, err)
	}
	return l, nil
}

func (n *Namespace) listen(cfg ListenConfig) (*net.TCPListener, error) {
	addr := cfg.Addr
	fd, err := n.socket(addr.Addr())
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "tcp listener")
	defer func() { _ = file.Close() }() // FileListener has its own copy
	if err := setListenOptions(fd, cfg); err != nil {
		return nil, err
	}
	if err := nonblock.Bind(uintptr(fd), addr); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func setListenOptions(fd int, cfg ListenConfig) error {
	if err := setInt(fd, "SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if cfg.Addr.Addr().Is6() {
		if err := setInt(fd, "IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return err
		}
	}
	if cfg.Transparent {
		if err := setTransparent(fd, cfg.Addr.Addr()); err != nil {
			return err
		}
	}
	if cfg.Control != nil {
		return cfg.Control(fd)
	}
	return nil
}

// Dial is Connect for who needs a *net.TCPConn.
func (n *Namespace) Dial(ctx context.Context, cfg DialConfig) (*net.TCPConn, error) {
	c, err := n.Connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }() // FileConn has its own copy
	var conn net.Conn
	err = c.wait(func(p *polled) (err error) {
		conn, err = net.FileConn(p.file)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial %v: %w", cfg.Remote, err)
	}
	return conn.(*net.TCPConn), nil
}

// Connect connects from inside the namespace. No thread is held while it waits. The error of
// a refused or unreachable destination is the system call's, inside a *net.OpError.
func (n *Namespace) Connect(ctx context.Context, cfg DialConfig) (*Conn, error) {
	cfg.Remote = netip.AddrPortFrom(cfg.Remote.Addr().Unmap(), cfg.Remote.Port())
	cfg.Local = netip.AddrPortFrom(cfg.Local.Addr().Unmap(), cfg.Local.Port())
	conn, err := n.connect(ctx, cfg)
	if err != nil {
		op := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(cfg.Remote), Err: err}
		if cfg.Local.Addr().IsValid() {
			op.Source = net.TCPAddrFromAddrPort(cfg.Local)
		}
		return nil, op
	}
	return conn, nil
}

func (n *Namespace) connect(ctx context.Context, cfg DialConfig) (*Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fd, err := n.socket(cfg.Remote.Addr())
	if err != nil {
		return nil, err
	}
	if err := prepareDial(fd, cfg); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	// Connecting comes before the poller gets to know the socket: one that has not begun
	// to connect would report a hang-up.
	connected, err := startConnect(fd, cfg)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	conn := newConn(fd, cfg.Remote)
	if !connected {
		if err := conn.awaitConnected(ctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	return conn, nil
}

func prepareDial(fd int, cfg DialConfig) error {
	if err := setInt(fd, "TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	if cfg.DeferACK { // for this ACK alone: see the kernel's tcp_rcv_synsent_state_process
		if err := setInt(fd, "TCP_QUICKACK", unix.SOL_TCP, unix.TCP_QUICKACK, 0); err != nil {
			return err
		}
	}
	if cfg.Transparent {
		if err := setTransparent(fd, cfg.Remote.Addr()); err != nil {
			return err
		}
	}
	if cfg.Mark != 0 {
		if err := setInt(fd, "SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(cfg.Mark)); err != nil {
			return err
		}
	}
	if cfg.Interface != 0 {
		if err := setInt(fd, "SO_BINDTOIFINDEX", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, cfg.Interface); err != nil {
			return err
		}
	}
	if cfg.Control != nil {
		if err := cfg.Control(fd); err != nil {
			return err
		}
	}
	if !cfg.Local.Addr().IsValid() {
		return nil
	}
	// Either way the port is to be unique per destination and not per address: connect
	// finds out, and tens of thousands of connections from one client to one pod are possible.
	var err error
	if cfg.Local.Port() == 0 {
		err = setInt(fd, "IP_BIND_ADDRESS_NO_PORT", unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	} else {
		err = setInt(fd, "SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err != nil {
		return err
	}
	return os.NewSyscallError("bind", nonblock.Bind(uintptr(fd), cfg.Local))
}

func startConnect(fd int, cfg DialConfig) (connected bool, err error) {
	switch err := nonblock.Connect(uintptr(fd), cfg.Remote); {
	case err == nil, errors.Is(err, unix.EISCONN):
		return true, nil
	case errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.EINTR), errors.Is(err, unix.EALREADY):
	default:
		return false, os.NewSyscallError("connect", err)
	}
	if done, err := finished(fd); done || err != nil {
		return done, err
	}
	if cfg.Pending == nil {
		return false, nil
	}
	return false, cfg.Pending(fd)
}

// finished reports whether a connect that was begun has come to its end, and how.
func finished(fd int) (bool, error) {
	if _, err := nonblock.Remote(uintptr(fd)); err == nil {
		return true, nil
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return false, os.NewSyscallError("getsockopt SO_ERROR", err)
	}
	if code != 0 {
		return false, os.NewSyscallError("connect", syscall.Errno(code))
	}
	return false, nil // still on its way
}

// awaitConnected waits in Go's poller until the socket is connected or ctx ends.
func (c *Conn) awaitConnected(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(time.Unix(1, 0)) })
	var failure error
	err := (*rawConn)(c).Write(func(fd uintptr) bool {
		done, err := finished(int(fd))
		failure = err
		return done || err != nil
	})
	if !stop() && (err != nil || failure == nil) {
		return ctx.Err()
	}
	return errors.Join(failure, err)
}

func (n *Namespace) socket(addr netip.Addr) (int, error) {
	family := familyOf(addr)
	fd, ok, missing := n.sockets.take(family)
	if ok {
		return fd, nil
	}
	made := make([]int, 0, stockSize)
	err := n.Do(func() error {
		for range missing {
			// IPPROTO_TCP and never MPTCP: its subflows would not carry what was set on the socket.
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			made = append(made, fd)
		}
		return nil
	})
	if len(made) == 0 {
		return 0, err
	}
	n.sockets.put(family, made[1:])
	return made[0], nil
}

func familyOf(addr netip.Addr) int {
	if addr.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func setTransparent(fd int, addr netip.Addr) error {
	if addr.Is6() {
		if err := setInt(fd, "IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1); err != nil {
			return err
		}
	}
	return setInt(fd, "IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

func setInt(fd int, name string, level, option, value int) error {
	number := int32(value)
	if err := nonblock.Set(uintptr(fd), level, option, &number); err != nil {
		return os.NewSyscallError("setsockopt "+name, err)
	}
	return nil
}
