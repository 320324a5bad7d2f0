package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// exit is a veth pair of the pod whose other end is in the host's namespace.
type exit struct {
	name         string
	inside, host int // interface numbers
	mtu          int
	addrs        []netip.Addr
}

// exits finds where packets of the pod come out in the host's namespace: first the veth
// pair of the pod's address, without which there is no capture, then others.
func (p *Pod) exits() ([]exit, error) {
	primary, links, err := p.interfaces()
	if err != nil {
		return nil, fmt.Errorf("find the pod's interface: %w", err)
	}
	if primary.Type() != "veth" || primary.Attrs().ParentIndex == 0 {
		return nil, fmt.Errorf("the pod's interface %s is a %s and not one end of a veth pair: this network plugin has no place for the guard", primary.Attrs().Name, primary.Type())
	}
	var exits []exit
	err = p.d.host.Do(func() error {
		id, err := p.netnsID()
		if err != nil {
			return err
		}
		if err := leadsTo(id, primary); err != nil {
			return fmt.Errorf("the peer of the pod's interface %s is not in the agent's network namespace %s (run the agent in the host's network): %w", primary.Attrs().Name, p.d.host.Path(), err)
		}
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().ParentIndex != 0 && leadsTo(id, l) == nil {
				a := l.Attrs()
				exits = append(exits, exit{name: a.Name, inside: a.Index, host: a.ParentIndex, mtu: a.MTU})
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(exits, func(x, y exit) int {
		return isIndex(y, primary) - isIndex(x, primary)
	})
	return exits, p.ns.Do(func() error { return addAddrs(exits) })
}

func isIndex(e exit, l netlink.Link) int {
	if e.inside == l.Attrs().Index {
		return 1
	}
	return 0
}

// interfaces lists the pod's, and finds the one that carries its address.
func (p *Pod) interfaces() (primary netlink.Link, links []netlink.Link, err error) {
	err = p.ns.Do(func() error {
		if primary, err = podInterface(p.rec.Addrs); err != nil {
			return err
		}
		if links, err = netlink.LinkList(); err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		return nil
	})
	return primary, links, err
}

// addAddrs runs in the pod's namespace.
func addAddrs(exits []exit) error {
	present, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range present {
		for i := range exits {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && a.LinkIndex == exits[i].inside {
				exits[i].addrs = append(exits[i].addrs, ip.Unmap())
			}
		}
	}
	return nil
}

// netnsID is the number by which the current namespace knows the pod's.
func (p *Pod) netnsID() (id int, err error) {
	err = p.ns.WithFD(func(fd int) error {
		id, err = netlink.GetNetNsIdByFd(fd)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the pod's namespace id: %w", err)
	}
	return id, nil
}

// leadsTo makes sure that the peer of inside, which is known by an interface number only, is
// in the current namespace and not in another that uses the same numbers.
func leadsTo(id int, inside netlink.Link) error {
	peer := inside.Attrs().ParentIndex
	host, err := netlink.LinkByIndex(peer)
	if err != nil {
		return err
	}
	attrs := host.Attrs()
	if host.Type() != "veth" || attrs.ParentIndex != inside.Attrs().Index {
		return fmt.Errorf("interface %d is the %s %s", peer, host.Type(), attrs.Name)
	}
	if attrs.NetNsID != id {
		return fmt.Errorf("%s leads to namespace %d, the pod is %d", attrs.Name, attrs.NetNsID, id)
	}
	return nil
}

// checkInterfaces finds ways out of the pod that pass no guard.
func (p *Pod) checkInterfaces() error {
	exits, err := p.exits()
	if err != nil {
		return err
	}
	_, links, err := p.interfaces()
	if err != nil {
		return err
	}
	var unguarded []string
	for _, l := range links {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_UP == 0 || staysInside(l) || slices.ContainsFunc(exits, func(e exit) bool { return e.inside == a.Index }) {
			continue
		}
		unguarded = append(unguarded, fmt.Sprintf("%s (%s)", a.Name, l.Type()))
	}
	if len(unguarded) > 0 {
		return errors.New("no veth pair to the host's network: " + strings.Join(unguarded, ", "))
	}
	return nil
}

// staysInside reports that what is sent to l stays in the pod's namespace, or leaves it by
// another of its interfaces. Veth pairs to namespaces other than the host's are such: those of
// containers inside the pod, whose way out leads back through it.
func staysInside(l netlink.Link) bool {
	a := l.Attrs()
	if a.Index == loopbackIfindex || a.ParentIndex != 0 && a.NetNsID < 0 {
		return true
	}
	return slices.Contains([]string{"veth", "dummy", "bridge", "tuntap", "ifb", "vrf", "nlmon"}, l.Type())
}
