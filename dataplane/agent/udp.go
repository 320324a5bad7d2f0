package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

const (
	// udpInterval is how often the capture of UDP is compared with what it should be while it
	// is not so, beside each change of the cluster.
	udpInterval = time.Second
	// udpRetry is how long after a failure it is tried again.
	udpRetry = 10 * time.Second
)

// errUDPOff is why an agent that is told so captures no UDP.
var errUDPOff = errors.New("the agent runs with --udp=false")

// newUDP decides whether the UDP of this node's pods is captured.
func (a *Agent) newUDP() {
	log := a.cfg.Log.With("part", "udp")
	a.udp = &udpKeeper{
		pods: a.pods, datapath: a.datapath, store: &a.store, settle: max(a.cfg.Settle, udpInterval),
		off: !a.cfg.UDP, wake: make(chan struct{}, 1), told: make(map[string]string), log: log,
	}
	a.pods.udp = a.udp
	if err := a.udp.not(); err != nil && a.cfg.UDP {
		log.Warn("UDP of pods goes in clear, or nowhere where their namespaces require tunnels", "cause", err)
	}
	a.lead(a.udp.Run)
}

// resetKeyFile holds what QUIC connections of an earlier agent of the node are reset by.
const resetKeyFile = "quic-reset-key"

// resetKey is the node's, made by its first agent.
func resetKey(stateDir string) (*[32]byte, error) {
	path := filepath.Join(stateDir, resetKeyFile)
	data, err := os.ReadFile(path)
	var key [32]byte
	if err == nil && len(data) == len(key) {
		copy(key[:], data)
		return &key, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the key that resets QUIC connections: %w", err)
	}
	rand.Read(key[:]) // never returns an error (Go 1.24)
	if err := errors.Join(os.MkdirAll(stateDir, 0o700), os.WriteFile(path, key[:], 0o600)); err != nil {
		return nil, fmt.Errorf("write the key that resets QUIC connections: %w", err)
	}
	return &key, nil
}

// udpKeeper captures the UDP of this node's pods, tells the kernel who else speaks the tunnel, and
// publishes whose UDP is taken. A pod's way in and out:
//
//	Prepare ─► captured, served ─► published ─settle─► strict, if it is to be
//	released ◄─settle─ unpublished ◄─ left alone
type udpKeeper struct {
	pods     *pods
	datapath *kernel.Datapath
	store    *dataplane.Store
	settle   time.Duration // for peers to learn of a change
	off      bool          // nothing is captured; what an earlier agent captured is let go
	wake     chan struct{} // something is to be done
	log      *slog.Logger

	mu    sync.Mutex
	rules *authz.Set
	of    *dataplane.Snapshot // that rules are of

	// For Run alone.
	peers *dataplane.Snapshot // that the kernel's peers are of
	told  map[string]string   // errors that were told, by whom they are of
}

// not says why UDP is not captured on this node; nil when it is.
func (u *udpKeeper) not() error {
	if u.off {
		return errUDPOff
	}
	return u.datapath.NoUDP()
}

// Run keeps UDP as the cluster asks for it, until ctx ends.
func (u *udpKeeper) Run(ctx context.Context) error {
	for {
		s, changed := u.store.Load()
		var again <-chan time.Time
		if s != nil {
			if pause := u.follow(ctx, s); pause > 0 {
				again = time.After(pause)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-u.wake:
		case <-again:
		}
	}
}

// follow returns when to look again; 0 when all is as s asks for. It tells once what is not.
func (u *udpKeeper) follow(ctx context.Context, s *dataplane.Snapshot) (pause time.Duration) {
	failed := make(map[string]error)
	if err := u.setPeers(s); err != nil {
		failed["peers"] = err
	}
	leaving := false
	for _, pod := range u.pods.all() {
		w := s.Workload(pod.UID())
		if w == nil || !w.Enrolled {
			continue // it is released, or about to be: its capture ends with it
		}
		if !pod.prepared.Load() && pod.Datagrams() == nil {
			continue // its connections are not captured yet
		}
		done, err := u.set(pod, w, u.want(s, w))
		if err != nil {
			failed[w.Name.String()] = err
		}
		leaving = leaving || err == nil && !done
	}
	if err := u.pods.republish(ctx); err != nil {
		failed["publication"] = err
	}
	switch {
	case leaving, failed["publication"] != nil:
		pause = udpInterval
	case len(failed) > 0:
		pause = udpRetry
	}
	for name, err := range failed {
		if u.told[name] != err.Error() {
			u.told[name] = err.Error()
			u.log.Error("UDP is not as it should be", "of", name, "error", err)
		}
	}
	maps.DeleteFunc(u.told, func(name string, _ string) bool { return failed[name] == nil })
	return pause
}

// setPeers tells the kernel of nobody where nobody's UDP is captured, or is to be.
func (u *udpKeeper) setPeers(s *dataplane.Snapshot) error {
	if u.peers == s {
		return nil
	}
	var peers map[kernel.Peer][]dataplane.PortRange
	captured := func(p *servedPod) bool { return p.Datagrams() != nil }
	if u.not() == nil || len(u.datapath.Adopted()) > 0 || slices.ContainsFunc(u.pods.all(), captured) {
		peers = udpPeers(s)
	}
	if err := u.datapath.SetPeers(peers); err != nil {
		return err
	}
	u.peers = s
	return nil
}

// prepared captures the UDP of a pod that is ready to take tunnels. What goes wrong is no reason
// to keep its connections from being captured.
func (u *udpKeeper) prepared(pod *servedPod, w *dataplane.Workload) {
	s, _ := u.store.Load()
	if s == nil || pod.prepared.Load() {
		return
	}
	done, err := u.set(pod, w, u.want(s, w))
	pod.prepared.Store(true)
	now, _ := u.store.Load()
	if err != nil || !done || now != s || u.pods.published.Load().belies(w.UID, pod.takesUDP()) {
		u.poke()
	}
}

// poke has Run look again.
func (u *udpKeeper) poke() {
	select {
	case u.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// want is how the pod's UDP is to be captured; nil leaves it alone.
func (u *udpKeeper) want(s *dataplane.Snapshot, w *dataplane.Workload) *kernel.UDPConfig {
	mode := dataplane.UDPDefault
	if ns := s.Namespace(w.Name.Namespace); ns != nil {
		mode = ns.UDP()
	}
	if u.off || mode == dataplane.UDPOff || mode != dataplane.UDPRequire && u.not() != nil {
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.of != s {
		u.of, u.rules = s, authz.NewSet(s)
	}
	_, strict := u.rules.Rules(w).Strict(0)
	return &kernel.UDPConfig{Strict: strict, Require: mode == dataplane.UDPRequire, Clear: w.UDPClear}
}

// udpIssues lists the namespaces whose labels are no mode of UDP or of transport, with what they
// count as.
func udpIssues(s *dataplane.Snapshot) []string {
	var issues []string
	for _, ns := range s.Namespaces() {
		if err := dataplane.UDPMode(ns.Labels[dataplane.UDPLabel]).Validate(); err != nil {
			issues = append(issues, fmt.Sprintf("namespace %s: label %s: %v: it counts as %s", ns.Name, dataplane.UDPLabel, err, ns.UDP()))
		}
		if err := dataplane.TransportMode(ns.Labels[dataplane.TransportLabel]).Validate(); err != nil {
			issues = append(issues, fmt.Sprintf("namespace %s: label %s: %v: it counts as %s", ns.Name, dataplane.TransportLabel, err, dataplane.TransportH2))
		}
	}
	return issues
}

// unmetUDP are the namespaces with pods of this node that require tunnels for UDP, where there are
// none.
func unmetUDP(s *dataplane.Snapshot, node string) []string {
	found := make(map[string]bool)
	for i := range s.Workloads() {
		w := &s.Workloads()[i]
		if ns := s.Namespace(w.Name.Namespace); w.Enrolled && w.Node == node && ns != nil && ns.UDP() == dataplane.UDPRequire {
			found[ns.Name] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// udpPeers are the pods that take UDP in tunnels, and the services of which every endpoint that
// kube-proxy could choose is such a pod.
func udpPeers(s *dataplane.Snapshot) map[kernel.Peer][]dataplane.PortRange {
	peers := make(map[kernel.Peer][]dataplane.PortRange)
	for i := range s.Workloads() {
		w := &s.Workloads()[i]
		if !w.UDP || w.Network != "" {
			continue
		}
		for _, a := range w.Addrs {
			if s.WorkloadAt(a) == w {
				peers[kernel.Peer{Addr: a}] = w.UDPClear
			}
		}
	}
	for i := range s.Services() {
		svc := &s.Services()[i]
		for _, port := range svc.UDPPorts {
			if !allTakeUDP(s, svc, port) {
				continue
			}
			for _, a := range svc.Addrs {
				peers[kernel.Peer{Addr: a, Port: port.Port}] = nil
			}
		}
	}
	return peers
}

func allTakeUDP(s *dataplane.Snapshot, svc *dataplane.Service, port dataplane.ServicePort) bool {
	some := false
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		number, ok := e.Ports[port.Name]
		if !ok || !e.Ready && !e.Serving {
			continue
		}
		w := s.WorkloadAt(e.Addr.Unmap())
		if w == nil || !w.UDP || slices.ContainsFunc(w.UDPClear, func(r dataplane.PortRange) bool { return r.First <= number && number <= r.Last }) {
			return false
		}
		some = true
	}
	return some
}

// set captures the pod's UDP, or leaves it alone when want is nil. Peers get time to hear of it
// before the pod takes no tunnels any more, or nothing but tunnels: until then set reports false.
func (u *udpKeeper) set(s *servedPod, w *dataplane.Workload, want *kernel.UDPConfig) (done bool, err error) {
	s.udpMu.Lock()
	defer s.udpMu.Unlock()
	told := u.pods.published.Load()
	s.udpLeaves = want == nil && s.Datagrams() != nil
	if s.udpLeaves && !told.known(s.UID(), false, u.settle) {
		return false, nil
	}
	done = true
	if want != nil && want.Strict && !w.Starting && !u.pods.adoptedUDP[s.UID()] && !told.known(s.UID(), true, u.settle) {
		want.Strict, done = false, false
	}
	if s.udpErr != nil && equalUDP(s.udpTried, want) && time.Since(s.udpFailed) < udpRetry {
		return false, s.udpErr
	}
	s.udpTried = want
	switch {
	case want == nil:
		s.endUDPLocked()
		s.udpErr, s.udp = s.ReleaseUDP(), nil
	case !equalUDP(s.udp, want):
		if s.udpErr = s.CaptureUDP(*want); s.udpErr == nil {
			s.udp = want
		}
	}
	if s.udpErr != nil {
		s.udpFailed = time.Now()
	}
	u.pods.serveUDPLocked(s, w.Name)
	return done && s.udpErr == nil, s.udpErr
}

func equalUDP(a, b *kernel.UDPConfig) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Strict == b.Strict && a.Require == b.Require && slices.Equal(a.Clear, b.Clear)
}

// serveUDPLocked serves the pod's captured UDP beside its listeners, once.
func (p *pods) serveUDPLocked(s *servedPod, name dataplane.Name) {
	d := s.Datagrams()
	if d == nil || d == s.datagrams || s.serve == nil || s.serve.Err() != nil {
		return
	}
	s.endUDPLocked()
	s.datagrams = d
	serve, stop := context.WithCancel(s.serve)
	force, cut := context.WithCancel(s.force)
	ended := make(chan struct{})
	s.endUDP = func() {
		stop()
		cut()
		<-ended
	}
	s.serving.Go(func() {
		defer cut()
		defer stop()
		err := p.proxy.ServeUDP(serve, force, s.UID(), d)
		close(ended)
		if err == nil {
			return
		}
		p.log.Error("serve UDP", "pod", name, "err", err)
		s.udpMu.Lock()
		defer s.udpMu.Unlock()
		if s.datagrams == d {
			s.datagrams = nil
			time.AfterFunc(udpInterval, p.udp.poke) // it is tried again
		}
	})
}

// endUDPLocked ends the serving of the pod's UDP at once, if there is one: what goes by QUIC shares a
// socket, which only one at a time can serve.
func (s *servedPod) endUDPLocked() {
	if s.endUDP != nil {
		s.endUDP()
	}
	s.endUDP, s.datagrams = nil, nil
}

// udpTrouble is why the pod's UDP is not as it should be.
func (s *servedPod) udpTrouble() error {
	s.udpMu.Lock()
	defer s.udpMu.Unlock()
	return s.udpErr
}

// takesUDP tells whether peers may send the pod UDP in tunnels.
func (s *servedPod) takesUDP() bool {
	s.udpMu.Lock()
	defer s.udpMu.Unlock()
	return s.Datagrams() != nil && !s.udpLeaves
}

// udpOf are those of the pods that take UDP. One that is not open yet does if an earlier agent
// captured it: peers that were told otherwise would send in clear what this agent takes in a moment.
func (p *pods) udpOf(uids []string) []string {
	var udp []string
	for _, uid := range uids {
		takes := p.adoptedUDP[uid] && p.udp.not() == nil
		if s := p.get(uid); s != nil {
			takes = s.takesUDP()
		}
		if takes {
			udp = append(udp, uid)
		}
	}
	return udp
}

// published is what peers were told: who takes tunnels, and which of them UDP as well. The nil
// one is before anything was told.
type published struct {
	uids, udp []string
	at        time.Time
}

// known reports whether peers have known for settle that the pod takes UDP, or that it takes none.
func (p *published) known(uid string, takes bool, settle time.Duration) bool {
	return p != nil && slices.Contains(p.udp, uid) == takes && time.Since(p.at) >= settle
}

// belies reports whether peers were told otherwise of the pod's UDP.
func (p *published) belies(uid string, takes bool) bool {
	return p != nil && slices.Contains(p.uids, uid) && slices.Contains(p.udp, uid) != takes
}

// republish publishes again what was published last, when the UDP of other pods is captured now.
func (p *pods) republish(ctx context.Context) error {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	told := p.published.Load()
	if told == nil {
		return nil
	}
	udp := p.udpOf(told.uids)
	if slices.Equal(udp, told.udp) {
		return nil
	}
	return p.publishLocked(ctx, told.uids, udp)
}

func (p *pods) publishLocked(ctx context.Context, uids, udp []string) error {
	if err := p.publisher.PublishCaptured(ctx, uids, udp); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	p.published.Store(&published{uids: uids, udp: udp, at: time.Now()})
	return nil
}
