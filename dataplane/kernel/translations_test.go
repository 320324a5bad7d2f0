package kernel_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// Only what is closed, translated and of the pods in question is forgotten.
func TestForgetTranslations(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	forFamilies(t, func(t *testing.T, fam family) {
		kind := netlink.InetFamily(unix.AF_INET6)
		service := netip.MustParseAddr("fd00:96::1")
		if fam.of(f.web).Is4() {
			kind, service = unix.AF_INET, netip.MustParseAddr("10.96.0.1")
		}
		// By source ports, which tell them apart below.
		entries := []struct {
			source  netip.Addr
			port    uint16
			via     netip.Addr
			state   uint8
			forgets bool
		}{
			{fam.of(f.web), 40001, service, nl.TCP_CONNTRACK_TIME_WAIT, true},
			{fam.of(f.web), 40002, service, nl.TCP_CONNTRACK_CLOSE, true},
			{fam.of(f.web), 40003, service, nl.TCP_CONNTRACK_ESTABLISHED, false},
			{fam.of(f.web), 40004, fam.of(f.db), nl.TCP_CONNTRACK_TIME_WAIT, false},
			{fam.of(f.db), 40005, service, nl.TCP_CONNTRACK_TIME_WAIT, false},
		}
		netnstest.Do(t, f.node.Namespace, func() error {
			for _, e := range entries {
				flow := &netlink.ConntrackFlow{
					FamilyType: uint8(kind), TimeOut: 100, ProtoInfo: &netlink.ProtoInfoTCP{State: e.state},
					Forward: netlink.IPTuple{SrcIP: e.source.AsSlice(), SrcPort: e.port, DstIP: e.via.AsSlice(), DstPort: 8080, Protocol: unix.IPPROTO_TCP},
					Reverse: netlink.IPTuple{SrcIP: fam.of(f.db).AsSlice(), SrcPort: 8080, DstIP: e.source.AsSlice(), DstPort: e.port, Protocol: unix.IPPROTO_TCP},
				}
				if err := netlink.ConntrackCreate(netlink.ConntrackTable, kind, flow); err != nil {
					return err
				}
			}
			return nil
		})
		n, err := f.dp.ForgetTranslations(f.web.Addrs())
		if err != nil || n != 2 {
			t.Errorf("forgot %d, %v; want 2", n, err)
		}
		left := make(map[uint16]bool)
		netnstest.Do(t, f.node.Namespace, func() error {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, kind)
			for _, flow := range flows {
				left[flow.Forward.SrcPort] = true
			}
			return err
		})
		for _, e := range entries {
			if left[e.port] == e.forgets {
				t.Errorf("port %d is there: %v, want %v", e.port, left[e.port], !e.forgets)
			}
		}
	})
}
