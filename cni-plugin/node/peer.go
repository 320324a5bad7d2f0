package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

type peerKey struct{}

type peerVerdict struct{ err error }

// withPeer judges a connection once; every request on it gets the verdict.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, peerVerdict{checkPeer(conn)})
}

// authorize fails closed: a request without a verdict is refused.
func authorize(ctx context.Context) error {
	v, ok := ctx.Value(peerKey{}).(peerVerdict)
	if !ok {
		return errors.New("the connection's peer is not known")
	}
	return v.err
}

// checkPeer admits root, which runs the container runtime, and the agent's own user, whatever
// the modes of the socket's file say: who may say what a pod's network namespace is could
// have the agent capture any.
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
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user id %d may not use the agent's CNI socket: it is for the container runtime, which runs as root", cred.Uid)
	}
	return nil
}
