package kernel_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// second gives the pod another veth pair to the node, with addresses of its own:
//
//	web eth0 ── rw0 node
//	web net1 ── net1h node        10.99.0.2 ── 10.99.0.1
func second(t *testing.T, f *fixture) (pod, node netip.Addr) {
	t.Helper()
	pod, node = netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("10.99.0.1")
	netnstest.Do(t, f.node.Namespace, func() error {
		return f.web.WithFD(func(fd int) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "net1h"
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "net1", PeerNamespace: netlink.NsFd(fd)})
		})
	})
	netnstest.Do(t, f.node.Namespace, commands("ip addr add 10.99.0.1/24 dev net1h", "ip link set net1h up"))
	netnstest.Do(t, f.web.Namespace, commands("ip addr add 10.99.0.2/24 dev net1", "ip link set net1 up"))
	return pod, node
}

func TestEveryVethPairIsGuarded(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		pod, node := second(t, f)
		at := netip.AddrPortFrom(node, 7000)
		server := netnstest.Listen(t, f.node.Namespace, "tcp", at.String())
		older := dial(t, f.web.Namespace, at)
		peer := accept(t, server)
		f.enrol(t)
		assertCaptured(t, f)
		send(t, older, peer, "older than the capture")
		if got := addrPort(older.LocalAddr()).Addr(); got != pod {
			t.Fatalf("it went out from %v, not by net1", got)
		}
		// A captured connection whose mark goes takes the way out by net1, not far.
		app := dial(t, f.web.Namespace, at)
		accept(t, f.pod.Outbound())
		setMark(t, app, 0)
		before := f.counter(t, "guard", "dropped_payload")
		write(t, app, []byte(nonce))
		eventually(t, "the guard of net1 drops", func() bool { return f.counter(t, "guard", "dropped_payload") > before })

		conn, err := f.pod.DialDirect(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		send(t, conn, accept(t, server), "of the agent")
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestVethPairThatComesLaterIsGuarded(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		second(t, f)
		if mended, err := f.repair(); err != nil || !strings.Contains(mended, "guard") {
			t.Errorf("repaired %q: %v", mended, err)
		}
		assertCaptured(t, f)
		netnstest.Do(t, f.node.Namespace, commands("ip link del net1h"))
		assertCaptured(t, f)
		if err := f.pod.Unguard(); err != nil {
			t.Error(err)
		}
	})
}

func TestCheckFindsInterfacesWithoutGuard(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	netnstest.Do(t, f.web.Namespace, commands(
		"ip link add harmless type bridge", "ip link set harmless up",
		"ip link add one type veth peer two", "ip link set one up", "ip link set two up"))
	assertCaptured(t, f)
	netnstest.Do(t, f.node.Namespace, commands("ip link add foreign type vxlan id 5 dstport 4789"))
	netnstest.Do(t, f.node.Namespace, func() error {
		l, err := netlink.LinkByName("foreign")
		if err != nil {
			return err
		}
		return f.web.WithFD(func(fd int) error { return netlink.LinkSetNsFd(l, fd) })
	})
	netnstest.Do(t, f.web.Namespace, commands("ip link set foreign up"))
	for _, finding := range f.pod.Check(t.Context()) {
		if finding.OK == (finding.Check == "interfaces") {
			t.Errorf("check %s: %v %s", finding.Check, finding.OK, finding.Detail)
		}
		if finding.Check == "interfaces" && !strings.Contains(finding.Detail, "foreign (vxlan)") {
			t.Errorf("check interfaces: %s", finding.Detail)
		}
	}
}
