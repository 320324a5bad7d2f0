package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

const loopbackIfindex = 1 // in every network namespace

// sysctlAcceptLocal lets datagrams that divert sends to lo come in there from the pod's own
// address; IPv6 needs no leave.
const sysctlAcceptLocal = "net/ipv4/conf/lo/accept_local"

// sysctls are needed for DialApp and Datagrams: its replies find their way back only if the accepted
// socket inherits the mark of its SYN (tcp_fwmark_accept) and if resets, which come from
// no socket, carry the mark of what they answer (fwmark_reflect).
func sysctls(r *record) []string {
	names := []string{"net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect"}
	if _, ok := firstOf(r.Addrs, unix.AF_INET6); ok {
		names = append(names, "net/ipv6/fwmark_reflect")
	}
	if r.UDP {
		names = append(names, sysctlAcceptLocal)
	}
	return names
}

func sysctlPath(name string) string { return filepath.Join("/proc/sys", name) }

func readSysctl(name string) (string, error) {
	data, err := os.ReadFile(sysctlPath(name))
	return strings.TrimSpace(string(data)), err
}

// firstOf returns the first address of a family, which is what the pod's unbound sockets
// get as their source.
func firstOf(addrs []netip.Addr, family int) (netip.Addr, bool) {
	for _, a := range addrs {
		if familyOf(a) == family {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func rule(family int) *netlink.Rule {
	mask := uint32(markMask)
	r := netlink.NewRule()
	r.Family = family
	r.Priority = rulePriority
	r.Table = routeTable
	r.Mark = markRedirect
	r.Mask = &mask
	return r
}

// route delivers everything locally. Its source is the pod's address: without one, a
// socket that is not bound would take the destination's.
func route(family int, src netip.Addr) *netlink.Route {
	bits := 32
	if family == unix.AF_INET6 {
		bits = 128
	}
	r := &netlink.Route{
		LinkIndex: loopbackIfindex,
		Table:     routeTable,
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.SCOPE_HOST,
		Dst:       &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
	}
	if src.IsValid() {
		r.Src = src.AsSlice()
	}
	return r
}

// setUpRouting notes the previous sysctls in the record before it changes any.
func (p *Pod) setUpRouting() error {
	return p.ns.Do(func() error {
		if p.rec.Sysctls == nil {
			p.rec.Sysctls = make(map[string]string)
		}
		for _, name := range sysctls(p.rec) {
			if _, known := p.rec.Sysctls[name]; known {
				continue
			}
			value, err := readSysctl(name)
			if err != nil {
				return fmt.Errorf("read sysctl %s: %w", name, err)
			}
			p.rec.Sysctls[name] = value
		}
		if err := p.d.ledger.save(p.rec); err != nil {
			return err
		}
		for _, name := range sysctls(p.rec) {
			if err := writeSysctl(name, "1"); err != nil {
				return fmt.Errorf("set sysctl %s: %w", name, err)
			}
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			if err := addRouting(family, p.rec.Addrs); err != nil {
				return err
			}
		}
		return nil
	})
}

func addRouting(family int, addrs []netip.Addr) error {
	src, ok := firstOf(addrs, family)
	if !ok {
		return nil
	}
	if err := netlink.RouteReplace(route(family, src)); err != nil {
		return fmt.Errorf("add route local default dev lo table %d src %v: %w", routeTable, src, err)
	}
	if err := netlink.RuleAdd(rule(family)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("add rule fwmark %#x/%#x lookup %d: %w", markRedirect, uint32(markMask), routeTable, err)
	}
	return nil
}

func tearDownRouting(r *record, ns *netns.Namespace) error {
	return ns.Do(func() error {
		var errs []error
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			if _, ok := firstOf(r.Addrs, family); !ok {
				continue
			}
			if err := ignoreMissing(netlink.RuleDel(rule(family))); err != nil {
				errs = append(errs, fmt.Errorf("delete rule lookup %d: %w", routeTable, err))
			}
			if err := ignoreMissing(netlink.RouteDel(route(family, netip.Addr{}))); err != nil {
				errs = append(errs, fmt.Errorf("delete route table %d: %w", routeTable, err))
			}
		}
		for name, value := range r.Sysctls {
			if err := writeSysctl(name, value); err != nil {
				errs = append(errs, fmt.Errorf("restore sysctl %s: %w", name, err))
			}
		}
		return errors.Join(errs...)
	})
}

// restoreSysctl puts one back before the others, for what needs it alone.
func restoreSysctl(r *record, ns *netns.Namespace, name string) error {
	value, ok := r.Sysctls[name]
	if !ok {
		return nil
	}
	if err := ns.Do(func() error { return writeSysctl(name, value) }); err != nil {
		return fmt.Errorf("restore sysctl %s: %w", name, err)
	}
	delete(r.Sysctls, name)
	return nil
}

// ignoreMissing drops the errors that say that what was to be removed is not there.
func ignoreMissing(err error) error {
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return err
}

// podInterface finds the interface that carries the pod's address, in the current
// namespace; or else the one of the default route, for pods with their address on lo.
func podInterface(addrs []netip.Addr) (netlink.Link, error) {
	for _, want := range addrs {
		family := netlink.FAMILY_V4
		if want.Is6() {
			family = netlink.FAMILY_V6
		}
		present, err := netlink.AddrList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		for _, a := range present {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == want && a.LinkIndex != loopbackIfindex {
				return netlink.LinkByIndex(a.LinkIndex)
			}
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			return netlink.LinkByIndex(r.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no interface of the pod has %v, and it has no default route: is its network set up?", addrs)
}
