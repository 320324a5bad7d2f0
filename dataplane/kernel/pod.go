package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Pod is one pod of the node, prepared for capture. Its methods are safe for concurrent
// use; each may be called again when what it brings about is already so.
type Pod struct {
	d     *Datapath
	uid   string
	addrs []netip.Addr // unmapped
	ns    *netns.Namespace

	mu      sync.Mutex
	closed  bool
	yielded bool // only what is live may go on
	rec     *record
	inForce atomic.Bool // captured and guarded

	outbound, inbound *netns.Listener
	tunnel            *net.TCPListener
	udp               *Datagrams // nil while UDP is not captured

	older map[bpf.RacewayTuple]bpf.RacewayStage // what the established map holds of this pod
}

// OpenPod prepares a pod: listeners, routing rule and routes, sysctls, and the program that
// steers its tunnel port. Nothing is captured yet, unless an earlier agent left the pod in
// force; then it stays so, with the new listeners.
func (d *Datapath) OpenPod(cfg PodConfig) (*Pod, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("open pod %s: %w", cfg.UID, err)
	}
	ns, err := netns.Open(cfg.NetNS)
	if err != nil {
		return nil, fmt.Errorf("open pod %s: %w", cfg.UID, err)
	}
	p := &Pod{d: d, uid: cfg.UID, addrs: unmapped(cfg.Addrs), ns: ns}
	if err := d.claim(p); err != nil {
		return nil, errors.Join(fmt.Errorf("open pod %s: %w", cfg.UID, err), ns.Close())
	}
	if err := p.open(cfg); err != nil {
		return nil, fmt.Errorf("open pod %s: %w", cfg.UID, err)
	}
	return p, nil
}

// claim registers p, and releases what an earlier agent left of the same pod in another
// namespace, or of another pod in this one.
func (d *Datapath) claim(p *Pod) error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return os.ErrClosed
	}
	if p.ns.Cookie() == d.host.Cookie() {
		d.mu.Unlock()
		return fmt.Errorf("its network namespace %s is the host's, whose traffic is never captured", p.ns.Path())
	}
	if d.pods[p.uid] != nil {
		d.mu.Unlock()
		return errors.New("it is open already")
	}
	for _, other := range d.pods {
		if other.ns.Cookie() == p.ns.Cookie() {
			d.mu.Unlock()
			return fmt.Errorf("its network namespace %s is that of pod %s", p.ns.Path(), other.uid)
		}
	}
	var stale []string
	for uid, r := range d.records {
		if (uid == p.uid) != (r.Cookie == p.ns.Cookie()) {
			stale = append(stale, uid)
		}
	}
	d.mu.Unlock()
	for _, uid := range stale {
		if err := d.RemoveAdopted(uid); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pods[p.uid] != nil {
		return errors.New("it is being opened already")
	}
	d.pods[p.uid] = p
	return nil
}

func (p *Pod) open(cfg PodConfig) error {
	p.d.mu.Lock()
	rec, adopted := p.d.records[p.uid]
	p.d.mu.Unlock()
	if !adopted {
		rec = &record{UID: p.uid, Cookie: p.ns.Cookie()}
	}
	rec.NetNS = cfg.NetNS
	rec.Addrs = p.addrs
	p.rec = rec
	err := p.prepare()
	switch {
	case err == nil:
		return nil
	case adopted: // whatever is in force stays: closed, not open
		return errors.Join(err, p.Close())
	default:
		return errors.Join(err, p.Remove())
	}
}

func unmapped(addrs []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, len(addrs))
	for i, a := range addrs {
		out[i] = a.Unmap()
	}
	return out
}

func (p *Pod) prepare() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.d
	d.mu.Lock()
	d.records[p.uid] = p.rec
	d.mu.Unlock()
	if err := p.setUpRouting(); err != nil {
		return err
	}
	if err := d.loaded.enter(p.rec); err != nil {
		return fmt.Errorf("enter the pod: %w", err)
	}
	if err := p.listen(); err != nil {
		return err
	}
	if err := p.attachInbound(); err != nil {
		return err
	}
	if err := p.adoptUDP(); err != nil {
		return err
	}
	if err := p.loadOlder(); err != nil {
		return err
	}
	if err := p.renewGuard(); err != nil {
		return err
	}
	p.noteForce()
	return d.ledger.save(p.rec)
}

// UID is the pod's.
func (p *Pod) UID() string { return p.uid }

// Addrs are the pod's.
func (p *Pod) Addrs() []netip.Addr { return p.addrs }

// Vanished reports that the network namespace that the pod was opened in is gone, or that
// its name leads to another one now. Remove is then all that can be done for it.
func (p *Pod) Vanished() bool { return p.ns.Gone() }

// Outbound accepts what the pod's applications connect to: LocalAddr of a connection is
// the original destination, RemoteAddr the application.
func (p *Pod) Outbound() *netns.Listener { return current(p, &p.outbound) }

// Inbound accepts plaintext from outside: LocalAddr is the application's address,
// RemoteAddr the client.
func (p *Pod) Inbound() *netns.Listener { return current(p, &p.inbound) }

// Tunnel accepts what is sent to the pod's port 15008.
func (p *Pod) Tunnel() *net.TCPListener { return current(p, &p.tunnel) }

// current is a listener of p, which Relisten replaces.
func current[L any](p *Pod, l *L) L {
	p.mu.Lock()
	defer p.mu.Unlock()
	return *l
}

// claimSocket returns what makes a socket known as the agent's.
func (d *Datapath) claimSocket(role bpf.RacewayListener) func(fd int) error {
	owner := &bpf.RacewayOwner{Role: role}
	return func(fd int) error {
		if err := updateSocketStorage(d.loaded.maps.Own, fd, owner); err != nil {
			return fmt.Errorf("mark a socket as the agent's: %w", err)
		}
		return nil
	}
}

// CaptureOutbound redirects what the pod connects to from now on.
func (p *Pod) CaptureOutbound() error {
	return p.setFlags("capture outbound", func(r *record) {
		if !r.Outbound {
			r.Outbound, r.OutboundSince = true, int64(monotonic())
		}
	})
}

// ReleaseOutbound lets new connections of the pod go out directly.
func (p *Pod) ReleaseOutbound() error {
	return p.setFlags("release outbound", func(r *record) { r.Outbound, r.OutboundSince = false, 0 })
}

// CaptureInbound redirects plaintext connections from outside from now on.
func (p *Pod) CaptureInbound() error {
	return p.setFlags("capture inbound", func(r *record) { r.Inbound = true })
}

// ReleaseInbound lets plaintext connections from outside reach the application directly.
func (p *Pod) ReleaseInbound() error {
	return p.setFlags("release inbound", func(r *record) { r.Inbound = false })
}

func (p *Pod) setFlags(deed string, change func(*record)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return fmt.Errorf("%s of pod %s: %w", deed, p.uid, err)
	}
	before := *p.rec
	change(p.rec)
	defer p.noteForce()
	if err := p.d.ledger.save(p.rec); err != nil {
		*p.rec = before
		return fmt.Errorf("%s of pod %s: %w", deed, p.uid, err)
	}
	if err := p.d.loaded.maps.Pods.Put(p.rec.Cookie, podValue(p.rec)); err != nil {
		*p.rec = before
		return fmt.Errorf("%s of pod %s: %w", deed, p.uid, errors.Join(err, p.d.ledger.save(p.rec)))
	}
	return nil
}

// Close closes the pod's descriptors and leaves everything in force, so that captured
// connections are refused. It is idempotent.
func (p *Pod) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closeLocked()
}

func (p *Pod) closeLocked() error {
	if p.closed {
		return nil
	}
	p.closed = true
	p.noteForce()
	errs := []error{p.closeListeners(), p.closeUDP(), p.ns.Close()}
	p.d.mu.Lock()
	delete(p.d.pods, p.uid)
	p.d.mu.Unlock()
	return errors.Join(errs...)
}

// Remove undoes everything that was done for the pod, and closes it. When a step fails the
// others are still taken, and the pod can be removed again with RemoveAdopted.
func (p *Pod) Remove() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.uid, err)
	}
	err := p.d.release(p.rec, p.ns)
	if err := errors.Join(err, p.closeLocked()); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.uid, err)
	}
	return nil
}

// release undoes what r says. ns is nil when the namespace is gone; what was in it went
// with it.
func (d *Datapath) release(r *record, ns *netns.Namespace) error {
	errs := []error{
		d.detachGuard(r),
		d.detachInbound(r, ns),
		d.detachUDP(r, ns),
		os.RemoveAll(d.podDir(r)),
		d.loaded.leave(r),
		d.forgetOlder(r.Cookie),
		d.forgetFlowsOf(r.Cookie),
	}
	if ns != nil {
		errs = append(errs, tearDownRouting(r, ns))
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	d.mu.Lock()
	delete(d.records, r.UID)
	d.mu.Unlock()
	return d.ledger.forget(r)
}
