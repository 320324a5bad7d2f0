package e2e

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// startEscapes tries, until it is stopped, to get a message out of pod in clear as a hostile
// container with CAP_NET_RAW could: TCP segments that never saw a socket of the pod's TCP.
func startEscapes(t *testing.T, c *cluster, pod *lab.Pod, to netip.AddrPort) (stop func()) {
	t.Helper()
	var self, gateway *net.Interface
	if err := pod.Do(func() (err error) { self, err = net.InterfaceByName("eth0"); return err }); err != nil {
		t.Fatal(err)
	}
	err := c.Node(1).Do(func() error {
		link, err := netlink.LinkByName(pod.HostEnd())
		if err == nil {
			gateway = &net.Interface{HardwareAddr: link.Attrs().HardwareAddr}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var conn *packet.Conn
	err = pod.Do(func() (err error) { conn, err = packet.Listen(self, packet.Raw, unix.ETH_P_ALL, nil); return err })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var sender sync.WaitGroup
	sender.Go(func() {
		for ctx.Err() == nil {
			frame := segment(self.HardwareAddr, gateway.HardwareAddr, pod.Addr(), to, nonce())
			if _, err := conn.WriteTo(frame, &packet.Addr{HardwareAddr: gateway.HardwareAddr}); err != nil {
				t.Error("send a forged segment:", err)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		sender.Wait()
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// segment is a whole frame with a TCP segment that carries payload.
func segment(src, dst net.HardwareAddr, from netip.Addr, to netip.AddrPort, payload []byte) []byte {
	eth := &layers.Ethernet{SrcMAC: src, DstMAC: dst, EthernetType: layers.EthernetTypeIPv4}
	tcp := &layers.TCP{SrcPort: 40000, DstPort: layers.TCPPort(to.Port()), Seq: 1, Ack: 1, ACK: true, PSH: true, Window: 1024}
	var ip gopacket.NetworkLayer
	var head gopacket.SerializableLayer
	if from.Is4() {
		v4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: to.Addr().AsSlice()}
		ip, head = v4, v4
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		v6 := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: to.Addr().AsSlice()}
		ip, head = v6, v6
	}
	buffer := gopacket.NewSerializeBuffer()
	err := tcp.SetNetworkLayerForChecksum(ip)
	if err == nil {
		err = gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, head, tcp, gopacket.Payload(payload))
	}
	if err != nil {
		panic(err) // the layers are all there: a mistake in this function
	}
	return buffer.Bytes()
}
