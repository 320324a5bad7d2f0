package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
)

// bpfQueryEffective asks for the programs that run, inherited ones included (BPF_F_QUERY_EFFECTIVE).
const bpfQueryEffective = 1

// What Check advises where Repair mends.
const (
	putBack  = "the agent puts it back within seconds, look at its log if it stays so"
	detached = "something detached it; " + putBack
)

// Check looks at everything that capture of the pod rests on, in the kernel and not in our
// own books. A pod that is prepared but not captured fails the checks of what is not on.
func (p *Pod) Check(ctx context.Context) []Finding {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return []Finding{{Check: "open", Detail: "the agent has closed this pod"}}
	}
	var findings []Finding
	for _, c := range []struct {
		name   string
		look   func() error
		remedy string
	}{
		{"pins", p.d.checkPins, "the next agent cannot take over what runs; " + putBack},
		{"connect hooks", p.d.checkHooks, detached},
		{"kubelet", p.d.checkKubelet, "its probes count as plaintext: they fail where STRICT or a policy forbids that, and while the agent is away"},
		{"same node", p.d.checkDirect, "connections to pods of this node go through tunnels"},
		{"outbound capture", func() error { return p.checkFlag(bpf.RacewayPodFlagPOD_OUTBOUND) }, "the pod is being enrolled or released"},
		{"inbound capture", func() error { return p.checkFlag(bpf.RacewayPodFlagPOD_INBOUND) }, "the pod is being enrolled or released"},
		{"steering", p.checkInbound, detached},
		{"listeners", p.checkListeners, putBack},
		{"routing", p.checkRouting, "something in the pod deleted it; " + putBack},
		{"sysctls", p.checkSysctls, "something in the pod changed them; " + putBack},
		{"udp", p.checkUDP, detached},
		{"guard", p.checkGuard, "plaintext that escapes capture is not stopped; " + putBack},
		{"interfaces", p.checkInterfaces, "what is sent there in clear is not stopped: capture expects veth pairs"},
		{"guard's view", p.checkOffloads, "the guard cannot see whose packets they are and drops all: turn GRO and XDP off there"},
	} {
		if err := ctx.Err(); err != nil {
			return append(findings, Finding{Check: c.name, Detail: "not looked at: " + err.Error()})
		}
		f := Finding{Check: c.name, OK: true}
		if err := c.look(); err != nil {
			f.OK = false
			f.Detail = err.Error() + "; " + c.remedy
		}
		findings = append(findings, f)
	}
	return findings
}

func (d *Datapath) checkHooks() error { return d.checkHooksOf(connectHooks()) }

func (d *Datapath) checkHooksOf(hooks []hook) error {
	root, release, err := CgroupRoot(d.cfg.CgroupRoot)
	if err != nil {
		return err
	}
	defer func() { _ = release() }() // a descriptor that was only read from
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // likewise
	for _, h := range hooks {
		want, err := programOf(filepath.Join(d.loaded.hooks, h.name))
		if err != nil {
			return err
		}
		if err := isAttached(int(dir.Fd()), h.attach, bpfQueryEffective, want); err != nil {
			return fmt.Errorf("%s on %s: %w", h.name, root, err)
		}
	}
	return nil
}

func programOf(pin string) (ebpf.ProgramID, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return 0, fmt.Errorf("link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("link %s: %w", pin, err)
	}
	return info.Program, nil
}

func isAttached(target int, attach ebpf.AttachType, flags uint32, want ebpf.ProgramID) error {
	result, err := link.QueryPrograms(link.QueryOptions{Target: target, Attach: attach, QueryFlags: flags})
	if err != nil {
		return fmt.Errorf("query programs: %w", err)
	}
	if !slices.ContainsFunc(result.Programs, func(a link.AttachedProgram) bool { return a.ID == want }) {
		return fmt.Errorf("program %d is not among the %d that run", want, len(result.Programs))
	}
	return nil
}

func (p *Pod) checkFlag(flag bpf.RacewayPodFlag) error {
	var v bpf.RacewayPod
	if err := p.d.loaded.maps.Pods.Lookup(p.rec.Cookie, &v); err != nil {
		return fmt.Errorf("the pod is not in the map: %w", err)
	}
	if v.Flags&flag == 0 {
		return errors.New("off")
	}
	return nil
}

func (p *Pod) checkInbound() error {
	if p.d.inbound == InboundSKLookup {
		want, err := programOf(filepath.Join(p.d.podDir(p.rec), pinSteer))
		if err != nil {
			return err
		}
		return p.ns.WithFD(func(fd int) error { return isAttached(fd, ebpf.AttachSkLookup, 0, want) })
	}
	for _, at := range ingressPoints(p.rec, p.ns) {
		if err := p.checkTC(at); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pod) checkTC(at point) error {
	return at.ns.Do(func() error {
		l, err := netlink.LinkByIndex(at.ifindex)
		if err != nil {
			return fmt.Errorf("interface %d: %w", at.ifindex, err)
		}
		if p.d.tc == TCX {
			want, err := programOf(filepath.Join(p.d.podDir(p.rec), at.pin))
			if err != nil {
				return err
			}
			return isAttached(at.ifindex, at.tcx(), 0, want)
		}
		filter, err := findFilter(p.rec, at, l)
		if err == nil && filter == nil {
			err = fmt.Errorf("no filter %s on interface %s", filterName(p.rec, at), l.Attrs().Name)
		}
		return err
	})
}

func (p *Pod) checkGuard() error {
	if p.d.cfg.DisableGuard {
		return errors.New("switched off by configuration")
	}
	if p.rec.HostIfindex == 0 {
		return errors.New("not attached")
	}
	exits, err := p.exits()
	if err != nil {
		return err
	}
	points := p.d.guardPoints(p.rec)
	for _, e := range exits {
		i := slices.IndexFunc(points, func(at point) bool { return at.ifindex == e.host })
		if i < 0 {
			return fmt.Errorf("not attached to interface %d, the host's end of %s", e.host, e.name)
		}
		if err := p.checkTC(points[i]); err != nil {
			return err
		}
	}
	return nil
}

// checkOffloads: GRO and XDP on a veth make the kernel forget the socket of a packet
// (skb_prepare_for_gro orphans it), and the guard goes by the socket.
func (p *Pod) checkOffloads() error {
	return p.d.host.Do(func() error {
		for _, at := range p.d.guardPoints(p.rec) {
			if err := checkOffloadsOf(at.ifindex); err != nil {
				return err
			}
		}
		return nil
	})
}

func checkOffloadsOf(ifindex int) error {
	l, err := netlink.LinkByIndex(ifindex)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil // the check of the guard judges that
	}
	if err != nil {
		return err
	}
	attrs := l.Attrs()
	if attrs.Xdp != nil && attrs.Xdp.Attached {
		return fmt.Errorf("an XDP program is attached to %s", attrs.Name)
	}
	gro, err := groEnabled(attrs.Name)
	if err == nil && gro {
		err = fmt.Errorf("GRO is on at %s (ethtool -K %s gro off)", attrs.Name, attrs.Name)
	}
	return err
}

func (p *Pod) checkListeners() error {
	for _, l := range p.listeners() {
		cookie, err := socketCookie(l)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		var registered uint64
		key := bpf.RacewayListenerKey{Netns: p.rec.Cookie, Kind: l.kind}
		if err := p.d.loaded.maps.Listeners.Lookup(key, &registered); err != nil {
			return fmt.Errorf("%s: not registered: %w", l.name, err)
		}
		if registered != cookie {
			return fmt.Errorf("%s: another socket is registered in its place", l.name)
		}
	}
	return nil
}

func socketCookie(s syscall.Conn) (cookie uint64, err error) {
	err = withFD(s, func(fd int) (err error) {
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		return err
	})
	return cookie, err
}

func (p *Pod) checkRouting() error {
	return p.ns.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			src, ok := firstOf(p.rec.Addrs, family)
			if !ok {
				continue
			}
			if err := checkFamily(family, src); err != nil {
				return err
			}
		}
		return nil
	})
}

func checkFamily(family int, src netip.Addr) error {
	rules, err := netlink.RuleListFiltered(family, rule(family), netlink.RT_FILTER_TABLE|netlink.RT_FILTER_MARK|netlink.RT_FILTER_MASK)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	if len(rules) == 0 {
		return fmt.Errorf("no rule fwmark %#x/%#x lookup %d", markRedirect, uint32(markMask), routeTable)
	}
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		got, ok := netip.AddrFromSlice(r.Src)
		return ok && got.Unmap() == src && r.Type == unix.RTN_LOCAL && r.LinkIndex == loopbackIfindex
	}) {
		return fmt.Errorf("no route local default dev lo table %d src %v", routeTable, src)
	}
	return nil
}

func (p *Pod) checkSysctls() error {
	return p.ns.Do(func() error {
		for _, name := range sysctls(p.rec) {
			value, err := readSysctl(name)
			if err != nil {
				return err
			}
			if value != "1" {
				return fmt.Errorf("%s is %s, not 1", name, value)
			}
		}
		return nil
	})
}
