package nonblock

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Accept is accept4(2): a socket of TCP that does not block, and who connected; EAGAIN when there is
// nobody.
func Accept(listener uintptr) (fd int, remote netip.AddrPort, err error) {
	var address unix.RawSockaddrAny
	size := uint32(unix.SizeofSockaddrAny)
	fd, err = again(func() (uintptr, unix.Errno) {
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, listener, uintptr(unsafe.Pointer(&address)), uintptr(unsafe.Pointer(&size)),
			unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		return fd, errno
	})
	if err != nil {
		return -1, netip.AddrPort{}, err
	}
	return fd, addrPort(&address), nil
}

// Connect is connect(2) of a socket of TCP: EINPROGRESS, EALREADY and EINTR while it goes on.
func Connect(fd uintptr, to netip.AddrPort) error { return give(unix.SYS_CONNECT, fd, to) }

// Bind is bind(2) of a socket of TCP or UDP.
func Bind(fd uintptr, to netip.AddrPort) error { return give(unix.SYS_BIND, fd, to) }

func give(call, fd uintptr, address netip.AddrPort) error {
	if address.Addr().Is4() {
		four := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: networkOrder(address.Port()), Addr: address.Addr().As4()}
		return do(unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&four)), unix.SizeofSockaddrInet4))
	}
	six := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: networkOrder(address.Port()), Addr: address.Addr().As16()}
	return do(unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&six)), unix.SizeofSockaddrInet6))
}

// do is what a system call says that returns nothing.
func do(_, _ uintptr, errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// Set is setsockopt(2), of a value as the kernel has it in memory. A number is an int32.
func Set[T any](fd uintptr, level, option int, value *T) error {
	return do(unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, uintptr(level), uintptr(option), uintptr(unsafe.Pointer(value)), unsafe.Sizeof(*value), 0))
}

// TCPInfo is what the kernel tells of a connection (tcp(7)), zero what it does not know of.
func TCPInfo(fd uintptr) (info unix.TCPInfo, err error) {
	size := uint32(unix.SizeofTCPInfo)
	err = do(unix.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_INFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0))
	return info, err
}

// Local and Remote are getsockname(2) and getpeername(2) of a socket of TCP; zero of another.
func Local(fd uintptr) (netip.AddrPort, error) { return name(unix.SYS_GETSOCKNAME, fd) }

func Remote(fd uintptr) (netip.AddrPort, error) { return name(unix.SYS_GETPEERNAME, fd) }

func name(call, fd uintptr) (netip.AddrPort, error) {
	var address unix.RawSockaddrAny
	size := uint32(unix.SizeofSockaddrAny)
	if err := do(unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&address)), uintptr(unsafe.Pointer(&size)))); err != nil {
		return netip.AddrPort{}, err
	}
	return addrPort(&address), nil
}

// Close is close(2) of a socket that does not linger, as it does not by itself.
func Close(fd uintptr) error { return do(unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)) }

// CloseWrite is shutdown(2) of our direction.
func CloseWrite(fd uintptr) error { return do(unix.RawSyscall(unix.SYS_SHUTDOWN, fd, unix.SHUT_WR, 0)) }

// addrPort of IPv4 in IPv6 is IPv4's.
func addrPort(address *unix.RawSockaddrAny) netip.AddrPort {
	switch address.Addr.Family {
	case unix.AF_INET:
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(address))
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), networkOrder(four.Port))
	case unix.AF_INET6:
		six := (*unix.RawSockaddrInet6)(unsafe.Pointer(address))
		return netip.AddrPortFrom(netip.AddrFrom16(six.Addr).Unmap(), networkOrder(six.Port))
	default:
		return netip.AddrPort{}
	}
}

// networkOrder converts a port to it, and back.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}
