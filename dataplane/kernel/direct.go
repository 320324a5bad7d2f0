package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"

	"github.com/raceway-mesh/raceway/bpf"
)

// Connections between captured pods of this node that the agent allows go by the kernel alone
// (bpf/include/direct.h):
//
//	agent: Revoke ── Allow(pod, destination) ──► connect() of the pod ── Events ──► agent
//	                                                     └── Cut, when policy changes
//
// What is not allowed, or not any more, goes through the agent's listener as ever.

// The programs that this path has beside those of capture.
const (
	progListDirect = "list_direct"
	progPeername4  = "getpeername4"
	progPeername6  = "getpeername6"
)

// MaxLocal is how many endpoints of this node an Allowance can name.
const MaxLocal = len(bpf.RacewayAllowance{}.Endpoints)

// Endpoint is a captured pod of this node and where it is reached.
type Endpoint struct {
	UID string
	At  netip.AddrPort
}

// Allowance is what a pod's connections to a destination may do.
type Allowance struct {
	// Generation is that of the Revoke since which the verdict was made.
	Generation uint64
	// Total is how many equal endpoints the destination has; those that are not in Local are
	// the agent's.
	Total int
	// Local are those that may be reached by the kernel, at most MaxLocal.
	Local []Endpoint
}

func directHooks() []hook {
	return []hook{
		trackHook(),
		{progPeername4, ebpf.AttachCgroupInet4GetPeername},
		{progPeername6, ebpf.AttachCgroupInet6GetPeername},
	}
}

// directSupport is nil, or which of its parts this kernel does not have. Whether the programs
// load is seen when they are loaded.
func directSupport() error {
	for _, need := range []struct {
		program ebpf.ProgramType
		helper  asm.BuiltinFunc
	}{
		{ebpf.CGroupSockAddr, asm.FnSkStorageGet},
		{ebpf.CGroupSockAddr, asm.FnSkStorageDelete},
		{ebpf.CGroupSockAddr, asm.FnSkcToTcpSock},
		{ebpf.SockOps, asm.FnSkStorageGet},
		{ebpf.SockOps, asm.FnSkcToTcpSock},
		{ebpf.SockOps, asm.FnRingbufReserve},
	} {
		if err := features.HaveProgramHelper(need.program, need.helper); err != nil {
			return fmt.Errorf("%v for %v programs: %w", need.helper, need.program, err)
		}
	}
	return canDestroy()
}

func (l *loaded) buildDirect() error {
	l.peername = make(map[string]*ebpf.Program)
	for _, name := range []string{progPeername4, progPeername6} {
		prog, err := l.program(l.spec.Programs[name].Copy())
		if err != nil {
			return err
		}
		l.peername[name] = prog
	}
	prog, err := l.program(l.spec.Programs[progListDirect].Copy())
	if err != nil {
		return err
	}
	defer prog.Close()
	if l.listDirect, err = link.AttachIter(link.IterOptions{Program: prog, Map: l.maps.Clients}); err != nil {
		return fmt.Errorf("attach iter/bpf_sk_storage_map: %w", err)
	}
	return nil
}

// attachOptional attaches the hooks that capture does not rest on, or puts this agent's
// programs behind their links. Without them the node is served all the same.
func (l *loaded) attachOptional(dir string, cfg Config) {
	if l.noProbes != nil {
		cfg.Log.Warn("this kernel does not tell the kubelet from others: its probes count as plaintext", "cause", l.noProbes)
	}
	if l.noDirect != nil {
		cfg.Log.Warn("this kernel does not do its part for pods of one node: they talk through tunnels", "cause", l.noDirect)
	}
	if l.track == nil {
		return
	}
	if _, err := l.renewHookAt(trackHook(), filepath.Join(dir, progTrack), cfg); err != nil {
		cfg.Log.Error("the kubelet's probes count as plaintext, and pods of this node talk through tunnels", "error", err)
		l.noDirect = err
	}
	if l.noDirect != nil {
		return
	}
	for _, h := range directHooks()[1:] {
		if _, err := l.renewHookAt(h, filepath.Join(dir, h.name), cfg); err != nil {
			cfg.Log.Error("pods of this node talk through tunnels", "error", err)
			l.noDirect = err
		}
	}
}

// Direct is nil when pods of this node can talk by the kernel alone, or why they cannot.
func (d *Datapath) Direct() error { return d.loaded.noDirect }

// Revoke takes back all that was allowed: connections made from now on go through the agent.
// What is allowed by the verdicts of today needs the number that it returns.
func (d *Datapath) Revoke() (generation uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wantsDirect = true
	if err := d.leads(); err != nil {
		return 0, err
	}
	// By the clock, so that no number of an earlier agent comes again.
	d.generation = max(d.generation+1, uint64(monotonic()))
	if err := d.loaded.maps.Generation.Put(uint32(0), d.generation); err != nil {
		return 0, fmt.Errorf("revoke what was allowed by the kernel: %w", err)
	}
	return d.generation, nil
}

// leads says why nothing can be allowed or revoked from here, if so.
func (d *Datapath) leads() error {
	switch {
	case d.loaded.noDirect != nil:
		return d.loaded.noDirect
	case d.yielded:
		return ErrYielded
	case d.closed:
		return os.ErrClosed
	}
	return nil
}

// ErrNotInForce is a pod that is not captured all the way.
var ErrNotInForce = errors.New("not captured on this node")

// Allow lets the pod reach the destination by the kernel. All pods in question must be
// captured in force.
func (d *Datapath) Allow(uid string, destination netip.AddrPort, a Allowance) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.leads(); err != nil {
		return err
	}
	source := d.pods[uid]
	if source == nil || !source.inForce.Load() {
		return fmt.Errorf("pod %s: %w", uid, ErrNotInForce)
	}
	if len(a.Local) > MaxLocal || len(a.Local) > a.Total {
		return fmt.Errorf("%d endpoints of %d", len(a.Local), a.Total)
	}
	v := bpf.RacewayAllowance{Generation: a.Generation, Total: uint32(a.Total), Local: uint32(len(a.Local))}
	for i, e := range a.Local {
		p := d.pods[e.UID]
		if p == nil || !p.inForce.Load() {
			return fmt.Errorf("pod %s: %w", e.UID, ErrNotInForce)
		}
		v.Endpoints[i] = bpf.RacewayEndpoint{Netns: p.ns.Cookie(), Addr: toAddr(e.At.Addr()), Port: e.At.Port()}
	}
	return d.loaded.maps.Allowed.Put(bpf.RacewayDestination{
		Netns: source.ns.Cookie(), Addr: toAddr(destination.Addr()), Port: destination.Port(),
	}, v)
}

// Disallow takes one allowance back.
func (d *Datapath) Disallow(uid string, destination netip.AddrPort) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.leads(); err != nil {
		return err
	}
	source := d.pods[uid]
	if source == nil {
		return nil // nobody asks for it any more
	}
	return ignoreMissing(d.loaded.maps.Allowed.Delete(bpf.RacewayDestination{
		Netns: source.ns.Cookie(), Addr: toAddr(destination.Addr()), Port: destination.Port(),
	}))
}

// InForce reports whether everything that the pod says and hears is captured and guarded.
func (d *Datapath) InForce(uid string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pods[uid]
	return p != nil && p.inForce.Load()
}

// noteForce is called when something of the pod's capture changed.
func (p *Pod) noteForce() {
	guarded := p.rec.HostIfindex != 0 || p.d.cfg.DisableGuard
	p.inForce.Store(!p.closed && p.rec.Outbound && p.rec.Inbound && guarded)
}

// repairDirect puts the hooks back while they are relied on, and forgets admissions whose
// end they missed.
func (d *Datapath) repairDirect() (mended []string, err error) {
	if d.loaded.noDirect != nil || !d.wantsDirect || d.yielded {
		return nil, nil
	}
	mended, err = repair([]part{{
		"same node",
		func() error { return d.checkHooksOf(directHooks()) },
		func() error {
			var errs []error
			for _, h := range directHooks() {
				_, err := d.loaded.renewHook(h, d.cfg)
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}})
	return mended, errors.Join(err, d.pruneAdmitted())
}

// checkDirect is for pods' checks: nil also where the path is not in use.
func (d *Datapath) checkDirect() error {
	d.mu.Lock()
	wanted := d.wantsDirect
	d.mu.Unlock()
	switch {
	case !wanted:
		return nil
	case d.loaded.noDirect != nil:
		return d.loaded.noDirect
	}
	return d.checkHooksOf(directHooks())
}

// isLate is an admission of a connection that has ended, and that its server may still hear of.
func isLate(a bpf.RacewayAdmission) bool {
	return a.Stage == bpf.RacewayAdmissionStageADMISSION_ENDED && age(a.Since) < lateAfter
}

// pruneAdmitted forgets connections that have no client any more. A hook sees them end, unless
// another program on the node takes its flag off the socket, or it was away.
func (d *Datapath) pruneAdmitted() error {
	old := make(map[bpf.RacewayTuple]bool)
	var t bpf.RacewayTuple
	var a bpf.RacewayAdmission
	entries := d.loaded.maps.Admitted.Iterate()
	for entries.Next(&t, &a) {
		if !isLate(a) && age(a.Since) > lateAfter {
			old[t] = true
		}
	}
	// It changes all the time: what an iteration misses the next one finds.
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read connections by the kernel: %w", err)
	}
	if len(old) == 0 {
		return nil
	}
	live, err := d.listDirect()
	if err != nil {
		return err
	}
	for _, e := range live {
		delete(old, e.What.Key)
	}
	var errs []error
	for t := range old {
		errs = append(errs, ignoreMissing(d.loaded.maps.Admitted.Delete(t)))
	}
	return errors.Join(errs...)
}

// uidsLocked names the pods in force by their namespaces.
func (d *Datapath) uidsLocked() map[uint64]string {
	uids := make(map[uint64]string, len(d.records))
	for uid, r := range d.records {
		uids[r.Cookie] = uid
	}
	return uids
}

// openPod is the pod with that namespace, if it is open.
func (d *Datapath) openPod(cookie uint64) *Pod {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.pods {
		if p.ns.Cookie() == cookie {
			return p
		}
	}
	return nil
}
