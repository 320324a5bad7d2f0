package netns

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// ListenPacket makes a UDP socket in the namespace. The caller closes it.
func (n *Namespace) ListenPacket(cfg ListenConfig) (*net.UDPConn, error) {
	conn, err := n.listenPacket(cfg)
	if err != nil {
		return nil, fmt.Errorf("listen for UDP on %v in %s: %w", cfg.Addr, n.path, err)
	}
	return conn, nil
}

func (n *Namespace) listenPacket(cfg ListenConfig) (*net.UDPConn, error) {
	file, err := n.packetSocket(familyOf(cfg.Addr.Addr()), unix.SOCK_DGRAM, unix.IPPROTO_UDP)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // FilePacketConn has its own copy
	fd := int(file.Fd())
	if err := setListenOptions(fd, cfg); err != nil {
		return nil, err
	}
	if err := nonblock.Bind(uintptr(fd), cfg.Addr); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	conn, err := net.FilePacketConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// Raw makes a raw socket in the namespace: family and protocol are those of socket(2). control
// sees it before anything can arrive at it. The caller closes it.
func (n *Namespace) Raw(family, protocol int, control func(fd int) error) (*os.File, error) {
	file, err := n.packetSocket(family, unix.SOCK_RAW, protocol)
	if err != nil {
		return nil, fmt.Errorf("make a raw socket in %s (needs CAP_NET_RAW): %w", n.path, err)
	}
	var failure error
	raw, err := file.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { failure = control(int(fd)) })
	}
	if err := errors.Join(err, failure); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare a raw socket in %s: %w", n.path, err), file.Close())
	}
	return file, nil
}

// packetSocket is one that does not block, in Go's poller.
func (n *Namespace) packetSocket(family, kind, protocol int) (file *os.File, err error) {
	err = n.Do(func() error {
		fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		file = os.NewFile(uintptr(fd), "packet socket")
		return nil
	})
	return file, err
}
