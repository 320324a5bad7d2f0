package kernel_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// wire injects frames at a pod's eth0, past its queueing discipline and every program in
// the pod, and watches what comes out at the other pod.
type wire struct {
	tx, rx   int
	src, dst net.HardwareAddr
	from, to *netnstest.Pod
	seq      int
}

func newWire(t *testing.T, node *netnstest.Node, from, to *netnstest.Pod) *wire {
	t.Helper()
	w := &wire{from: from, to: to}
	netnstest.Do(t, from.Namespace, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		w.src = l.Attrs().HardwareAddr
		w.tx, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.tx, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
		return unix.Bind(w.tx, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index})
	})
	t.Cleanup(func() { _ = unix.Close(w.tx) })
	netnstest.Do(t, node.Namespace, func() error {
		l, err := netlink.LinkByName(from.HostInterface)
		if err == nil {
			w.dst = l.Attrs().HardwareAddr
		}
		return err
	})
	netnstest.Do(t, to.Namespace, func() (err error) {
		w.rx, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		return err
	})
	t.Cleanup(func() { _ = unix.Close(w.rx) })
	return w
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// eth is an Ethernet header; gopacket's own pads the frame, which a veth pair does not.
func (w *wire) eth(kind layers.EthernetType) gopacket.Payload {
	header := append(slices.Clone(w.dst), w.src...)
	return gopacket.Payload(binary.BigEndian.AppendUint16(header, uint16(kind)))
}

func (w *wire) ip4(proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: proto, SrcIP: w.from.V4.AsSlice(), DstIP: w.to.V4.AsSlice()}
}

func (w *wire) ip6(proto layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: proto, SrcIP: w.from.V6.AsSlice(), DstIP: w.to.V6.AsSlice()}
}

func (w *wire) send(t *testing.T, stack ...gopacket.SerializableLayer) {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true}, stack...); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(w.tx, buf.Bytes()); err != nil {
		t.Fatal(err)
	}
}

// arrives reports whether a frame with text comes out, which is decided when a datagram
// that was sent after it has come out.
func (w *wire) arrives(t *testing.T, text string) bool {
	t.Helper()
	w.seq++
	sentinel := fmt.Sprintf("sentinel %d", w.seq)
	ip := w.ip4(layers.IPProtocolUDP)
	udp := &layers.UDP{SrcPort: 5, DstPort: 5}
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(ip), udp, gopacket.Payload(sentinel))
	if err := unix.SetsockoptTimeval(w.rx, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}); err != nil {
		t.Fatal(err)
	}
	seen := false
	frame := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(w.rx, frame, 0)
		if err != nil {
			t.Fatalf("the sentinel did not arrive: %v", err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if bytes.Contains(frame[:n], []byte(sentinel)) {
			return seen
		}
		seen = seen || bytes.Contains(frame[:n], []byte(text))
	}
}

// checksummed fills in the IPv4 header checksum, without which routers drop a packet.
func checksummed(ip *layers.IPv4) gopacket.SerializableLayer { return withChecksum{ip} }

type withChecksum struct{ *layers.IPv4 }

func (c withChecksum) SerializeTo(b gopacket.SerializeBuffer, opts gopacket.SerializeOptions) error {
	opts.ComputeChecksums = true
	return c.IPv4.SerializeTo(b, opts)
}

const nonce = "plaintext-5f2c"

type injection struct {
	name    string
	stack   func(w *wire) []gopacket.SerializableLayer
	counter string // of the guard
	passes  bool   // and comes out at the other pod with the nonce
}

func tcp(flags func(*layers.TCP)) *layers.TCP {
	s := &layers.TCP{SrcPort: 7777, DstPort: 8888, DataOffset: 5, Window: 1000, Seq: 1}
	flags(s)
	return s
}

func ack(s *layers.TCP) { s.ACK = true }
func syn(s *layers.TCP) { s.SYN = true }

// raw4 is an IPv4 packet with nothing but the nonce in it.
func raw4(w *wire, proto layers.IPProtocol, change func(*layers.IPv4)) []gopacket.SerializableLayer {
	ip := w.ip4(proto)
	change(ip)
	return []gopacket.SerializableLayer{w.eth(layers.EthernetTypeIPv4), checksummed(ip), gopacket.Payload("........" + nonce)}
}

func unchanged(*layers.IPv4) {}

// extended is IPv6 with extension headers, given as bytes after the next header field.
func extended(w *wire, first layers.IPProtocol, headers []byte, upper gopacket.SerializableLayer) []gopacket.SerializableLayer {
	return []gopacket.SerializableLayer{w.eth(layers.EthernetTypeIPv6), w.ip6(first), gopacket.Payload(headers), upper, gopacket.Payload(nonce)}
}

func ipv4Injections() []injection {
	v4 := layers.EthernetTypeIPv4
	return []injection{
		{"SYN from a raw socket", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolTCP)), tcp(syn), gopacket.Payload(nonce)}
		}, "dropped_connect", false},
		{"payload from a raw socket", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolTCP)), tcp(ack), gopacket.Payload(nonce)}
		}, "dropped_payload", false},
		{"payload in a SYN-ACK", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolTCP)), tcp(func(s *layers.TCP) { s.SYN, s.ACK = true, true }), gopacket.Payload(nonce)}
		}, "dropped_payload", false},
		{"bare ACK", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolTCP)), tcp(ack)}
		}, "passed_no_data", false},
		{"UDP", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolUDP)), &layers.UDP{SrcPort: 9, DstPort: 9}, gopacket.Payload(nonce)}
		}, "passed_not_tcp", true},
		{"ICMP", func(w *wire) []gopacket.SerializableLayer { return raw4(w, layers.IPProtocolICMPv4, unchanged) }, "passed_not_tcp", true},
		{"UDP fragment", func(w *wire) []gopacket.SerializableLayer {
			return raw4(w, layers.IPProtocolUDP, func(ip *layers.IPv4) { ip.Flags = layers.IPv4MoreFragments })
		}, "passed_not_tcp", true},
		{"foreign source", func(w *wire) []gopacket.SerializableLayer {
			return raw4(w, layers.IPProtocolUDP, func(ip *layers.IPv4) { ip.SrcIP = net.IPv4(10, 88, 0, 99).To4() })
		}, "dropped_foreign_source", false},
		{"IPIP", func(w *wire) []gopacket.SerializableLayer { return raw4(w, layers.IPProtocolIPv4, unchanged) }, "dropped_protocol", false},
		{"6in4", func(w *wire) []gopacket.SerializableLayer { return raw4(w, layers.IPProtocolIPv6, unchanged) }, "dropped_protocol", false},
		{"GRE", func(w *wire) []gopacket.SerializableLayer { return raw4(w, layers.IPProtocolGRE, unchanged) }, "dropped_protocol", false},
		{"AH", func(w *wire) []gopacket.SerializableLayer { return raw4(w, layers.IPProtocolAH, unchanged) }, "dropped_protocol", false},
		{"first TCP fragment", func(w *wire) []gopacket.SerializableLayer {
			return raw4(w, layers.IPProtocolTCP, func(ip *layers.IPv4) { ip.Flags = layers.IPv4MoreFragments })
		}, "dropped_fragment", false},
		{"later TCP fragment", func(w *wire) []gopacket.SerializableLayer {
			return raw4(w, layers.IPProtocolTCP, func(ip *layers.IPv4) { ip.FragOffset = 100 })
		}, "dropped_fragment", false},
		{"TCP with IP options", func(w *wire) []gopacket.SerializableLayer {
			ip := w.ip4(layers.IPProtocolTCP)
			ip.Options = []layers.IPv4Option{{OptionType: 131, OptionLength: 7, OptionData: []byte{4, 10, 88, 1, 1}}}
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(ip), tcp(ack), gopacket.Payload(nonce)}
		}, "dropped_source_route", false},
		{"TCP without room for its header", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v4), checksummed(w.ip4(layers.IPProtocolTCP)), gopacket.Payload(nonce[:8])}
		}, "dropped_malformed", false},
		{"VLAN", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(layers.EthernetTypeDot1Q), &layers.Dot1Q{VLANIdentifier: 5, Type: v4}, checksummed(w.ip4(layers.IPProtocolTCP)), tcp(ack), gopacket.Payload(nonce)}
		}, "dropped_vlan", false},
		{"MPLS", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(layers.EthernetTypeMPLSUnicast), gopacket.Payload(nonce)}
		}, "dropped_ethertype", false},
		{"ARP", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(layers.EthernetTypeARP), &layers.ARP{
				AddrType: layers.LinkTypeEthernet, Protocol: v4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
				SourceHwAddress: w.src, SourceProtAddress: w.from.V4.AsSlice(), DstHwAddress: make([]byte, 6), DstProtAddress: w.from.Gateway4.AsSlice(),
			}}
		}, "passed_arp", false},
	}
}

func ipv6Injections() []injection {
	v6 := layers.EthernetTypeIPv6
	from := func(w *wire, src string, proto layers.IPProtocol) *layers.IPv6 {
		ip := w.ip6(proto)
		ip.SrcIP = net.ParseIP(src)
		ip.DstIP = net.ParseIP("ff02::1:ff00:2")
		return ip
	}
	mld := append([]byte{58, 0, 5, 2, 0, 0, 1, 0}, 143, 0, 0, 0, 0, 0, 0, 0) // hop-by-hop with router alert, MLDv2 report
	return []injection{
		{"SYN from a raw socket", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), w.ip6(layers.IPProtocolTCP), tcp(syn), gopacket.Payload(nonce)}
		}, "dropped_connect", false},
		{"payload behind extension headers", func(w *wire) []gopacket.SerializableLayer {
			return extended(w, 0, []byte{60, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0}, tcp(ack))
		}, "dropped_payload", false},
		{"more extension headers than anyone needs", func(w *wire) []gopacket.SerializableLayer {
			return extended(w, 60, append(bytes.Repeat([]byte{60, 0, 1, 4, 0, 0, 0, 0}, 8), 6, 0, 1, 4, 0, 0, 0, 0), tcp(ack))
		}, "dropped_malformed", false},
		{"TCP fragment", func(w *wire) []gopacket.SerializableLayer {
			return extended(w, 44, []byte{6, 0, 0, 1, 0, 0, 0, 9}, tcp(ack))
		}, "dropped_fragment", false},
		{"fragment that hides what follows", func(w *wire) []gopacket.SerializableLayer {
			return extended(w, 44, []byte{60, 0, 0, 1, 0, 0, 0, 9, 6, 0, 1, 4, 0, 0, 0, 0}, tcp(ack))
		}, "dropped_protocol", false},
		{"routing header", func(w *wire) []gopacket.SerializableLayer {
			return extended(w, 43, []byte{6, 0, 4, 0, 0, 0, 0, 0}, tcp(ack))
		}, "dropped_source_route", false},
		{"4in6", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), w.ip6(4), gopacket.Payload(nonce)}
		}, "dropped_protocol", false},
		{"UDP", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), w.ip6(layers.IPProtocolUDP), &layers.UDP{SrcPort: 9, DstPort: 9}, gopacket.Payload(nonce)}
		}, "passed_not_tcp", true},
		{"TCP from a link-local address", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), from(w, "fe80::1234", layers.IPProtocolTCP), tcp(ack), gopacket.Payload(nonce)}
		}, "dropped_foreign_source", false},
		{"UDP from the unspecified address", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), from(w, "::", layers.IPProtocolUDP), &layers.UDP{SrcPort: 9, DstPort: 9}, gopacket.Payload(nonce)}
		}, "dropped_foreign_source", false},
		{"neighbour solicitation from link-local", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), from(w, "fe80::1234", layers.IPProtocolICMPv6), gopacket.Payload(append([]byte{135, 0, 0, 0}, nonce...))}
		}, "passed_not_tcp", false},
		{"duplicate address detection", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), from(w, "::", layers.IPProtocolICMPv6), gopacket.Payload(append([]byte{135, 0, 0, 0}, nonce...))}
		}, "passed_not_tcp", false},
		{"multicast listener report", func(w *wire) []gopacket.SerializableLayer {
			return []gopacket.SerializableLayer{w.eth(v6), from(w, "fe80::1234", 0), gopacket.Payload(mld)}
		}, "passed_not_tcp", false},
	}
}

func TestGuardJudgesInjectedPackets(t *testing.T) {
	netnstest.Require(t)
	for _, m := range modes()[:2] { // the guard does not depend on the inbound mode
		t.Run(m.name, func(t *testing.T) {
			f := enrolled(t, m)
			w := newWire(t, f.node, f.web, f.db)
			for version, cases := range map[string][]injection{"v4": ipv4Injections(), "v6": ipv6Injections()} {
				for _, c := range cases {
					t.Run(version+"/"+c.name, func(t *testing.T) {
						before := f.counter(t, "guard", c.counter)
						w.send(t, c.stack(w)...)
						if got := w.arrives(t, nonce); got != c.passes {
							t.Errorf("arrives: %v, want %v", got, c.passes)
						}
						// The sentinel is UDP itself, and the kernel sends ARP on its own.
						if got := f.counter(t, "guard", c.counter) - before; got == 0 || (got > 1 && c.counter[:7] == "dropped") {
							t.Errorf("guard %s went up by %d", c.counter, got)
						}
					})
				}
			}
		})
	}
}

// TestInjectedPlaintextArrivesWithoutGuard shows that the test above can fail.
func TestInjectedPlaintextArrivesWithoutGuard(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	w := newWire(t, f.node, f.web, f.db)
	f.openPod(t)
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(w.ip4(layers.IPProtocolTCP)), tcp(ack), gopacket.Payload(nonce))
	if !w.arrives(t, nonce) {
		t.Error("a segment of an unguarded pod did not arrive")
	}
}

func TestForgedMarksDoNotBypassCapture(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		w := newWire(t, f.node, f.web, f.db)
		destination := netip.AddrPortFrom(f.db.V4, 3306)
		netnstest.Listen(t, f.db.Namespace, "tcp", destination.String())
		for _, mark := range []int{0x72610, 0x72611, 1} {
			app := dialMarked(t, f, destination, mark)
			conn := accept(t, f.pod.Outbound())
			if got := addrPort(conn.LocalAddr()); got != destination {
				t.Errorf("mark %#x: captured for %v, want %v", mark, got, destination)
			}
			// Afterwards the mark may go, and the packets take the way out; not far.
			setMark(t, app, 0)
			if _, err := app.Write([]byte(nonce)); err != nil {
				t.Fatal(err)
			}
			if w.arrives(t, nonce) {
				t.Errorf("mark %#x taken off after connect: plaintext got out", mark)
			}
		}
		if f.counter(t, "guard", "dropped_payload") == 0 {
			t.Error("the guard counted nothing")
		}
	})
}
