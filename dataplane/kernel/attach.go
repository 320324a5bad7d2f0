package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// The names of a pod's attachments: of its pins, and of the filters under clsact.
const (
	pinSteer     = "steer"
	pinIngress   = "ingress"
	pinIngressLo = "ingress_lo"
	pinGuard     = "guard"
)

// point is an interface's ingress, or egress, that a program of one pod is attached to.
type point struct {
	pin     string
	ns      *netns.Namespace
	ifindex int
	egress  bool
}

func (at point) tcx() ebpf.AttachType {
	if at.egress {
		return ebpf.AttachTCXEgress
	}
	return ebpf.AttachTCXIngress
}

// parent is the place under a clsact qdisc.
func (at point) parent() uint32 {
	if at.egress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func (d *Datapath) podDir(r *record) string {
	return filepath.Join(d.dir, podsDir, cookieName(r.Cookie))
}

// attachInbound makes new connections that arrive in the pod go to the listeners. What
// another mode of an earlier agent left there is taken away once ours is in force.
func (p *Pod) attachInbound() error {
	if err := os.MkdirAll(p.d.podDir(p.rec), 0o700); err != nil {
		return err
	}
	if p.d.inbound == InboundSKLookup {
		if err := p.attachSteer(); err != nil {
			return err
		}
		return p.d.detachIngress(p.rec, p.ns)
	}
	if err := p.attachIngress(); err != nil {
		return err
	}
	return removePin(filepath.Join(p.d.podDir(p.rec), pinSteer))
}

func (p *Pod) attachSteer() error {
	prog, err := p.d.loaded.instance(progSteer, p.rec.Cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	pin := filepath.Join(p.d.podDir(p.rec), pinSteer)
	_, err = replaceProgram(pin, prog)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
	default:
		return fmt.Errorf("update %s: %w", pin, err)
	}
	var l link.Link
	err = p.ns.WithFD(func(fd int) error {
		l, err = link.AttachNetNs(fd, prog)
		return err
	})
	if err != nil {
		return fmt.Errorf("attach SK_LOOKUP to %s: %w", p.ns.Path(), err)
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin %s: %w", pin, err)
	}
	return nil
}

func (p *Pod) attachIngress() error {
	prog, err := p.d.loaded.instance(progIngress, p.rec.Cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	var eth0 netlink.Link
	err = p.ns.Do(func() (err error) {
		eth0, err = podInterface(p.rec.Addrs)
		return err
	})
	if err != nil {
		return fmt.Errorf("find the pod's interface: %w", err)
	}
	p.rec.Ifindex = eth0.Attrs().Index
	if err := p.d.ledger.save(p.rec); err != nil {
		return err
	}
	for _, at := range ingressPoints(p.rec, p.ns) {
		if err := p.d.attachTC(p.rec, at, prog); err != nil {
			return fmt.Errorf("attach ingress to interface %d of %s: %w", at.ifindex, p.ns.Path(), err)
		}
	}
	return nil
}

func ingressPoints(r *record, ns *netns.Namespace) []point {
	return []point{{pin: pinIngress, ns: ns, ifindex: r.Ifindex}, {pin: pinIngressLo, ns: ns, ifindex: loopbackIfindex}}
}

func (d *Datapath) detachInbound(r *record, ns *netns.Namespace) error {
	return errors.Join(removePin(filepath.Join(d.podDir(r), pinSteer)), d.detachIngress(r, ns))
}

func (d *Datapath) detachIngress(r *record, ns *netns.Namespace) error {
	if r.Ifindex == 0 {
		return nil
	}
	var errs []error
	for _, at := range ingressPoints(r, ns) {
		errs = append(errs, d.detachTC(r, at))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	r.Ifindex = 0
	return nil
}

// attachTC attaches prog, or puts it in the place of the one that is attached.
func (d *Datapath) attachTC(r *record, at point, prog *ebpf.Program) error {
	if d.tc == TCX {
		if err := at.ns.Do(func() error { return d.attachTCX(r, at, prog) }); err != nil {
			return err
		}
		return d.detachClsact(r, at)
	}
	if err := d.attachClsact(r, at, prog); err != nil {
		return err
	}
	return removePin(filepath.Join(d.podDir(r), at.pin))
}

func (d *Datapath) detachTC(r *record, at point) error {
	return errors.Join(removePin(filepath.Join(d.podDir(r), at.pin)), d.detachClsact(r, at))
}

// attachTCX puts us before all others: what the guard drops nobody else should redirect.
func (d *Datapath) attachTCX(r *record, at point, prog *ebpf.Program) error {
	pin := filepath.Join(d.podDir(r), at.pin)
	if ifindex, err := tcxInterface(pin); err == nil && ifindex == at.ifindex {
		_, err := replaceProgram(pin, prog)
		return err
	}
	if err := removePin(pin); err != nil { // of an interface that is gone
		return err
	}
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: at.ifindex,
		Program:   prog,
		Attach:    at.tcx(),
		Anchor:    link.Head(),
	})
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Pin(pin)
}

// tcxInterface tells the interface that a pinned link is attached to; 0 once it is gone.
func tcxInterface(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	tcx := info.TCX()
	if tcx == nil {
		return 0, fmt.Errorf("%s is no tcx link", pin)
	}
	return int(tcx.Ifindex), nil
}

// filterPriority is the first in line.
const filterPriority = 1

func filterName(r *record, at point) string {
	return "raceway_" + at.pin + "_" + cookieName(r.Cookie)
}

// pinOf is the pin of the point whose filter f is, if it is one of r's.
func pinOf(r *record, f netlink.Filter) (pin string, ours bool) {
	b, ok := f.(*netlink.BpfFilter)
	if !ok {
		return "", false
	}
	rest, named := strings.CutPrefix(b.Name, "raceway_")
	pin, ours = strings.CutSuffix(rest, "_"+cookieName(r.Cookie))
	return pin, named && ours
}

func (d *Datapath) attachClsact(r *record, at point, prog *ebpf.Program) error {
	return at.ns.Do(func() error {
		l, err := netlink.LinkByIndex(at.ifindex)
		if err != nil {
			return err
		}
		if err := d.ensureClsact(r, at, l); err != nil {
			return err
		}
		filter, err := findFilter(r, at, l)
		if err != nil {
			return err
		}
		put := netlink.FilterReplace
		if filter == nil {
			filter, put = newFilter(r, at), netlink.FilterAdd
		}
		filter.Fd = prog.FD()
		if err := put(filter); err != nil {
			return fmt.Errorf("add filter %s: %w", filter.Name, err)
		}
		return nil
	})
}

// newFilter leaves the handle to the kernel, which then puts it before others of its priority.
func newFilter(r *record, at point) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: at.ifindex,
			Parent:    at.parent(),
			Protocol:  unix.ETH_P_ALL,
			Priority:  filterPriority,
		},
		Name:         filterName(r, at),
		DirectAction: true,
	}
}

func (d *Datapath) ensureClsact(r *record, at point, l netlink.Link) error {
	present, err := hasClsact(l)
	if err != nil || present {
		return err
	}
	r.Qdiscs = append(r.Qdiscs, at.pin)
	if err := d.ledger.save(r); err != nil {
		return err
	}
	if err := netlink.QdiscAdd(clsact(at.ifindex)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("add qdisc clsact: %w", err)
	}
	return nil
}

func clsact(ifindex int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

func hasClsact(l netlink.Link) (bool, error) {
	qdiscs, err := netlink.QdiscList(l)
	if err != nil {
		return false, fmt.Errorf("list qdiscs: %w", err)
	}
	return slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }), nil
}

// findFilter finds ours by its name; interface numbers are used again.
func findFilter(r *record, at point, l netlink.Link) (*netlink.BpfFilter, error) {
	if present, err := hasClsact(l); err != nil || !present {
		return nil, err
	}
	filters, err := netlink.FilterList(l, at.parent())
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == filterName(r, at) {
			return b, nil
		}
	}
	return nil, nil
}

func (d *Datapath) detachClsact(r *record, at point) error {
	if at.ns == nil { // gone, and the filter with it
		return nil
	}
	return at.ns.Do(func() error {
		l, err := netlink.LinkByIndex(at.ifindex)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		filter, err := findFilter(r, at, l)
		if err != nil || filter == nil {
			return err
		}
		if err := ignoreMissing(netlink.FilterDel(filter)); err != nil {
			return fmt.Errorf("delete filter %s: %w", filter.Name, err)
		}
		return removeClsact(r, at, l)
	})
}

// removeClsact takes the qdisc away if it came with us and nobody else uses it.
func removeClsact(r *record, at point, l netlink.Link) error {
	i := slices.Index(r.Qdiscs, at.pin)
	if i < 0 {
		return nil
	}
	var left []netlink.Filter
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netlink.FilterList(l, parent)
		if err != nil {
			return err
		}
		left = append(left, filters...)
	}
	for _, f := range left {
		if pin, ours := pinOf(r, f); ours { // the qdisc goes with the last of them
			r.Qdiscs[i] = pin
			return nil
		}
	}
	if len(left) > 0 {
		return nil
	}
	if err := ignoreMissing(netlink.QdiscDel(clsact(at.ifindex))); err != nil {
		return fmt.Errorf("delete qdisc clsact: %w", err)
	}
	r.Qdiscs = slices.Delete(r.Qdiscs, i, i+1)
	return nil
}

// removePin detaches the pinned link and removes the pin. The removal alone would detach it
// as well, but some time later: the kernel leaves that to a worker.
func removePin(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil && !errors.Is(err, link.ErrNotSupported) {
		return fmt.Errorf("detach %s: %w", path, err)
	}
	return os.Remove(path)
}
