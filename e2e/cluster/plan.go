package cluster

import (
	"net/netip"
	"strconv"
)

// IPFamilies are those of nodes, pods and services.
type IPFamilies int

// The first family of dual stack is IPv4.
const (
	IPv4 IPFamilies = iota
	IPv6
	DualStack
)

func (f IPFamilies) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	case DualStack:
		return "dual stack"
	}
	return "IPFamilies(" + strconv.Itoa(int(f)) + ")"
}

// plan is the address plan of one family.
type plan struct {
	nodes    netip.Prefix
	pods     netip.Prefix // a network for each node, its number in the third byte or fourth group
	podBits  int
	services netip.Prefix
	dns      netip.Addr // of the services
}

var (
	plan4 = plan{
		nodes:    netip.MustParsePrefix("172.30.0.0/24"),
		pods:     netip.MustParsePrefix("10.244.0.0/16"),
		podBits:  24,
		services: netip.MustParsePrefix("10.96.0.0/16"),
		dns:      netip.MustParseAddr("10.96.0.10"),
	}
	plan6 = plan{
		nodes:    netip.MustParsePrefix("fd00:172:30::/64"),
		pods:     netip.MustParsePrefix("fd00:10:244::/48"),
		podBits:  64,
		services: netip.MustParsePrefix("fd00:10:96::/112"),
		dns:      netip.MustParseAddr("fd00:10:96::a"),
	}
)

func (f IPFamilies) plans() []plan {
	switch f {
	case IPv6:
		return []plan{plan6}
	case DualStack:
		return []plan{plan4, plan6}
	default:
		return []plan{plan4}
	}
}

// host is the address of the control plane (0) or of a node.
func (p plan) host(number int) netip.Addr {
	n := 1
	if number > 0 {
		n = 10 + number
	}
	if p.nodes.Addr().Is4() {
		b := p.nodes.Addr().As4()
		b[3] = byte(n)
		return netip.AddrFrom4(b)
	}
	b := p.nodes.Addr().As16()
	b[15] = byte(n)
	return netip.AddrFrom16(b)
}

// podCIDR is a node's.
func (p plan) podCIDR(number int) netip.Prefix {
	if p.pods.Addr().Is4() {
		b := p.pods.Addr().As4()
		b[2] = byte(number)
		return netip.PrefixFrom(netip.AddrFrom4(b), p.podBits)
	}
	b := p.pods.Addr().As16()
	b[7] = byte(number)
	return netip.PrefixFrom(netip.AddrFrom16(b), p.podBits)
}

// apiService is the first address of the services: that of the API server.
func (p plan) apiService() netip.Addr { return p.services.Addr().Next() }
