package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socketQuery is struct inet_diag_req_v2 (linux/inet_diag.h) about one TCP socket. netlink's own
// destroys IPv4 sockets only, and whatever the kernel finds: where the connection is gone that
// is a listener, whichever SK_LOOKUP would pick.
type socketQuery struct {
	local, remote netip.AddrPort
	cookie        uint64 // of the socket that is meant; anyCookie for any
}

const (
	socketQuerySize = 56
	anyCookie       = 1<<64 - 1 // INET_DIAG_NOCOOKIE, twice
	// Of struct inet_diag_msg.
	remotePortAt, cookieAt, socketAnswerSize = 6, 44, 72
)

// Len is nl.NetlinkRequestData's.
func (q socketQuery) Len() int { return socketQuerySize }

// Serialize is nl.NetlinkRequestData's.
func (q socketQuery) Serialize() []byte {
	b := make([]byte, socketQuerySize)
	b[0], b[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if q.local.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	binary.BigEndian.PutUint16(b[8:], q.local.Port())
	binary.BigEndian.PutUint16(b[10:], q.remote.Port())
	copy(b[12:28], q.local.Addr().AsSlice())
	copy(b[28:44], q.remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(b[48:], q.cookie)
	return b
}

func (q socketQuery) ask(kind, flags, answer int) ([][]byte, error) {
	req := nl.NewNetlinkRequest(kind, flags)
	req.AddData(q)
	return req.Execute(unix.NETLINK_INET_DIAG, uint16(answer))
}

// destroy ends a connection of the current network namespace with a reset to its peer. There
// may be none any more.
func destroy(local, remote netip.AddrPort) error {
	q := socketQuery{local, remote, anyCookie}
	answers, err := q.ask(nl.SOCK_DIAG_BY_FAMILY, 0, nl.SOCK_DIAG_BY_FAMILY)
	if err == nil && (len(answers) != 1 || len(answers[0]) < socketAnswerSize) {
		err = errors.New("the kernel's answer is no socket")
	}
	if err == nil {
		if binary.BigEndian.Uint16(answers[0][remotePortAt:]) != remote.Port() {
			return nil // a listener, where the connection was
		}
		q.cookie = binary.NativeEndian.Uint64(answers[0][cookieAt:])
		_, err = q.ask(nl.SOCK_DESTROY, unix.NLM_F_ACK, 0)
	}
	if err != nil && !isGone(err) {
		return fmt.Errorf("destroy the socket %s of a connection to %s: %w", local, remote, err)
	}
	return nil
}

// isGone is about a socket that is not there, or is another than the one that is meant.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) }

// canDestroy asks for the end of a socket that cannot be: whether the kernel looks for it tells
// whether it can (CONFIG_INET_DIAG_DESTROY).
func canDestroy() error {
	nobody := netip.MustParseAddrPort("192.0.2.1:1")
	if _, err := (socketQuery{nobody, nobody, 1}).ask(nl.SOCK_DESTROY, unix.NLM_F_ACK, 0); err != nil && !isGone(err) {
		return fmt.Errorf("destroy sockets: %w", err)
	}
	return nil
}
