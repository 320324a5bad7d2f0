package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Remove takes away everything that an agent left in force with cfg, and says what it was. It
// needs no agent and loads no program, so it also works where an agent cannot start: with a
// data plane of another version, with pins that no record speaks of, with records of
// namespaces that are gone. Where there is nothing it does nothing.
//
// Pods speak in clear then. It refuses while an agent runs.
func Remove(cfg Config) (removed []string, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("remove the data plane: %w", err)
	}
	cfg = cfg.withDefaults()
	r := remover{d: &Datapath{cfg: cfg, log: cfg.Log, ledger: ledger{dir: filepath.Join(cfg.StateDir, "pods")}}}
	err = errors.Join(r.run(), r.d.closeFDs())
	if err != nil {
		err = fmt.Errorf("remove the data plane: %w", err)
	}
	return r.removed, err
}

// remover is one Remove.
type remover struct {
	d       *Datapath // without programs and maps
	removed []string
}

func (r *remover) note(format string, args ...any) {
	r.removed = append(r.removed, fmt.Sprintf(format, args...))
}

func (r *remover) run() (err error) {
	d := r.d
	if _, err := os.Stat(d.cfg.StateDir); err == nil {
		if err := d.lock(d.cfg.StateDir); err != nil {
			return err
		}
	}
	if d.host, err = netns.Open(d.cfg.HostNetNS); err != nil {
		return err
	}
	if d.root, err = openPinRoot(d.cfg.Dir, d.log); err != nil {
		return err
	}
	d.dir = d.root.dir
	if err := d.lock(d.dir); err != nil {
		return err
	}
	err = r.pods()
	err = errors.Join(err, r.pins())
	if d.root.own != "" {
		err = errors.Join(err, outermost(d.log).removePinRoot(d.root.own))
	}
	if err != nil {
		return err // the records are needed to try again
	}
	return r.state()
}

// pods releases every pod of which a record or a pin is left.
func (r *remover) pods() error {
	records, err := r.records()
	if err != nil {
		return err
	}
	spaces, err := namespaces(records)
	defer func() {
		for _, ns := range spaces {
			_ = ns.Close()
		}
	}()
	errs := []error{err}
	for _, cookie := range slices.Sorted(maps.Keys(records)) {
		rec, ns := records[cookie], spaces[cookie]
		if err := r.pod(rec, ns); err != nil {
			errs = append(errs, fmt.Errorf("pod %s: %w", rec.UID, err))
			continue
		}
		where := "its network namespace is gone"
		if ns != nil {
			where = "in " + ns.Path()
		}
		r.note("capture of pod %s, %s", rec.UID, where)
	}
	return errors.Join(errs...)
}

// pod undoes what is in force for one; ns is nil when it is gone.
func (r *remover) pod(rec *record, ns *netns.Namespace) error {
	d := r.d
	errs := []error{d.detachGuard(rec), d.detachInbound(rec, ns), r.strayFilters(rec, d.host), removePins(d.podDir(rec))}
	if ns != nil {
		errs = append(errs, r.strayFilters(rec, ns), tearDownRouting(rec, ns))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return d.ledger.forget(rec)
}

// records are those that were written, and for pins without one what can be told of the pod:
// its sysctls then get the values that namespaces are born with.
func (r *remover) records() (map[uint64]*record, error) {
	known := make(map[uint64]*record)
	paths, err := filepath.Glob(filepath.Join(r.d.ledger.dir, "*.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		cookie, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(path), ".json"), 10, 64)
		if err != nil {
			continue
		}
		rec, err := readRecord(path)
		if err != nil || rec.Cookie != cookie {
			r.d.log.Warn("a pod's record cannot be read", "record", path, "error", err)
			rec = unknownPod(cookie)
		}
		known[cookie] = rec
	}
	pins, err := os.ReadDir(filepath.Join(r.d.dir, podsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, pin := range pins {
		if cookie, err := strconv.ParseUint(pin.Name(), 10, 64); err == nil && known[cookie] == nil {
			known[cookie] = unknownPod(cookie)
		}
	}
	return known, nil
}

func unknownPod(cookie uint64) *record {
	addrs := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	r := &record{UID: "unknown (" + cookieName(cookie) + ")", Cookie: cookie, Addrs: addrs, UDP: true, Sysctls: make(map[string]string)}
	for _, name := range sysctls(r) {
		r.Sysctls[name] = "0"
	}
	return r
}

// namespaces finds those of records that exist, by their cookies: the path in a record may
// lead nowhere, as that by a process which ended. The caller closes them.
func namespaces(records map[uint64]*record) (map[uint64]*netns.Namespace, error) {
	found := make(map[uint64]*netns.Namespace)
	take := func(path string) {
		ns, err := netns.Open(path)
		if err != nil {
			return // it ended meanwhile, or never was one
		}
		if records[ns.Cookie()] == nil || found[ns.Cookie()] != nil {
			_ = ns.Close()
			return
		}
		found[ns.Cookie()] = ns
	}
	for _, r := range records {
		if r.NetNS != "" {
			take(r.NetNS)
		}
	}
	for _, pattern := range []string{"/run/netns/*", "/proc/[0-9]*/ns/net"} {
		if len(found) == len(records) {
			break
		}
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return found, err
		}
		for _, path := range paths {
			take(path)
		}
	}
	return found, nil
}

// strayFilters removes filters of the pod from interfaces that its record does not name, and
// a qdisc that they leave empty.
func (r *remover) strayFilters(rec *record, ns *netns.Namespace) error {
	return ns.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		var errs []error
		for _, l := range links {
			errs = append(errs, r.strayFiltersOf(rec, l))
		}
		return errors.Join(errs...)
	})
}

func (r *remover) strayFiltersOf(rec *record, l netlink.Link) error {
	if present, err := hasClsact(l); err != nil || !present {
		return err
	}
	var errs []error
	for _, egress := range []bool{false, true} {
		errs = append(errs, r.strayFiltersAt(rec, l, point{ifindex: l.Attrs().Index, egress: egress}))
	}
	return errors.Join(errs...)
}

func (r *remover) strayFiltersAt(rec *record, l netlink.Link, at point) error {
	filters, err := netlink.FilterList(l, at.parent())
	if err != nil {
		return fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
	}
	var errs []error
	for _, f := range filters {
		var ours bool
		if at.pin, ours = pinOf(rec, f); !ours {
			continue
		}
		if err := ignoreMissing(netlink.FilterDel(f)); err != nil {
			errs = append(errs, fmt.Errorf("delete filter %s of %s: %w", filterName(rec, at), l.Attrs().Name, err))
			continue
		}
		r.note("filter %s of interface %s", filterName(rec, at), l.Attrs().Name)
		errs = append(errs, removeClsact(&record{Qdiscs: []string{at.pin}}, at, l)) // as if it came with us
	}
	return errors.Join(errs...)
}

// pins removes hooks and maps of every layout.
func (r *remover) pins() error {
	entries, err := os.ReadDir(r.d.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(r.d.dir, e.Name())
		switch {
		case e.Name() == newDir || strings.HasPrefix(e.Name(), layoutPrefix):
			if err := removeLayout(dir); err != nil {
				errs = append(errs, err)
				continue
			}
			r.note("programs and maps in %s", filepath.Join(r.d.cfg.Dir, e.Name()))
		case e.Name() == podsDir:
			errs = append(errs, os.Remove(dir)) // empty, or a pod is left
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(r.d.dir)
}

// state removes the directory of the records.
func (r *remover) state() error {
	if _, err := os.Stat(r.d.cfg.StateDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.RemoveAll(r.d.cfg.StateDir); err != nil {
		return err
	}
	r.note("state in %s", r.d.cfg.StateDir)
	return nil
}

// removePins detaches every link that is pinned in dir, whatever its name.
func removePins(dir string) error {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, pin := range pins {
		errs = append(errs, removePin(filepath.Join(dir, pin.Name())))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
