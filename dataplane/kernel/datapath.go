package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Datapath is the loaded data plane of one agent. Its methods are safe for concurrent use.
type Datapath struct {
	cfg     Config
	log     *slog.Logger
	root    *pinRoot
	dir     string // of the pins: root.dir
	host    *netns.Namespace
	locks   []*os.File // held while this agent lives
	ledger  ledger
	loaded  *loaded
	inbound InboundMode
	tc      TCMode
	noUDP   func() error // why the UDP of pods cannot be captured; probes when it is asked first
	kubelet kubelet

	mu      sync.Mutex
	closed  bool               // no pod may be opened any more
	yielded bool               // what is in force is another's
	freed   bool               // the descriptors are closed
	pods    map[string]*Pod    // open, or on their way, by UID
	records map[string]*record // of all pods in force, by UID

	// See direct.go.
	wantsDirect bool
	generation  uint64 // of allowances; 0 before the first

	peersMu sync.Mutex                                // held while the peers of UDP are changed
	peers   map[bpf.RacewayPeer]bpf.RacewayClearPorts // as the kernel has them; nil: ask it
}

// Open loads the data plane, or adopts what an earlier agent left in cfg.Dir. Pods that
// are in force stay so; see Adopted.
func Open(cfg Config) (*Datapath, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("kernel data plane: %w", err)
	}
	cfg = cfg.withDefaults()
	d := &Datapath{
		cfg:    cfg,
		log:    cfg.Log,
		ledger: ledger{dir: filepath.Join(cfg.StateDir, "pods")},
		pods:   make(map[string]*Pod),
	}
	if err := d.open(); err != nil {
		err = fmt.Errorf("open kernel data plane: %w", err)
		if d.loaded != nil {
			err = errors.Join(err, d.loaded.undo(d.records))
		}
		return nil, errors.Join(err, d.closeFDs())
	}
	return d, nil
}

func (d *Datapath) open() error {
	if err := os.MkdirAll(d.ledger.dir, 0o700); err != nil {
		return err
	}
	if err := d.lock(d.cfg.StateDir); err != nil {
		return err
	}
	var err error
	if d.host, err = netns.Open(d.cfg.HostNetNS); err != nil {
		return err
	}
	if d.records, err = d.ledger.load(); err != nil {
		return err
	}
	if d.root, err = openPinRoot(d.cfg.Dir, d.log); err != nil {
		return err
	}
	d.dir = d.root.dir
	// With another state directory the pins could still be another agent's.
	if err := d.lock(d.dir); err != nil {
		return err
	}
	if err := d.refuseUnknownPods(); err != nil {
		return err
	}
	if d.loaded, err = load(d.dir, d.cfg, d.records); err != nil {
		return err
	}
	if d.inbound, err = d.chooseInbound(); err != nil {
		return err
	}
	if d.tc, err = d.chooseTC(); err != nil {
		return err
	}
	d.noUDP = sync.OnceValue(d.probeUDP)
	return d.dropUnpinnedPods()
}

func (d *Datapath) lock(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(fmt.Errorf("lock %s: %w: %w", dir, ErrInUse, err), f.Close())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.locks = append(d.locks, f)
	return nil
}

// chooseInbound probes by loading: what the verifier accepts works.
func (d *Datapath) chooseInbound() (InboundMode, error) {
	if d.cfg.Inbound == InboundTC {
		return InboundTC, nil
	}
	prog, err := d.loaded.instance(progSteer, 0)
	if err == nil {
		return InboundSKLookup, prog.Close()
	}
	if d.cfg.Inbound == InboundSKLookup {
		return "", fmt.Errorf("inbound mode sk_lookup needs ingress_ifindex of Linux 5.17, use tc: %w", err)
	}
	d.log.Warn("SK_LOOKUP is not usable, redirecting with TC", "cause", err)
	return InboundTC, nil
}

func (d *Datapath) chooseTC() (TCMode, error) {
	if d.cfg.TC == TCClsact {
		return TCClsact, nil
	}
	prog, err := d.loaded.instance(progGuard, 0)
	if err != nil {
		return "", err
	}
	defer prog.Close()
	const noInterface = 1<<31 - 1
	l, err := link.AttachTCX(link.TCXOptions{Interface: noInterface, Program: prog, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return "", errors.Join(fmt.Errorf("tcx attached to interface %d, which cannot exist", noInterface), l.Close())
	case !errors.Is(err, link.ErrNotSupported):
		return TCX, nil
	case d.cfg.TC == TCX:
		return "", fmt.Errorf("tc mode tcx needs Linux 6.6, use clsact: %w", err)
	default:
		return TCClsact, nil
	}
}

// refuseUnknownPods fails when pods are in force that no record speaks of: the state
// directory is another one than before, or was lost. To let go of them would have them speak
// in clear, and nobody could undo their routing rules and sysctls any more.
func (d *Datapath) refuseUnknownPods() error {
	known := make(map[string]bool, len(d.records))
	for _, r := range d.records {
		known[cookieName(r.Cookie)] = true
	}
	dir := filepath.Join(d.dir, podsDir)
	pins, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	unknown := 0
	for _, e := range pins {
		if !known[e.Name()] {
			unknown++
		}
	}
	if unknown == 0 {
		return nil
	}
	return fmt.Errorf("%d pods are captured that state directory %s knows nothing of: start with the one that was used before; if it is lost, release them, to speak in clear, by removing %s",
		unknown, d.cfg.StateDir, dir)
}

// dropUnpinnedPods forgets pods of which nothing but their entry is left.
func (d *Datapath) dropUnpinnedPods() error {
	known := make(map[uint64]bool, len(d.records))
	for _, r := range d.records {
		known[r.Cookie] = true
	}
	var unknown []uint64
	var cookie uint64
	var value bpf.RacewayPod
	entries := d.loaded.maps.Pods.Iterate()
	for entries.Next(&cookie, &value) {
		if !known[cookie] {
			unknown = append(unknown, cookie)
		}
	}
	errs := []error{entries.Err()}
	for _, cookie := range unknown {
		errs = append(errs, ignoreMissing(d.loaded.maps.Pods.Delete(cookie)))
	}
	return errors.Join(append(errs, d.loaded.dropStrayHomes(known))...)
}

// InboundMode is the mode in use, never auto.
func (d *Datapath) InboundMode() InboundMode { return d.inbound }

// Adopted lists the pods in force that are not open: what an earlier agent left.
func (d *Datapath) Adopted() []AdoptedPod {
	d.mu.Lock()
	defer d.mu.Unlock()
	var adopted []AdoptedPod
	for _, uid := range slices.Sorted(maps.Keys(d.records)) {
		if r := d.records[uid]; d.pods[uid] == nil {
			adopted = append(adopted, AdoptedPod{UID: uid, NetNS: r.NetNS, Addrs: slices.Clone(r.Addrs), UDP: r.UDP})
		}
	}
	return adopted
}

// Counters returns all counters of all programs.
func (d *Datapath) Counters() ([]Counter, error) {
	enum, ok := d.loaded.spec.Maps[mapCounters].Key.(*btf.Enum)
	if !ok {
		return nil, errors.New("the counters map has no enum as its key")
	}
	counters := make([]Counter, 0, len(enum.Values))
	for _, v := range enum.Values {
		hook, reason, ok := strings.Cut(strings.ToLower(v.Name), "_")
		if !ok {
			continue // COUNTERS, the number of them
		}
		var perCPU []uint64
		if err := d.loaded.maps.Counters.Lookup(uint32(v.Value), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", v.Name, err)
		}
		c := Counter{Hook: hook, Reason: reason}
		for _, n := range perCPU {
			c.Value += n
		}
		counters = append(counters, c)
	}
	return counters, nil
}

// Close closes every descriptor, those of open pods included, and leaves all in force:
// captured connections are then refused until the next agent. It is idempotent.
func (d *Datapath) Close() error {
	d.mu.Lock()
	d.closed = true
	pods := slices.Collect(maps.Values(d.pods))
	d.mu.Unlock()
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.Close())
	}
	return errors.Join(append(errs, d.closeFDs())...)
}

func (d *Datapath) closeFDs() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.freed {
		return nil
	}
	d.freed = true
	var errs []error
	if d.loaded != nil {
		errs = append(errs, d.loaded.close())
	}
	if d.host != nil {
		errs = append(errs, d.host.Close())
	}
	if d.root != nil {
		errs = append(errs, d.root.close())
	}
	for _, l := range d.locks {
		errs = append(errs, l.Close())
	}
	d.locks = nil
	return errors.Join(errs...)
}

// Unload releases every pod, open or not, and removes all that Open made. The Datapath is
// closed afterwards.
func (d *Datapath) Unload() error {
	var errs []error
	d.mu.Lock()
	pods := slices.Collect(maps.Values(d.pods))
	yielded := d.yielded
	d.mu.Unlock()
	if yielded {
		return fmt.Errorf("unload: %w", ErrYielded)
	}
	for _, p := range pods {
		errs = append(errs, p.Remove())
	}
	for _, a := range d.Adopted() {
		errs = append(errs, d.RemoveAdopted(a.UID))
	}
	errs = append(errs, removeLayout(d.loaded.hooks), os.RemoveAll(d.dir), d.Close())
	if d.root.own != "" {
		errs = append(errs, outermost(d.log).removePinRoot(d.root.own))
	}
	if errors.Join(errs...) == nil {
		errs = append(errs, os.RemoveAll(d.cfg.StateDir))
	}
	return errors.Join(errs...)
}

// RemoveAdopted releases a pod that an earlier agent left in force and that is not wanted
// any more. Its network namespace may be gone.
func (d *Datapath) RemoveAdopted(uid string) error {
	d.mu.Lock()
	r := d.records[uid]
	open := d.pods[uid] != nil
	yielded := d.yielded
	d.mu.Unlock()
	switch {
	case yielded:
		return fmt.Errorf("remove adopted pod %s: %w", uid, ErrYielded)
	case open:
		return fmt.Errorf("remove adopted pod %s: it is open", uid)
	case r == nil:
		return fmt.Errorf("remove adopted pod %s: there is no such pod", uid)
	}
	ns, err := reopen(r)
	if err != nil {
		d.log.Info("releasing a pod whose network namespace is gone", "uid", uid, "cause", err)
	} else {
		defer ns.Close()
	}
	if err := d.release(r, ns); err != nil {
		return fmt.Errorf("remove adopted pod %s: %w", uid, err)
	}
	return nil
}

// reopen opens the namespace of a record, if the path still leads to the same one.
func reopen(r *record) (*netns.Namespace, error) {
	ns, err := netns.Open(r.NetNS)
	if err != nil {
		return nil, err
	}
	if ns.Cookie() != r.Cookie {
		return nil, errors.Join(fmt.Errorf("%s is another network namespace now", r.NetNS), ns.Close())
	}
	return ns, nil
}
