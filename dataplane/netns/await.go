package netns

import (
	"errors"
	"net"

	"golang.org/x/sys/unix"
)

// AwaitDatagram waits until there is a datagram to read, so that nobody holds a buffer meanwhile.
// It fails as reading does. The one byte that it looks at is for sockets in a BPF sockmap: these
// have nothing to say to who asks for none (udp_bpf_recvmsg).
func AwaitDatagram(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var one [1]byte
	return raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN)
	})
}
