package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
	"github.com/raceway-mesh/raceway/dataplane/sandbox"
)

// pods carries out what enrolment decides: it is the enroll.Target of a node.
// The reconciler never calls two methods for one pod at the same time.
type pods struct {
	datapath  *kernel.Datapath
	keeper    *certs.Keeper
	proxy     *proxy.Proxy
	publisher discovery.Publisher
	finder    *sandbox.Finder // nil when the workloads themselves name their namespaces
	log       *slog.Logger

	// serve and force bound the serving of every pod: the first ends it gracefully.
	serve, force context.Context

	// mu also keeps the identities that the keeper is asked for in step with served.
	mu     sync.Mutex
	served map[string]*servedPod

	translations *translations // nil forgets none

	udp        *udpKeeper      // nil captures no UDP
	adoptedUDP map[string]bool // pods whose UDP an earlier agent captured

	publishing sync.Mutex // held by who publishes
	published  atomic.Pointer[published]
}

var _ enroll.Target = (*pods)(nil)

// servedPod is a pod whose listeners the agent holds.
type servedPod struct {
	*kernel.Pod
	identity spiffe.ID
	force    context.Context    // bounds all serving of the pod
	cut      context.CancelFunc // ends force
	stop     context.CancelFunc // ends the latest serving gracefully
	serving  sync.WaitGroup     // the latest, and earlier ones whose connections live
	mute     bool               // it has to listen anew; for Prepare alone
	prepared atomic.Bool        // it had a certificate, and its UDP may be captured
	starting bool               // it was opened before any of it ran
	rounds   atomic.Int32       // of watchPods until its older connections have ended

	// udpMu guards the rest.
	udpMu     sync.Mutex
	serve     context.Context   // the latest serving's
	udp       *kernel.UDPConfig // as UDP is captured; nil: not, or not known
	udpTried  *kernel.UDPConfig // as it was to be captured last
	udpErr    error             // why it is not so
	udpFailed time.Time         // since when
	udpLeaves bool              // it is let go once peers know of it
	datagrams *kernel.Datagrams // what is served of it
	endUDP    func()            // ends that at once; nil when there was none
}

// Prepare opens the pod's namespace, serves its listeners and waits for its certificate.
// The listeners come first: a pod that an earlier agent left captured needs them at once,
// whatever the CA does.
func (p *pods) Prepare(ctx context.Context, w *dataplane.Workload) error {
	if s := p.get(w.UID); s == nil {
		if err := p.open(ctx, w); err != nil {
			return err
		}
	} else if err := p.revive(s, w.Name); err != nil {
		return err
	}
	ready, cancel := context.WithTimeout(ctx, certificateWait)
	defer cancel()
	if err := p.keeper.Ready(ready, w.Identity); err != nil {
		return err
	}
	if p.udp != nil {
		p.udp.prepared(p.get(w.UID), w)
	}
	return nil
}

// certificateWait is how long a pod's preparation waits for its certificate before it fails
// with the reason, for people to see, and is tried again.
const certificateWait = 3 * time.Second

func (p *pods) open(ctx context.Context, w *dataplane.Workload) error {
	path, err := p.namespace(ctx, w)
	if err != nil {
		return fmt.Errorf("open pod %s: %w", w.Name, err)
	}
	pod, err := p.datapath.OpenPod(kernel.PodConfig{UID: w.UID, NetNS: path, Addrs: w.Addrs})
	if err != nil {
		return fmt.Errorf("open pod %s: %w", w.Name, err)
	}
	s := &servedPod{Pod: pod, identity: w.Identity, starting: w.Starting}
	s.force, s.cut = context.WithCancel(p.force)
	p.mu.Lock()
	p.served[w.UID] = s
	p.keeper.Want(s.identity)
	p.mu.Unlock()
	p.start(s, w.Name)
	return nil
}

// namespace is where the pod's network is: where its sandbox was said to be, or where it is
// found, as that of a pod which is older than the agent.
func (p *pods) namespace(ctx context.Context, w *dataplane.Workload) (string, error) {
	if w.NetNS != "" || p.finder == nil {
		return w.NetNS, nil
	}
	return p.finder.Find(ctx, sandbox.Pod{UID: cmp.Or(w.StaticHash, w.UID), Addrs: w.Addrs})
}

// start serves the pod's listeners as they are now.
func (p *pods) start(s *servedPod, name dataplane.Name) {
	serve, stop := context.WithCancel(p.serve)
	s.stop = stop
	s.udpMu.Lock()
	defer s.udpMu.Unlock()
	s.endUDPLocked()
	s.serve = serve
	p.serveUDPLocked(s, name)
	s.serving.Go(func() {
		defer stop()
		if err := p.proxy.ServePod(serve, s.force, s.Pod); err != nil {
			p.log.Error("serve pod", "pod", name, "err", err)
		}
	})
}

// revive gives a pod that lost a listener new ones. Connections that live go on, but those by QUIC.
func (p *pods) revive(s *servedPod, name dataplane.Name) error {
	s.mute = s.mute || s.Listening() != nil
	if !s.mute {
		return nil
	}
	s.stop()
	if err := s.Relisten(); err != nil {
		return err
	}
	s.mute = false
	p.start(s, name)
	return nil
}

// Publish tells the other agents which pods take tunnels.
func (p *pods) Publish(ctx context.Context, uids []string) error {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	if uids == nil {
		uids = []string{}
	}
	return p.publishLocked(ctx, uids, p.udpOf(uids))
}

// CaptureOutbound, CaptureInbound, Guard and their opposites switch one part of the capture.
func (p *pods) CaptureOutbound(_ context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error { return s.Pod.CaptureOutbound() })
}

// CaptureInbound starts to capture plaintext.
func (p *pods) CaptureInbound(_ context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error {
		if !s.starting {
			p.forgetTranslations(s.Addrs())
			s.rounds.Store(translationRounds)
		}
		return s.Pod.CaptureInbound()
	})
}

// Guard attaches the guard once connections older than the capture are known to it.
func (p *pods) Guard(ctx context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error { return s.Pod.Guard(ctx) })
}

// Unguard detaches the guard.
func (p *pods) Unguard(_ context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error { return s.Pod.Unguard() })
}

// ReleaseInbound lets plaintext reach the application directly.
func (p *pods) ReleaseInbound(_ context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error { return s.Pod.ReleaseInbound() })
}

// ReleaseOutbound lets new connections of the application leave directly.
func (p *pods) ReleaseOutbound(_ context.Context, uid string) error {
	return p.with(uid, func(s *servedPod) error { return s.Pod.ReleaseOutbound() })
}

// Live is how many connections the proxy carries for the pod.
func (p *pods) Live(uid string) int { return p.proxy.Live(uid) }

// Remove ends what is left of the pod's connections and undoes everything in its namespace.
func (p *pods) Remove(_ context.Context, uid string) error {
	s := p.get(uid)
	if s == nil {
		return p.removeAdopted(uid)
	}
	s.stop()
	s.cut()
	s.serving.Wait()
	// Whatever comes of it the pod is closed then; what is left of it is an earlier agent's.
	err := s.Pod.Remove()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.served, uid)
	for _, other := range p.served {
		if other.identity == s.identity {
			return err
		}
	}
	p.keeper.Forget(s.identity)
	return err
}

// removeAdopted has nothing to do for a pod that never was in force: Prepare failed first.
func (p *pods) removeAdopted(uid string) error {
	for _, adopted := range p.datapath.Adopted() {
		if adopted.UID == uid {
			return p.datapath.RemoveAdopted(uid)
		}
	}
	return nil
}

// wait returns when the serving of every pod, which has been told to end, has ended.
func (p *pods) wait() {
	for _, s := range p.all() {
		s.serving.Wait()
	}
}

// Close closes what the agent holds of the pods; their capture stays in force.
func (p *pods) Close() error {
	var errs []error
	for _, s := range p.all() {
		errs = append(errs, s.Pod.Close())
	}
	return errors.Join(errs...)
}

// prune lets the guards of the pods in question forget connections that have ended.
func (p *pods) prune(in func(*servedPod) bool) {
	for _, s := range p.all() {
		if !in(s) {
			continue
		}
		if err := s.Pod.Prune(); err != nil {
			p.log.Warn("prune older connections", "pod", s.UID(), "err", err)
		}
	}
}

// vanished are the pods whose network namespace is gone.
func (p *pods) vanished() []string {
	var uids []string
	for _, s := range p.all() {
		if s.Pod.Vanished() {
			uids = append(uids, s.UID())
		}
	}
	return uids
}

// deaf are the pods that a listener was taken from, and which.
func (p *pods) deaf() map[string]error {
	found := make(map[string]error)
	for _, s := range p.all() {
		if err := s.Listening(); err != nil {
			found[s.UID()] = err
		}
	}
	return found
}

func (p *pods) get(uid string) *servedPod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.served[uid]
}

func (p *pods) all() []*servedPod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.served))
}

func (p *pods) with(uid string, do func(*servedPod) error) error {
	s := p.get(uid)
	if s == nil {
		return fmt.Errorf("pod %s is not open", uid)
	}
	return do(s)
}
