package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// destruction is struct inet_diag_req_v2 (linux/inet_diag.h), which netlink has for IPv4 alone.
type destruction struct{ local, remote netip.AddrPort }

const (
	destructionSize = 56
	anyCookie       = 1<<32 - 1 // INET_DIAG_NOCOOKIE
)

// Len is nl.NetlinkRequestData's.
func (r destruction) Len() int { return destructionSize }

// Serialize is nl.NetlinkRequestData's.
func (r destruction) Serialize() []byte {
	b := make([]byte, destructionSize)
	b[0], b[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if r.local.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	binary.BigEndian.PutUint16(b[8:], r.local.Port())
	binary.BigEndian.PutUint16(b[10:], r.remote.Port())
	copy(b[12:28], r.local.Addr().AsSlice())
	copy(b[28:44], r.remote.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[48:], anyCookie)
	binary.NativeEndian.PutUint32(b[52:], anyCookie)
	return b
}

// destroy ends a socket of the current network namespace with a reset to its peer. There may
// be none any more.
func destroy(local, remote netip.AddrPort) error {
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(destruction{local, remote})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("destroy the socket %s of a connection to %s: %w", local, remote, err)
	}
	return nil
}

// canDestroy asks for the end of a socket that cannot be: whether the kernel looks for it tells
// whether it can (CONFIG_INET_DIAG_DESTROY).
func canDestroy() error {
	nobody := netip.MustParseAddrPort("192.0.2.1:1")
	return destroy(nobody, nobody)
}
