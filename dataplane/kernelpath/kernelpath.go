// Package kernelpath keeps the kernel's verdicts on connections between pods of this node, and
// tells of those connections what the proxy tells of its own.
//
//	proxy ── Offer ──► verdict (samenode) ── Allow ──► kernel ── events ──► telemetry
//	snapshot ── Revoke, judge again ──► Allow              ▲
//	         └─ policy against it ──► Cut ─────────────────┘
//
// A verdict is made when a pod first connects through the proxy, and lapses with the snapshot
// that it was made by: before anybody can load the next one, all are revoked.
package kernelpath

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// Kernel is what carries the connections; *kernel.Datapath is one.
type Kernel interface {
	Direct() error
	InForce(uid string) bool
	Revoke() (generation uint64, err error)
	Allow(uid string, destination netip.AddrPort, a kernel.Allowance) error
	Disallow(uid string, destination netip.AddrPort) error
	FollowDirect(ctx context.Context, fn func(kernel.DirectConnection)) error
	DirectConnections() ([]kernel.DirectConnection, error)
	Cut(id kernel.DirectID) error
}

// Config is what New needs. All but Mode, Interval and Log is required.
type Config struct {
	Node      string
	Mode      dataplane.SameNodeMode
	Store     *dataplane.Store
	Kernel    Kernel
	Telemetry *telemetry.Telemetry
	// Interval is how often live connections are asked for their bytes. 0 means 10 seconds.
	Interval time.Duration
	// Log receives what no connection's record tells. nil discards it.
	Log *slog.Logger
}

// Validate joins every complaint.
func (c Config) Validate() error {
	errs := []error{c.Mode.Validate()}
	if c.Store == nil || c.Kernel == nil || c.Telemetry == nil {
		errs = append(errs, errors.New("kernel path: no store, kernel or telemetry"))
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.Interval <= 0 {
		c.Interval = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Paths are the connections of one node that go by the kernel. It is safe for concurrent use.
type Paths struct {
	cfg Config

	mu       sync.Mutex
	judge    *samenode.Judge // of the newest snapshot; nil while nothing may be allowed
	policies *authz.Set
	current  uint64        // generation of what judge allows
	renewed  chan struct{} // holds something when there is a newer judge
	verdicts map[ask]*verdict
	blocked  map[route]time.Time // where SYNs did not arrive, and until when that counts

	connections map[kernel.DirectID]*connection // Run's alone
}

// ask is what a pod connects to.
type ask struct {
	uid         string
	destination netip.AddrPort
}

// verdict is one that the kernel has.
type verdict struct {
	generation uint64
	local      []netip.AddrPort
	used       time.Time
}

// route is a way that packets of a pod take.
type route struct {
	uid string
	to  netip.AddrPort
}

// New makes Paths that allow nothing before Run.
func New(cfg Config) (*Paths, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Paths{
		cfg: cfg.withDefaults(), renewed: make(chan struct{}, 1),
		verdicts: make(map[ask]*verdict), blocked: make(map[route]time.Time),
		connections: make(map[kernel.DirectID]*connection),
	}, nil
}

// unused is how long a verdict is renewed for a pod that does not use it.
const unused = 10 * time.Minute

// blockedFor is how long connections take the tunnel after one whose SYN did not arrive.
const blockedFor = 10 * time.Minute

// maxVerdicts bounds what is renewed with each snapshot.
const maxVerdicts = 32768

// end allows nothing any more.
func (p *Paths) end() {
	p.cfg.Store.Before(nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.judge = nil
	clear(p.verdicts)
	if _, err := p.cfg.Kernel.Revoke(); err != nil {
		p.cfg.Log.Error("take back what was allowed by the kernel", "error", err)
	}
}

// renew revokes all verdicts, and judges by next from now on.
func (p *Paths) renew(next *dataplane.Snapshot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	generation, err := p.cfg.Kernel.Revoke()
	if err != nil {
		p.cfg.Log.Error("take back what was allowed by the kernel", "error", err)
		p.judge = nil
		return
	}
	p.current = generation
	p.policies = authz.NewSet(next)
	p.judge = &samenode.Judge{
		Node: p.cfg.Node, Mode: p.cfg.Mode, Snapshot: next, InForce: p.cfg.Kernel.InForce, Rules: p.policies.Rules,
	}
	select {
	case p.renewed <- struct{}{}:
	default:
	}
}

// Offer is proxy.KernelPath's: the pod has connected to the destination through the proxy.
func (p *Paths) Offer(uid string, destination netip.AddrPort) []netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.judge == nil || !p.concerns(destination) {
		return nil
	}
	at := ask{uid, destination}
	if v := p.verdicts[at]; v != nil && v.generation == p.current {
		return v.local
	}
	if p.verdicts[at] == nil && len(p.verdicts) >= maxVerdicts {
		return nil
	}
	p.decideLocked(at, time.Now())
	return nil
}

// concerns leaves out at once what cannot be on this node.
func (p *Paths) concerns(destination netip.AddrPort) bool {
	s := p.judge.Snapshot
	if s.ServiceAt(destination.Addr()) != nil {
		return true
	}
	w := s.WorkloadAt(destination.Addr())
	return w != nil && w.Node == p.cfg.Node
}

// decideLocked tells the kernel the verdict of now, if there is anything in it for the kernel.
func (p *Paths) decideLocked(at ask, used time.Time) {
	delete(p.verdicts, at)
	source := p.judge.Snapshot.Workload(at.uid)
	if source == nil {
		return
	}
	decided := p.judge.Decide(source, at.destination)
	a := kernel.Allowance{Generation: p.current, Total: decided.Total}
	v := &verdict{generation: p.current, used: used}
	for _, e := range decided.Local {
		if len(a.Local) < kernel.MaxLocal && !p.isBlocked(route{at.uid, e.At}) {
			a.Local = append(a.Local, kernel.Endpoint{UID: e.Workload.UID, At: e.At})
			v.local = append(v.local, e.At)
		}
	}
	if len(a.Local) == 0 {
		return
	}
	// A pod may have been released meanwhile: its connections stay the agent's.
	if err := p.cfg.Kernel.Allow(at.uid, at.destination, a); err != nil {
		if !errors.Is(err, kernel.ErrNotInForce) {
			p.cfg.Log.Error("allow connections by the kernel", "pod", source.Name, "destination", at.destination, "error", err)
		}
		return
	}
	p.verdicts[at] = v
}

// rejudge makes the verdicts anew that are in use, one at a time so that nobody waits for all.
func (p *Paths) rejudge() {
	p.mu.Lock()
	all := make([]ask, 0, len(p.verdicts))
	for at := range p.verdicts {
		all = append(all, at)
	}
	p.mu.Unlock()
	for _, at := range all {
		p.mu.Lock()
		switch v := p.verdicts[at]; {
		case v == nil || p.judge == nil || v.generation == p.current:
		case time.Since(v.used) > unused:
			delete(p.verdicts, at)
		default:
			p.decideLocked(at, v.used)
		}
		p.mu.Unlock()
	}
}

// touch keeps a verdict that is used.
func (p *Paths) touch(at ask) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if v := p.verdicts[at]; v != nil {
		v.used = time.Now()
	}
}

func (p *Paths) isBlocked(r route) bool {
	until, blocked := p.blocked[r]
	if blocked && time.Now().After(until) {
		delete(p.blocked, r)
		return false
	}
	return blocked
}

// block has the pod take the tunnel to an address where its SYN did not arrive.
func (p *Paths) block(c kernel.DirectConnection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := route{c.Client, c.To}
	if p.blocked[r].IsZero() {
		p.cfg.Log.Warn("a connection to a pod of this node did not arrive by the kernel, and takes the tunnel: a NetworkPolicy may let port 15008 through and not the application's",
			"pod", c.Client, "to", c.To)
	}
	p.blocked[r] = time.Now().Add(blockedFor)
	for at, v := range p.verdicts {
		if at.uid != c.Client || p.judge == nil {
			continue
		}
		if err := p.cfg.Kernel.Disallow(at.uid, at.destination); err != nil {
			p.cfg.Log.Error("take back what was allowed by the kernel", "pod", c.Client, "destination", at.destination, "error", err)
		}
		p.decideLocked(at, v.used)
	}
}
