package kernel_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func dialMarked(t *testing.T, f *fixture, remote netip.AddrPort, mark int) *net.TCPConn {
	t.Helper()
	return dialWith(t, f.web.Namespace, netns.DialConfig{Remote: remote, Mark: uint32(mark)})
}

func dialWith(t *testing.T, ns *netns.Namespace, cfg netns.DialConfig) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := ns.Dial(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func setMark(t *testing.T, conn *net.TCPConn, mark int) {
	t.Helper()
	control(t, conn, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) })
}

func control(t *testing.T, conn *net.TCPConn, fn func(fd int) error) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	if inner != nil {
		t.Fatal(inner)
	}
}

// What an application can do to its socket before it connects does not change its fate.
func TestEveryKindOfConnectIsCaptured(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		destination := netip.AddrPortFrom(f.db.V4, 3306)
		mapped := netip.AddrPortFrom(netip.AddrFrom16(f.db.V4.As16()), 3306)
		for _, c := range []struct {
			name    string
			connect func(t *testing.T) int
		}{
			{"blocking", func(t *testing.T) int { return connectRaw(t, f, unix.AF_INET, destination, nil) }},
			{"v4-mapped", func(t *testing.T) int { return connectRaw(t, f, unix.AF_INET6, mapped, nil) }},
			{"bound to eth0", func(t *testing.T) int {
				return connectRaw(t, f, unix.AF_INET, destination, func(fd int) error { return unix.BindToDevice(fd, "eth0") })
			}},
			{"bound to the pod's address", func(t *testing.T) int {
				return connectRaw(t, f, unix.AF_INET, destination, func(fd int) error {
					return unix.Bind(fd, &unix.SockaddrInet4{Addr: f.web.V4.As4(), Port: 0})
				})
			}},
			{"TCP Fast Open", func(t *testing.T) int { return fastOpen(t, f, destination) }},
			{"MPTCP", func(t *testing.T) int { return connectMPTCP(t, f, destination) }},
		} {
			t.Run(c.name, func(t *testing.T) {
				fd := c.connect(t)
				conn := accept(t, f.pod.Outbound())
				if got := addrPort(conn.LocalAddr()); got != destination {
					t.Errorf("original destination %v, want %v", got, destination)
				}
				if got := addrPort(conn.RemoteAddr()).Addr(); got != f.web.V4 {
					t.Errorf("client %v, want %v", got, f.web.V4)
				}
				if _, err := unix.Write(fd, []byte("data")); err != nil {
					t.Fatal(err)
				}
				receive(t, conn, "data")
			})
		}
	})
}

func connectRaw(t *testing.T, f *fixture, family int, to netip.AddrPort, prepare func(fd int) error) int {
	t.Helper()
	fd := socket(t, f.web.Namespace, family, unix.IPPROTO_TCP)
	if prepare != nil {
		if err := prepare(fd); err != nil {
			t.Fatal(err)
		}
	}
	err := unix.Connect(fd, sockaddr(family, to))
	for errors.Is(err, unix.EINTR) { // by a signal of Go's scheduler; it goes on waiting
		err = unix.Connect(fd, sockaddr(family, to))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func connectMPTCP(t *testing.T, f *fixture, to netip.AddrPort) int {
	t.Helper()
	fd := socket(t, f.web.Namespace, unix.AF_INET, unix.IPPROTO_MPTCP)
	if err := unix.Connect(fd, sockaddr(unix.AF_INET, to)); err != nil {
		t.Fatal(err)
	}
	return fd
}

// fastOpen connects by sending, without calling connect.
func fastOpen(t *testing.T, f *fixture, to netip.AddrPort) int {
	t.Helper()
	fd := socket(t, f.web.Namespace, unix.AF_INET, unix.IPPROTO_TCP)
	// Without a cookie the kernel sends a plain SYN and keeps the data for later.
	if err := unix.Sendto(fd, nil, unix.MSG_FASTOPEN, sockaddr(unix.AF_INET, to)); err != nil {
		t.Fatal(err)
	}
	return fd
}

func socket(t *testing.T, ns *netns.Namespace, family, proto int) int {
	t.Helper()
	fd := -1
	netnstest.Do(t, ns, func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, proto)
		return err
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return fd
}

func sockaddr(family int, a netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().Unmap().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func TestLoopbackAndOwnAddressAreLeftAlone(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, c := range []struct{ name, listen, dial string }{
			{"127.0.0.1", "127.0.0.1:7000", "127.0.0.1:7000"},
			{"::1", "[::1]:7000", "[::1]:7000"},
			{"own v4 address", f.web.V4.String() + ":7001", f.web.V4.String() + ":7001"},
			{"own v6 address", "[" + f.web.V6.String() + "]:7001", "[" + f.web.V6.String() + "]:7001"},
			{"unspecified", "127.0.0.1:7002", "0.0.0.0:7002"},
			{"the outbound listener's port", "127.0.0.1:15001", "127.0.0.1:15001"},
		} {
			t.Run(c.name, func(t *testing.T) {
				l := netnstest.Listen(t, f.web.Namespace, "tcp", c.listen)
				app := dial(t, f.web.Namespace, netip.MustParseAddrPort(c.dial))
				send(t, app, accept(t, l), "to myself")
			})
		}
	})
}
