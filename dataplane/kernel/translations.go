package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ForgetTranslations has the node's connection tracking forget closed TCP connections of addrs whose
// destination was translated, as kube-proxy does for services. The kernel remembers those for two
// minutes, and gives another source port to a connection whose answers could be taken for theirs
// (nf_nat_alloc_null_binding): one of a pod that went to a service in clear before its capture, and
// goes by the kernel now to the very endpoint, would arrive as one that nobody admitted. It returns
// how many there were, and fails where the kernel tracks nothing.
func (d *Datapath) ForgetTranslations(addrs []netip.Addr) (forgotten uint, err error) {
	filter := make(translated, len(addrs))
	for _, a := range addrs {
		filter[a.Unmap()] = true
	}
	err = d.host.Do(func() error {
		var errs []error
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter)
			forgotten += n
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return forgotten, fmt.Errorf("forget translated connections: %w", err)
	}
	return forgotten, nil
}

// translated matches closed connections of sources.
type translated map[netip.Addr]bool

// MatchConntrackFlow is netlink.CustomConntrackFilter's.
func (t translated) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
	return ok && (tcp.State == nl.TCP_CONNTRACK_TIME_WAIT || tcp.State == nl.TCP_CONNTRACK_CLOSE) && t[addrOf(f.Forward.SrcIP)] &&
		(addrOf(f.Forward.DstIP) != addrOf(f.Reverse.SrcIP) || f.Forward.DstPort != f.Reverse.SrcPort)
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip) // the zero one is nobody's
	return a.Unmap()
}
