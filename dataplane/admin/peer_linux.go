package admin

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// checkPeer reports why the process at the other end may not use the API: only root and
// the agent's own user may, whatever the modes of the socket's file say.
func checkPeer(conn net.Conn) error {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a connection of type %T has no peer credentials", conn)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return fmt.Errorf("read the peer's credentials: %w", err)
	}
	var cred *syscall.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("read the peer's credentials: %w", err)
	}
	return allowUID(cred.Uid, uint32(os.Geteuid()))
}

func allowUID(peer, own uint32) error {
	if peer != 0 && peer != own {
		return fmt.Errorf("user id %d may not use the agent's socket: run this as root", peer)
	}
	return nil
}
