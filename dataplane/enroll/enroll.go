// Package enroll brings the pods of one node to the state that the cluster asks for:
// captured, or left alone. It is pure: what it does to a pod goes through Target.
//
// Every pod has a machine of its own. On the way in peers learn of a pod only once it can
// take their tunnels, and plaintext is captured last; on the way out it is the reverse,
// so that no connection fails on either:
//
//	absent ─Prepare─► prepared ─Publish─► published ─settle─CaptureOutbound─► outbound
//	  ▲                                                                          │
//	  │                                                             settle, CaptureInbound
//	  │                                                                          ▼
//	  │                                       captured ◄──────Guard─────────── inbound
//	  │                                          │
//	  │                               Unguard, ReleaseInbound
//	  │                                          ▼
//	  └─Remove─ drained ◄─grace, Live()==0─ ReleaseOutbound ◄─settle─ unpublished
//
// In a pod whose network is being set up nothing runs yet, so there is no connection to be
// gentle to and no peer that knows it: its way in has no pauses and waits for nobody. What
// is in force then does not depend on whether it is published.
//
//	absent ─Prepare─► prepared ─CaptureOutbound─► outbound ─CaptureInbound─► inbound ─Guard─► in force
//	                     └──────Publish, beside it────────────────────────────────────► captured
//
// That it started may become known in the middle: it goes on from there at the usual pace.
//
// A pod may turn round at any point. So there is no list of states to walk: what is in
// force is kept as one fact for each thing (prepared, published, outbound, inbound, guard),
// and the next step follows from the facts and the direction alone. A step that failed
// leaves its fact unsure: on the way in it is done again, on the way out it is undone.
//
// A deleted pod takes the same way out without the pauses. A pod's steps run one at a time,
// those of different pods side by side; a step that fails is tried again after a growing
// delay, and one that hangs holds up its own pod only.
package enroll

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Target is what enrolment acts on. All but Live may block until ctx ends, and return soon
// after it did. Each may be called again after it failed, and again with the same pod once
// it succeeded; calls for one pod never overlap, nor do two calls of Publish.
//
// Undoing what is not there (any more: the pod's network namespace may be gone) is success.
type Target interface {
	// Prepare makes everything that a pod needs to take tunnels: listeners, routes,
	// certificate. Port 15008 of the pod answers when it returns. It adopts what an earlier
	// agent left in force.
	Prepare(ctx context.Context, w *dataplane.Workload) error
	// Publish tells the other agents which pods of this node are captured: all of them.
	Publish(ctx context.Context, uids []string) error
	CaptureOutbound(ctx context.Context, uid string) error
	CaptureInbound(ctx context.Context, uid string) error
	Guard(ctx context.Context, uid string) error
	Unguard(ctx context.Context, uid string) error
	ReleaseInbound(ctx context.Context, uid string) error
	ReleaseOutbound(ctx context.Context, uid string) error
	// Live is how many proxied connections the pod has. It does not block.
	Live(uid string) int
	// Remove undoes all that is in force for a pod, and what a failed Prepare left. It is
	// also called for an adopted pod that this process never prepared.
	Remove(ctx context.Context, uid string) error
}

// Adopted is a pod that an earlier agent left in force. It fails closed until it is
// prepared anew or removed.
type Adopted struct {
	UID   string
	NetNS string // "" when not known
	// Published says that the other agents hold it for captured. It is kept published as
	// long as it is desired.
	Published bool
}

// Config of a Reconciler. Node, Store and Target are required.
type Config struct {
	Node   string // whose pods are enrolled
	Store  *dataplane.Store
	Target Target
	// RequireNetNS makes a pod that names no network namespace fail with a reason, for
	// sources that are the only ones to know it. Default: the Target finds it.
	RequireNetNS bool
	// Adopted is what an earlier agent left in force.
	Adopted []Adopted

	Settle      time.Duration // for peers to learn of a change; default 250 ms
	Grace       time.Duration // between the release of outbound and the first look at Live; default 2 s
	MaxDrain    time.Duration // the longest that live connections hold up Remove; default 1 h
	MaxDrainAll time.Duration // the same in ReleaseAll; default MaxDrain
	DrainPoll   time.Duration // between two looks at Live; default 1 s
	StepTimeout time.Duration // of one call of Target; default 15 s
	Concurrency int           // calls of Target at a time, those past StepTimeout not counted; default 16
	BackoffMin  time.Duration // after a first failure; default 100 ms
	BackoffMax  time.Duration // after many; default 30 s
	Log         *slog.Logger  // default: none
}

func (c Config) withDefaults() Config {
	setDefault(&c.Settle, 250*time.Millisecond)
	setDefault(&c.Grace, 2*time.Second)
	setDefault(&c.MaxDrain, time.Hour)
	setDefault(&c.MaxDrainAll, c.MaxDrain)
	setDefault(&c.DrainPoll, time.Second)
	setDefault(&c.StepTimeout, 15*time.Second)
	setDefault(&c.Concurrency, 16)
	setDefault(&c.BackoffMin, 100*time.Millisecond)
	setDefault(&c.BackoffMax, 30*time.Second)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate joins every complaint about c.
func (c Config) Validate() error {
	var errs []error
	if c.Node == "" {
		errs = append(errs, errors.New("no node name"))
	}
	if c.Store == nil {
		errs = append(errs, errors.New("no store"))
	}
	if c.Target == nil {
		errs = append(errs, errors.New("no target"))
	}
	for name, d := range map[string]time.Duration{
		"settle": c.Settle, "grace": c.Grace, "maximum drain": c.MaxDrain, "maximum drain of all": c.MaxDrainAll, "drain poll": c.DrainPoll,
		"step timeout": c.StepTimeout, "minimum back-off": c.BackoffMin, "maximum back-off": c.BackoffMax,
	} {
		if d < 0 {
			errs = append(errs, fmt.Errorf("%s of %v is negative", name, d))
		}
	}
	if c.Concurrency < 0 {
		errs = append(errs, fmt.Errorf("concurrency of %d is negative", c.Concurrency))
	}
	return errors.Join(errs...)
}

// Status is how far one pod's enrolment has come.
type Status struct {
	State  dataplane.CaptureState
	Reason string    // what it waits for or why it failed; "" when captured
	Since  time.Time // when State became this
	// InForce says that nothing of the pod's traffic gets past the agent. It is captured
	// when its peers are told as well.
	InForce bool
}

// placed is a Status and where it is true.
type placed struct {
	Status
	netns string
	addrs []netip.Addr // sorted
}

// Reconciler enrols and releases the pods of one node.
type Reconciler struct {
	cfg Config

	wake chan struct{} // there is something in lost or broken

	mu      sync.Mutex
	driving bool              // Run or ReleaseAll is under way
	status  map[string]placed // by UID
	told    chan struct{}     // closed when status has changed
	lost    map[string]bool   // UIDs that Vanished was told
	broken  map[string]string // why, by the UIDs that Broken was told

	// What follows belongs to whoever drives.
	pods        map[string]*pod
	claims      map[string][]string // network namespace -> UIDs of the pods prepared, or being prepared, in it
	publication publication
	seen        *dataplane.Snapshot // the one that desire took in last
	decided     bool                // it is known what is wanted
}

// New returns a Reconciler that has done nothing yet.
func New(cfg Config) (*Reconciler, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure enrolment: %w", err)
	}
	r := &Reconciler{
		cfg: cfg.withDefaults(), status: make(map[string]placed), pods: make(map[string]*pod), claims: make(map[string][]string),
		told: make(chan struct{}), wake: make(chan struct{}, 1), lost: make(map[string]bool), broken: make(map[string]string),
	}
	for _, a := range cfg.Adopted {
		p := &pod{uid: a.UID, netns: a.NetNS, resumed: a.Published, prepared: unsure, outbound: unsure, inbound: unsure, guard: unsure, published: unsure}
		if a.Published {
			p.published = on
		}
		r.pods[a.UID] = p
		r.claim(p)
	}
	r.report(time.Now())
	return r, nil
}

// Run brings pods to the state that the store's snapshots ask for until ctx ends. It then
// leaves everything in force, for the next agent to take over, and returns nil once the
// calls that were under way have returned.
func (r *Reconciler) Run(ctx context.Context) error {
	return r.drive(ctx, false)
}

// ReleaseAll releases every pod as if none were enrolled any more: for taking the mesh off
// the node. It may be called once Run has returned, or in its place. When ctx ends first
// the error names what is left.
func (r *Reconciler) ReleaseAll(ctx context.Context) error {
	return r.drive(ctx, true)
}

// Vanished tells that the network namespace that a pod was prepared in is gone, or that
// another one took its place. What was in force for the pod is removed, without pauses, and
// it is prepared anew if it is still wanted: in the other namespace, or failing with the
// reason why it cannot be.
func (r *Reconciler) Vanished(uid string) {
	r.mu.Lock()
	r.lost[uid] = true
	r.mu.Unlock()
	r.rouse()
}

// Broken tells that what Prepare made of a pod does not work any more, and why. The pod is not
// captured until Prepare has succeeded again; what else is in force stays so. Tell again if it
// stays broken: a pod that is being worked on, or is on its way out, is left alone.
func (r *Reconciler) Broken(uid string, cause error) {
	r.mu.Lock()
	r.broken[uid] = cause.Error()
	r.mu.Unlock()
	r.rouse()
}

func (r *Reconciler) rouse() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Status returns every pod that is captured, on its way in or out, or should be captured
// and cannot be; by UID. The caller may keep it.
func (r *Reconciler) Status() map[string]Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	status := make(map[string]Status, len(r.status))
	for uid, s := range r.status {
		status[uid] = s.Status
	}
	return status
}

// Await returns nil once nothing of w's traffic gets past the agent: in the namespace and
// with the addresses that w has now, whatever was in force before. When ctx ends first, the
// error says what it waits for or why it failed.
func (r *Reconciler) Await(ctx context.Context, w *dataplane.Workload) error {
	for {
		r.mu.Lock()
		status, told := r.status[w.UID], r.told
		r.mu.Unlock()
		if status.InForce && status.netns == w.NetNS && slices.Equal(status.addrs, sorted(w.Addrs)) {
			return nil
		}
		select {
		case <-told:
		case <-ctx.Done():
			return fmt.Errorf("capture of pod %s is not in force: %s", w.Name, cmp.Or(status.Reason, "it is not known to be wanted yet"))
		}
	}
}
