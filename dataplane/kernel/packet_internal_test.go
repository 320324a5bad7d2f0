package kernel

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

func ends4() (netip.AddrPort, netip.AddrPort) {
	return netip.MustParseAddrPort("10.1.2.3:53"), netip.MustParseAddrPort("10.4.5.6:40000")
}

func ends6() (netip.AddrPort, netip.AddrPort) {
	return netip.MustParseAddrPort("[fd00::1]:53"), netip.MustParseAddrPort("[fd00::2]:40000")
}

// decode parses b with an implementation of others.
func decode(b []byte) gopacket.Packet {
	kind := layers.LayerTypeIPv4
	if b[0]>>4 == 6 {
		kind = layers.LayerTypeIPv6
	}
	return gopacket.NewPacket(b, kind, gopacket.Default)
}

func TestUDPHeaders(t *testing.T) {
	for _, ends := range []func() (netip.AddrPort, netip.AddrPort){ends4, ends6} {
		from, to := ends()
		for _, size := range []int{0, 1, 7, 8, 9, 1200, 1201} {
			payload := bytes.Repeat([]byte{0xff}, size)
			b := append(appendUDP(nil, from, to, payload), payload...)
			p := decode(b)
			udp, ok := p.TransportLayer().(*layers.UDP)
			if !ok || int(udp.SrcPort) != int(from.Port()) || int(udp.DstPort) != int(to.Port()) || !bytes.Equal(udp.Payload, payload) {
				t.Fatalf("%v to %v, %d bytes: %v", from, to, size, p)
			}
			if from.Addr().Is4() {
				continue // without a checksum
			}
			if err := udp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
			if err, r := udp.VerifyChecksum(); err != nil || !r.Valid {
				t.Errorf("%d bytes: checksum %x, want %x (%v)", size, r.Actual, r.Correct, err)
			}
		}
	}
}

func TestICMPErrors(t *testing.T) {
	peer4, app4 := ends4()
	peer6, app6 := ends6()
	for _, e := range []icmpError{
		{app: app4, peer: peer4, size: 100},
		{app: app4, peer: peer4, size: 1400, tooBig: true, mtu: 1328},
		{app: app6, peer: peer6, size: 100},
		{app: app6, peer: peer6, size: 1400, tooBig: true, mtu: 1348},
	} {
		b := e.appendTo(nil)
		p := decode(b)
		if p.ErrorLayer() != nil {
			t.Errorf("%+v: %v", e, p.ErrorLayer())
		}
		message, v4 := b, e.app.Addr().Is4()
		if !v4 {
			message = b[ipv6Header:]
		}
		from, to, err := parseRefused(message, v4)
		if e.tooBig != (err != nil) {
			t.Errorf("%+v: refused from %v to %v, %v", e, from, to, err)
		}
		if err == nil && (from != e.app || to != e.peer) {
			t.Errorf("%+v: refused from %v to %v", e, from, to)
		}
	}
}

// Two fragments hold the whole datagram, in parts of no more than lo takes.
func TestSplitIPv6(t *testing.T) {
	from, to := ends6()
	payload := bytes.Repeat([]byte("raceway"), maxUDPPayload/7+1)[:maxUDPPayload]
	header := appendUDP(nil, from, to, payload)
	first, second := splitIPv6(header, payload, 7)
	var whole []byte
	for i, parts := range [][][]byte{first, second} {
		b := bytes.Join(parts, nil)
		p := decode(b)
		f, ok := p.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment)
		if !ok || f.Identification != 7 || f.MoreFragments != (i == 0) || int(f.FragmentOffset)*8 != len(whole) || len(b) > loopbackMTU {
			t.Fatalf("fragment %d of %d bytes: %+v", i, len(b), f)
		}
		whole = append(whole, f.Payload...)
	}
	if !bytes.Equal(whole, append(header[ipv6Header:], payload...)) {
		t.Error("the fragments do not make the datagram")
	}
}

func FuzzParseRefused(f *testing.F) {
	for _, ends := range []func() (netip.AddrPort, netip.AddrPort){ends4, ends6} {
		peer, app := ends()
		b := icmpError{app: app, peer: peer, size: 9}.appendTo(nil)
		f.Add(b, true)
		f.Add(b[ipv6Header:], false)
	}
	f.Fuzz(func(t *testing.T, b []byte, v4 bool) {
		from, to, err := parseRefused(b, v4)
		if err == nil && (from.Addr().Is4() != v4 || to.Addr().Is4() != v4) {
			t.Errorf("refused from %v to %v, v4 %t", from, to, v4)
		}
	})
}
