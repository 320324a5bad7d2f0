package kernel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// The packets that the agent writes into a pod, and those that it reads there. All are small
// and of one shape: an IP header without options, and what follows it.

const (
	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
	icmpHeader = 8
	hops       = 64

	// maxUDPPayload is the longest that an IPv4 or IPv6 packet holds, in bytes; IPv4's is
	// shorter by its header.
	maxUDPPayload = 65535 - udpHeader

	// loopbackMTU is what every lo is born with. IPv6 packets may be longer by their header.
	loopbackMTU = 65536

	ipv6FragmentHeader = 8
	ipv6Fragment       = 44 // next header
)

// ICMP (RFC 792, RFC 1191) and ICMPv6 (RFC 4443).
const (
	icmpUnreachable     = 3
	icmpPortUnreachable = 3
	icmpTooBig          = 4 // a code of unreachable

	icmp6Unreachable     = 1
	icmp6PortUnreachable = 4
	icmp6TooBig          = 2
)

// appendIP writes the header of a packet that carries length bytes of protocol. The kernel fills
// IPv4's checksum in (raw(7)).
func appendIP(b []byte, from, to netip.Addr, protocol byte, length int) []byte {
	if from.Is4() {
		src, dst := from.As4(), to.As4()
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ipv4Header+length))
		b = append(b, 0, 0, 0, 0, hops, protocol, 0, 0)
		return append(append(b, src[:]...), dst[:]...)
	}
	src, dst := from.As16(), to.As16()
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(b, protocol, hops)
	return append(append(b, src[:]...), dst[:]...)
}

// appendUDP writes IP and UDP headers of a datagram. Over IPv4 it goes without a checksum (RFC
// 768): it does not leave the machine's memory.
func appendUDP(b []byte, from, to netip.AddrPort, payload []byte) []byte {
	length := udpHeader + len(payload)
	b = appendIP(b, from.Addr(), to.Addr(), unix.IPPROTO_UDP, length)
	start := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(b, 0, 0)
	if from.Addr().Is6() {
		sum := ^fold(addSum(addSum(pseudoSum(from.Addr(), to.Addr(), unix.IPPROTO_UDP, length), b[start:]), payload))
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(b[start+6:], sum)
	}
	return b
}

// splitIPv6 makes two fragments of an IPv6 packet that is too long for lo (RFC 8200 section 4.5);
// header is its IP and UDP headers. Each fragment is in parts.
func splitIPv6(header, payload []byte, id uint32) (first, second [][]byte) {
	const half = loopbackMTU / 2 // a multiple of 8
	ip, udp := header[:ipv6Header], header[ipv6Header:]
	fragment := func(offset, length int, more uint16) []byte {
		b := binary.BigEndian.AppendUint16(slices.Clone(ip[:4]), uint16(ipv6FragmentHeader+length))
		b = append(b, ipv6Fragment)
		b = append(b, ip[7:]...)
		b = append(b, ip[6], 0)
		b = binary.BigEndian.AppendUint16(b, uint16(offset)|more)
		return binary.BigEndian.AppendUint32(b, id)
	}
	cut := half - len(udp)
	first = [][]byte{append(fragment(0, half, 1), udp...), payload[:cut]}
	second = [][]byte{fragment(half, len(payload)-cut, 0), payload[cut:]}
	return first, second
}

// icmpError is one that names the datagram that app sent to peer, of size bytes of payload. It
// is spoken in the peer's name.
type icmpError struct {
	app, peer netip.AddrPort
	size      int
	tooBig    bool // and not a closed port
	mtu       int  // of IP packets, for tooBig
}

// appendTo quotes no more than the headers, by which the kernel finds the socket.
func (e icmpError) appendTo(b []byte) []byte {
	v4 := e.app.Addr().Is4()
	quoted := appendIP(nil, e.app.Addr(), e.peer.Addr(), unix.IPPROTO_UDP, udpHeader+e.size)
	quoted = binary.BigEndian.AppendUint16(quoted, e.app.Port())
	quoted = binary.BigEndian.AppendUint16(quoted, e.peer.Port())
	quoted = binary.BigEndian.AppendUint16(quoted, uint16(udpHeader+e.size))
	quoted = append(quoted, 0, 0)
	protocol := byte(unix.IPPROTO_ICMP)
	if !v4 {
		protocol = unix.IPPROTO_ICMPV6
	}
	length := icmpHeader + len(quoted)
	b = appendIP(b, e.peer.Addr(), e.app.Addr(), protocol, length)
	start := len(b)
	kind, code := e.kind(v4)
	b = append(b, kind, code, 0, 0)
	if v4 { // RFC 1191 section 4: 16 bits unused, then the MTU
		b = binary.BigEndian.AppendUint32(b, uint32(e.mtu&0xffff))
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(e.mtu))
	}
	b = append(b, quoted...)
	var sum uint32
	if !v4 {
		sum = pseudoSum(e.peer.Addr(), e.app.Addr(), protocol, length)
	}
	binary.BigEndian.PutUint16(b[start+2:], ^fold(addSum(sum, b[start:])))
	return b
}

func (e icmpError) kind(v4 bool) (kind, code byte) {
	switch {
	case v4 && e.tooBig:
		return icmpUnreachable, icmpTooBig
	case v4:
		return icmpUnreachable, icmpPortUnreachable
	case e.tooBig:
		return icmp6TooBig, 0
	default:
		return icmp6Unreachable, icmp6PortUnreachable
	}
}

var errNotRefused = errors.New("no ICMP message about a closed UDP port")

// parseRefused reads an ICMP message as a raw socket gives it (IPv4 with its header, IPv6
// without) that says of the datagram between from and to that nobody listens at to.
func parseRefused(b []byte, v4 bool) (from, to netip.AddrPort, err error) {
	kind, code := byte(icmp6Unreachable), byte(icmp6PortUnreachable)
	if v4 {
		kind, code = icmpUnreachable, icmpPortUnreachable
		if b, err = skipIPv4(b, unix.IPPROTO_ICMP); err != nil {
			return from, to, err
		}
	}
	if len(b) < icmpHeader || b[0] != kind || b[1] != code {
		return from, to, errNotRefused
	}
	return parseQuoted(b[icmpHeader:], v4)
}

func skipIPv4(b []byte, protocol byte) ([]byte, error) {
	if len(b) < ipv4Header || b[0]>>4 != 4 || b[9] != protocol {
		return nil, errNotRefused
	}
	header := int(b[0]&0xf) * 4
	if header < ipv4Header || len(b) < header {
		return nil, errNotRefused
	}
	return b[header:], nil
}

func parseQuoted(b []byte, v4 bool) (from, to netip.AddrPort, err error) {
	var src, dst netip.Addr
	rest := b
	if v4 {
		if rest, err = skipIPv4(b, unix.IPPROTO_UDP); err != nil {
			return from, to, err
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	} else {
		if len(b) < ipv6Header || b[0]>>4 != 6 || b[6] != unix.IPPROTO_UDP {
			return from, to, errNotRefused
		}
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		rest = b[ipv6Header:]
	}
	if len(rest) < udpHeader {
		return from, to, errNotRefused
	}
	return netip.AddrPortFrom(src, binary.BigEndian.Uint16(rest)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(rest[2:])), nil
}

// The Internet checksum (RFC 1071). pseudoSum is that of IPv6's pseudo header (RFC 8200
// section 8.1).
func pseudoSum(from, to netip.Addr, protocol byte, length int) uint32 {
	src, dst := from.As16(), to.As16()
	return addSum(addSum(uint32(length)+uint32(protocol), src[:]), dst[:])
}

// addSum adds 16-bit words; what it is given before the last call has an even length.
func addSum(sum uint32, b []byte) uint32 {
	wide := uint64(sum)
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		wide += v>>32 + v&0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		wide += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		wide += uint64(b[0]) << 8
	}
	for wide>>16 > 0xffff {
		wide = wide>>16 + wide&0xffff
	}
	return uint32(wide)
}

func fold(sum uint32) uint16 {
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
