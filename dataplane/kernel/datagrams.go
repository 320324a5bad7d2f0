package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Datagrams is a pod's UDP in the agent's hands: what applications send to peers is received
// here, and what peers say is delivered to applications in the peers' names. However many flows
// there are, it is a handful of sockets. Its methods are safe for concurrent use.
type Datagrams struct {
	addrs []netip.Addr // of the pod
	netns uint64
	flows *ebpf.Map
	since uint64      // when it was opened: the value of its flows
	alone atomic.Bool // flows has none of earlier agents
	conn  *net.UDPConn
	quic  *net.UDPConn
	mark  [2]byte          // of quic
	raw   map[int]*os.File // speaks for peers, by address family
	icmp  map[int]*os.File // hears what applications refuse, likewise

	log *slog.Logger

	mu      sync.Mutex
	closed  bool
	pruning bool                               // prune is on its way
	ended   map[bpf.RacewayTuple]time.Duration // flows that are about to be forgotten, and since when they are not kept
}

// ErrForeign is the answer to an address that is none of the pod's.
var ErrForeign = errors.New("not an address of the pod")

// receiveBuffer holds what arrives while the agent's goroutine waits for a turn.
const receiveBuffer = 4 << 20

func (p *Pod) openDatagrams() (_ *Datagrams, err error) {
	d := &Datagrams{
		addrs: p.addrs, netns: p.ns.Cookie(), flows: p.d.loaded.maps.Flows, since: uint64(monotonic()),
		log: p.d.log.With("pod", p.uid),
		raw: make(map[int]*os.File), icmp: make(map[int]*os.File), ended: make(map[bpf.RacewayTuple]time.Duration),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if d.conn, err = p.listenDatagrams(); err != nil {
		return nil, err
	}
	if d.quic, err = p.listenQUIC(); err != nil {
		return nil, err
	}
	if d.mark, err = p.newMark(); err != nil {
		return nil, err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if _, ok := firstOf(p.addrs, family); !ok {
			continue
		}
		if d.raw[family], err = p.ns.Raw(family, unix.IPPROTO_RAW, p.prepareRaw); err != nil {
			return nil, err
		}
		if d.icmp[family], err = p.ns.Raw(family, icmpOf(family), hearRefusals(family)); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// listenDatagrams binds where the listeners do: steer is the only way in.
func (p *Pod) listenDatagrams() (*net.UDPConn, error) {
	var errs []error
	for _, addr := range listenAddrs() {
		conn, err := p.ns.ListenPacket(netns.ListenConfig{
			Addr:        netip.AddrPortFrom(addr, 0),
			Transparent: true,
			Control: func(fd int) error {
				return errors.Join(p.d.claimSocket(bpf.RacewayListenerLISTENER_DATAGRAMS)(fd), tellDestination(fd, addr))
			},
		})
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// listenQUIC binds the port that the packets are to come from. Applications may hold it as well,
// as steer says whose a packet is.
func (p *Pod) listenQUIC() (*net.UDPConn, error) {
	addr := netip.IPv6Unspecified()
	if _, ok := firstOf(p.addrs, unix.AF_INET6); !ok {
		addr = netip.IPv4Unspecified()
	}
	conn, err := p.ns.ListenPacket(netns.ListenConfig{
		Addr:    netip.AddrPortFrom(addr, dataplane.PortTunnel),
		Control: p.d.claimSocket(bpf.RacewayListenerLISTENER_QUIC),
	})
	if errors.Is(err, unix.EADDRINUSE) {
		err = fmt.Errorf("an application of the pod holds UDP port %d: %w", dataplane.PortTunnel, err)
	}
	return conn, err
}

// newMark is one that no other agent has in the pod.
func (p *Pod) newMark() (mark [2]byte, err error) {
	for err == nil {
		binary.BigEndian.PutUint16(mark[:], uint16(rand.Uint32()))
		var cookie uint64
		err = p.d.loaded.maps.QuicMarks.Lookup(p.quicKey(mark), &cookie)
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return mark, fmt.Errorf("choose a mark for connection IDs: %w", err)
	}
	return mark, nil
}

func (p *Pod) quicKey(mark [2]byte) bpf.RacewayQuicKey {
	return bpf.RacewayQuicKey{Netns: p.rec.Cookie, Mark: mark}
}

// tellDestination has the socket tell where a datagram was sent to, its mark, and its segments.
func tellDestination(fd int, addr netip.Addr) error {
	options := []struct {
		name          string
		level, option int
	}{
		{"IP_RECVORIGDSTADDR", unix.SOL_IP, unix.IP_RECVORIGDSTADDR},
		{"SO_RCVMARK", unix.SOL_SOCKET, unix.SO_RCVMARK},
		{"UDP_GRO", unix.SOL_UDP, unix.UDP_GRO},
	}
	if addr.Is6() {
		options = append(options, struct {
			name          string
			level, option int
		}{"IPV6_RECVORIGDSTADDR", unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR})
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.option, 1); err != nil {
			return os.NewSyscallError("setsockopt "+o.name, err)
		}
	}
	return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer))
}

// prepareRaw: the mark brings what the kernel answers (a closed port) back to lo.
func (p *Pod) prepareRaw(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, markApp); err != nil {
		return os.NewSyscallError("setsockopt SO_MARK", err)
	}
	return p.d.claimSocket(bpf.RacewayListenerLISTENER_NONE)(fd)
}

func icmpOf(family int) int {
	if family == unix.AF_INET {
		return unix.IPPROTO_ICMP
	}
	return unix.IPPROTO_ICMPV6
}

// Socket options and their values that package unix lacks (linux/icmp.h).
const icmpFilter = 1

// hearRefusals has the socket get nothing but messages about unreachable ports, by lo.
func hearRefusals(family int) func(fd int) error {
	return func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, loopbackIfindex); err != nil {
			return os.NewSyscallError("setsockopt SO_BINDTOIFINDEX", err)
		}
		if family == unix.AF_INET {
			blocked := ^uint32(1 << icmpUnreachable)
			return os.NewSyscallError("setsockopt ICMP_FILTER", unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, int(int32(blocked))))
		}
		var blocked unix.ICMPv6Filter
		for i := range blocked.Data {
			blocked.Data[i] = ^uint32(0)
		}
		blocked.Data[0] &^= 1 << icmp6Unreachable
		return os.NewSyscallError("setsockopt ICMP6_FILTER", unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, &blocked))
	}
}

// controlSpace is for the address, the mark and the size of segments.
const controlSpace = 128

// Wait waits until Receive has something. It fails as Receive does.
func (d *Datagrams) Wait() error { return netns.AwaitDatagram(d.conn) }

// Receive waits for a datagram of an application to a peer and reads it into b, which should
// hold 65,535 bytes: what is longer is cut off. It fails with net.ErrClosed once closed.
func (d *Datagrams) Receive(b []byte) (int, dataplane.Datagram, error) {
	var control [controlSpace]byte
	n, cn, _, from, err := d.conn.ReadMsgUDPAddrPort(b, control[:])
	if err != nil {
		return 0, dataplane.Datagram{}, err
	}
	got := dataplane.Datagram{From: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}
	if err := readControl(control[:cn], &got); err != nil {
		return 0, dataplane.Datagram{}, err
	}
	if !slices.Contains(d.addrs, got.From.Addr()) {
		return n, got, fmt.Errorf("datagram from %v: %w", got.From, ErrForeign)
	}
	return n, got, nil
}

func readControl(b []byte, d *dataplane.Datagram) error {
	for len(b) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return fmt.Errorf("read a datagram's control message: %w", err)
		}
		b = rest
		switch {
		case h.Level == unix.SOL_IP && h.Type == unix.IP_ORIGDSTADDR && len(data) >= unix.SizeofSockaddrInet4:
			d.To = netip.AddrPortFrom(netip.AddrFrom4([4]byte(data[4:])), binary.BigEndian.Uint16(data[2:]))
		case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_ORIGDSTADDR && len(data) >= 24:
			d.To = netip.AddrPortFrom(netip.AddrFrom16([16]byte(data[8:])), binary.BigEndian.Uint16(data[2:]))
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_MARK && len(data) >= 4:
			d.Whole = binary.NativeEndian.Uint32(data)&^uint32(markMask) != 0
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			d.Segment = int(binary.NativeEndian.Uint32(data))
		}
	}
	if !d.To.IsValid() {
		return errors.New("the kernel did not say where a datagram was sent to")
	}
	return nil
}

// Deliver gives payload to the application at to, one of the pod's addresses; it sees from as
// the sender. A payload that no packet holds fails with EMSGSIZE. What the application's socket
// has no room for is lost, as from any network, and EAGAIN says that lo has none: nothing waits.
func (d *Datagrams) Deliver(from, to netip.AddrPort, payload []byte) error {
	if len(payload) > maxUDPPayload-ipv4Header && from.Addr().Is4() || len(payload) > maxUDPPayload {
		return fmt.Errorf("deliver %d bytes to %v: %w", len(payload), to, unix.EMSGSIZE)
	}
	var space [ipv6Header + udpHeader]byte
	header := appendUDP(space[:0], from, to, payload)
	if len(header)+len(payload) > loopbackMTU {
		first, second := splitIPv6(header, payload, rand.Uint32())
		if err := d.write(from.Addr(), to, nil, first...); err != nil {
			return err
		}
		return d.write(from.Addr(), to, nil, second...)
	}
	return d.write(from.Addr(), to, nil, header, payload)
}

// Refuse tells the application at app that nothing listens at peer's port: its socket sees
// ECONNREFUSED, when it is connected or asks for errors.
func (d *Datagrams) Refuse(app, peer netip.AddrPort) error {
	return d.complain(icmpError{app: app, peer: peer})
}

// TooBig tells the application at app that a datagram of size bytes to peer was too long, and
// that at most longest are possible: it sees EMSGSIZE from then on, or its kernel fragments.
func (d *Datagrams) TooBig(app, peer netip.AddrPort, size, longest int) error {
	header := ipv6Header
	if app.Addr().Is4() {
		header = ipv4Header
	}
	return d.complain(icmpError{app: app, peer: peer, size: size, tooBig: true, mtu: header + udpHeader + longest})
}

func (d *Datagrams) complain(e icmpError) error {
	return d.write(e.peer.Addr(), e.app, unmarked(), e.appendTo(make([]byte, 0, 2*(ipv6Header+udpHeader)+icmpHeader)))
}

// unmarked takes the socket's mark off one packet: with fwmark_reflect IPv6 looks up the route
// whose MTU an error changes by the error's mark, and would find that to lo.
func unmarked() []byte {
	b := make([]byte, unix.CmsgSpace(4)) // the mark is zero
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SO_MARK
	h.SetLen(unix.CmsgLen(4))
	return b
}

// write sends a packet that is in parts to one of the pod's addresses, by lo. control is for
// sendmsg.
func (d *Datagrams) write(from netip.Addr, to netip.AddrPort, control []byte, parts ...[]byte) error {
	if !slices.Contains(d.addrs, to.Addr()) {
		return fmt.Errorf("send to %v: %w", to, ErrForeign)
	}
	family := familyOf(to.Addr())
	if familyOf(from) != family {
		return fmt.Errorf("send from %v to %v: %w", from, to, unix.EAFNOSUPPORT)
	}
	raw, err := d.raw[family].SyscallConn()
	if err != nil {
		return net.ErrClosed
	}
	var failure error
	err = raw.Write(func(fd uintptr) bool {
		_, failure = unix.SendmsgBuffers(int(fd), parts, control, ipSockaddr(to.Addr()), unix.MSG_DONTWAIT)
		return true
	})
	if err != nil {
		return net.ErrClosed
	}
	if failure != nil {
		return fmt.Errorf("send to %v: %w", to, os.NewSyscallError("sendmsg", failure))
	}
	return nil
}

func ipSockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Addr: a.As16()}
}

// Refused waits, for one address family, until an application's kernel says that nothing listens
// at a port that a datagram was delivered to: client is who Deliver named as the sender. It
// fails with net.ErrClosed once closed.
func (d *Datagrams) Refused(v4 bool) (client, app netip.AddrPort, err error) {
	family := unix.AF_INET6
	if v4 {
		family = unix.AF_INET
	}
	var b [1280]byte
	for {
		n, err := d.icmp[family].Read(b[:])
		if errors.Is(err, os.ErrClosed) {
			return client, app, net.ErrClosed
		}
		if err != nil {
			return client, app, fmt.Errorf("hear of closed ports: %w", err)
		}
		client, app, err = parseRefused(b[:n], v4)
		if err == nil && slices.Contains(d.addrs, app.Addr()) {
			return client, app, nil
		}
	}
}

// Families tells which of the two Refused can wait for.
func (d *Datagrams) Families() (v4, v6 bool) {
	return d.icmp[unix.AF_INET] != nil, d.icmp[unix.AF_INET6] != nil
}

// QUIC is the socket for the tunnel's port: what comes to UDP port 15008 of the pod's addresses,
// and by which the agent may speak to that of others. It is the caller's descriptor, who closes it.
// Packets to connection IDs that begin with mark still come to it when another agent has the pod.
func (d *Datagrams) QUIC() (conn *net.UDPConn, mark [2]byte, err error) {
	file, err := d.quic.File()
	if err != nil {
		return nil, mark, fmt.Errorf("take the socket of the tunnel's UDP port: %w", err)
	}
	defer func() { _ = file.Close() }() // FilePacketConn has its own copy
	packets, err := net.FilePacketConn(file)
	if err != nil {
		return nil, mark, fmt.Errorf("take the socket of the tunnel's UDP port: %w", err)
	}
	return packets.(*net.UDPConn), d.mark, nil
}

func (d *Datagrams) close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	var errs []error
	for _, conn := range []*net.UDPConn{d.conn, d.quic} {
		if conn == nil {
			continue
		}
		if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, files := range []map[int]*os.File{d.raw, d.icmp} {
		for _, f := range files {
			if f != nil {
				errs = append(errs, f.Close())
			}
		}
	}
	return errors.Join(errs...)
}

// SetDeadline has Receive and Refused fail with os.ErrDeadlineExceeded from t on; the zero time
// has them wait as long as it takes.
func (d *Datagrams) SetDeadline(t time.Time) error {
	errs := []error{d.conn.SetReadDeadline(t)}
	for _, f := range d.icmp {
		errs = append(errs, f.SetReadDeadline(t))
	}
	return errors.Join(errs...)
}

// sockets are those that steer gives datagrams to.
func (d *Datagrams) sockets() map[bpf.RacewayListener]syscall.Conn {
	return map[bpf.RacewayListener]syscall.Conn{
		bpf.RacewayListenerLISTENER_DATAGRAMS: d.conn,
		bpf.RacewayListenerLISTENER_QUIC:      d.quic,
	}
}
