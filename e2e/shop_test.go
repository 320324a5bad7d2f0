package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// shop is a cluster whose pods of namespace "shop" are enrolled:
//
//	node1: web, near                         node2: db, outside/plain (not enrolled)
//	       └── own veth pairs ── node1 ── fabric ── node2 ── own veth pairs ──┘
//	                                        └── control (outside the cluster)
type shop struct {
	*cluster
	web, near, db, plain *lab.Pod
}

// newShop starts agents with args.
func newShop(t *testing.T, opts lab.Options, args ...string) *shop {
	t.Helper()
	c := newCluster(t, opts)
	s := &shop{cluster: c, web: c.pod("web", 1), near: c.pod("near", 1), db: c.pod("db", 2), plain: c.podIn("outside", "plain", 2)}
	c.start(args...)
	c.enrol(s.web, s.near, s.db)
	return s
}

// variant is one way in which addresses and programs can be.
type variant struct {
	opts lab.Options
	args []string
}

// eachVariant runs a test on IPv4, IPv6, on both at once, and with the programs that older
// kernels need.
func eachVariant(t *testing.T, test func(t *testing.T, v variant)) {
	for name, v := range map[string]variant{
		"IPv4":      {},
		"IPv6":      {opts: lab.Options{IPv6: true}},
		"DualStack": {opts: lab.Options{DualStack: true}},
		"TCX":       {opts: lab.Options{DualStack: true, IPv6: true}, args: []string{"--inbound", "tc", "--tc", "tcx"}},
		"Clsact":    {opts: lab.Options{DualStack: true}, args: []string{"--inbound", "tc", "--tc", "clsact"}},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "TCX" && netnstest.KernelBefore(6, 6) {
				t.Skip("tcx is in Linux since 6.6")
			}
			test(t, v)
		})
	}
}

// plug connects as an application with a non-blocking socket of the remote's address family
// does: connect, wait until writable, ask for the error. A v4-mapped remote takes an IPv6
// socket, as a JVM's are.
func plug(pod *lab.Pod, remote netip.AddrPort) (*net.TCPConn, error) {
	var fd int
	err := pod.Do(func() (err error) {
		family := unix.AF_INET6
		if remote.Addr().Is4() {
			family = unix.AF_INET
		}
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "client")
	defer file.Close() // FileConn has its own copy
	if err := connect(fd, remote); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

func connect(fd int, remote netip.AddrPort) error {
	var to unix.Sockaddr = &unix.SockaddrInet6{Port: int(remote.Port()), Addr: remote.Addr().As16()}
	if remote.Addr().Is4() {
		to = &unix.SockaddrInet4{Port: int(remote.Port()), Addr: remote.Addr().As4()}
	}
	switch err := unix.Connect(fd, to); err {
	case nil:
		return nil
	case unix.EINPROGRESS:
	default:
		return fmt.Errorf("connect: %w", err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(poll, int(patience.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return errors.Join(fmt.Errorf("wait for the connection: %d events", n), err)
		}
		break
	}
	result, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && result != 0 {
		err = unix.Errno(result)
	}
	return err
}

// peerName is what getpeername says on the socket.
func peerName(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var name unix.Sockaddr
	var nameErr error
	if err := raw.Control(func(fd uintptr) { name, nameErr = unix.Getpeername(int(fd)) }); err != nil {
		return netip.AddrPort{}, err
	}
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr), uint16(name.Port)), nil
	}
	return netip.AddrPort{}, nameErr
}
