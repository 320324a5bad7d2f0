package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"github.com/raceway-mesh/raceway/e2e/space"
)

const maxNodes = 250

// plan is the address plan of one family. Every network has room for its number as the
// third byte (IPv4) or fourth group (IPv6).
type plan struct {
	pods     netip.Prefix // one podCIDR per node
	links    netip.Prefix // one network per link to the fabric
	services netip.Prefix
	network  int // bits of a podCIDR and of a link's network
}

// Nothing of this is visible outside the lab's namespaces, so all labs use the same.
var (
	plan4 = plan{
		pods:     netip.MustParsePrefix("10.244.0.0/16"),
		links:    netip.MustParsePrefix("172.30.0.0/16"),
		services: netip.MustParsePrefix("10.96.0.0/16"),
		network:  24,
	}
	plan6 = plan{
		pods:     netip.MustParsePrefix("fd00:10:244::/48"),
		links:    netip.MustParsePrefix("fd00:172:30::/48"),
		services: netip.MustParsePrefix("fd00:10:96::/112"),
		network:  64,
	}
)

// sub is the number-th network of p.
func (p plan) sub(of netip.Prefix, number int) netip.Prefix {
	if of.Addr().Is4() {
		b := of.Addr().As4()
		b[2] = byte(number)
		return netip.PrefixFrom(netip.AddrFrom4(b), p.network)
	}
	b := of.Addr().As16()
	b[6], b[7] = byte(number>>8), byte(number)
	return netip.PrefixFrom(netip.AddrFrom16(b), p.network)
}

// nth is the n-th address of network.
func nth(network netip.Prefix, n int) netip.Addr {
	if network.Addr().Is4() {
		b := network.Addr().As4()
		b[2] += byte(n >> 8)
		b[3] = byte(n)
		return netip.AddrFrom4(b)
	}
	b := network.Addr().As16()
	b[14], b[15] = byte(n>>8), byte(n)
	return netip.AddrFrom16(b)
}

// unspecified is the default route's destination.
func (p plan) unspecified() netip.Prefix {
	if p.pods.Addr().Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// Node is a Kubernetes node: a namespace that routes for its pods.
type Node struct {
	*Host
	Number   int
	PodCIDRs []netip.Prefix // in the order of the lab's families
	Zone     string
	Region   string

	nextPod  int
	nextLink int
}

func (l *Lab) makeNetwork(ctx context.Context) (err error) {
	if l.fabric, err = l.newHost("fabric"); err != nil {
		return err
	}
	if err := l.fabric.space.Sysctl(forwarding...); err != nil {
		return err
	}
	if l.control, err = l.newHost("control"); err != nil {
		return err
	}
	if err := l.joinFabric(l.control, 0); err != nil {
		return err
	}
	for i := 1; i <= l.opts.Nodes; i++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("make the nodes: %w", err)
		}
		if err := l.newNode(i); err != nil {
			return err
		}
	}
	return nil
}

// newHost makes an empty namespace and hands it to Close.
func (l *Lab) newHost(name string) (*Host, error) {
	s, err := space.New(l.opts.Name + "-" + name)
	if err != nil {
		return nil, err
	}
	if err := l.track(func() { l.spaces = append(l.spaces, s) }); err != nil {
		return nil, fmt.Errorf("%w, and so %s goes: %w", err, s.Name, s.Close())
	}
	h := &Host{Name: name, lab: l, space: s}
	return h, errors.Join(s.Sysctl(endpoint...), congestion(s, "cubic", "reno"))
}

// congestion sets the first choice that is permitted. A machine may default to BBR, whose
// pacing on every local hop hides what is measured; both choices here go without. Linux
// refuses one that net.ipv4.tcp_allowed_congestion_control lacks in any but the first
// namespace, whose list is not ours to change; reno is on it everywhere.
func congestion(s *space.Space, choices ...string) error {
	var err error
	for _, c := range choices {
		if err = s.Sysctl("net.ipv4.tcp_congestion_control", c); !errors.Is(err, os.ErrPermission) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return err
}

// endpoint are the sysctls of every namespace, set before it has a link.
var endpoint = []string{
	"net.ipv6.conf.default.accept_dad", "0",
	"net.ipv6.conf.default.accept_ra", "0",
}

// forwarding makes a router that trusts everybody: what stops a foreign source address in a
// test must be the data plane's guard and not the reverse path filter.
var forwarding = []string{
	"net.ipv4.ip_forward", "1",
	"net.ipv6.conf.all.forwarding", "1",
	"net.ipv4.conf.all.rp_filter", "0",
	"net.ipv4.conf.default.rp_filter", "0",
}

// joinFabric gives h its link to the fabric, addresses, and a route to everything there.
func (l *Lab) joinFabric(h *Host, number int) error {
	if err := l.fabric.space.Join(h.Name, h.space, "eth0"); err != nil {
		return err
	}
	for _, p := range l.opts.families() {
		network := p.sub(p.links, number)
		gateway, own := nth(network, 1), nth(network, 2)
		if err := l.fabric.space.AddAddr(h.Name, netip.PrefixFrom(gateway, p.network)); err != nil {
			return err
		}
		if err := h.space.AddAddr("eth0", netip.PrefixFrom(own, p.network)); err != nil {
			return err
		}
		if err := h.space.AddRoute("eth0", p.links, gateway); err != nil {
			return err
		}
		h.Addrs = append(h.Addrs, own)
	}
	return nil
}

func (l *Lab) newNode(number int) error {
	h, err := l.newHost("node" + strconv.Itoa(number))
	if err != nil {
		return err
	}
	n := &Node{Host: h, Number: number, Zone: "zone-" + strconv.Itoa(number), Region: "lab", nextPod: 2}
	if err := h.space.Sysctl(forwarding...); err != nil {
		return err
	}
	if err := l.joinFabric(h, number); err != nil {
		return err
	}
	for i, p := range l.opts.families() {
		cidr := p.sub(p.pods, number)
		n.PodCIDRs = append(n.PodCIDRs, cidr)
		if err := l.fabric.space.AddRoute(h.Name, cidr, h.Addrs[i]); err != nil {
			return err
		}
	}
	l.nodes = append(l.nodes, n)
	return l.routePods(n)
}

// routePods makes the pods of n and those of the earlier nodes and of control reach each other.
func (l *Lab) routePods(n *Node) error {
	for i, p := range l.opts.families() {
		if err := l.control.space.AddRoute("eth0", n.PodCIDRs[i], nth(p.sub(p.links, 0), 1)); err != nil {
			return err
		}
		for _, other := range l.nodes[:len(l.nodes)-1] {
			if err := n.space.AddRoute("eth0", other.PodCIDRs[i], nth(p.sub(p.links, n.Number), 1)); err != nil {
				return err
			}
			if err := other.space.AddRoute("eth0", n.PodCIDRs[i], nth(p.sub(p.links, other.Number), 1)); err != nil {
				return err
			}
		}
	}
	return nil
}

// plugPod does for h what a CNI plugin does for a pod, and returns the pod's addresses.
func (n *Node) plugPod(families []plan, h *Host) error {
	n.nextLink++
	hostEnd := "pod" + strconv.Itoa(n.nextLink)
	if err := n.space.Join(hostEnd, h.space, "eth0"); err != nil {
		return err
	}
	for i, p := range families {
		gateway, own := nth(n.PodCIDRs[i], 1), nth(n.PodCIDRs[i], n.nextPod)
		if !n.PodCIDRs[i].Contains(own) || (own.Is4() && own.As4()[3] == 255) {
			return fmt.Errorf("plug %s: no address left in %s", h.Name, n.PodCIDRs[i])
		}
		for _, step := range []func() error{
			func() error { return n.space.AddAddr(hostEnd, host(gateway)) },
			func() error { return n.space.AddRoute(hostEnd, host(own), netip.Addr{}) },
			func() error { return h.space.AddAddr("eth0", host(own)) },
			func() error { return h.space.AddRoute("eth0", host(gateway), netip.Addr{}) },
			func() error { return h.space.AddRoute("eth0", p.unspecified(), gateway) },
		} {
			if err := step(); err != nil {
				return err
			}
		}
		h.Addrs = append(h.Addrs, own)
	}
	h.hostEnd = hostEnd
	n.nextPod++
	return nil
}

// host is the prefix that holds a alone.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
