package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// udpInterval is how often the capture of UDP is compared with what it should be, beside each
// change of the cluster: pods are opened in between.
const udpInterval = time.Second

// followUDP captures the UDP of this node's pods where Config.UDP says so, tells the kernel who
// else speaks it, and publishes whose UDP is taken, until ctx ends.
func (a *Agent) followUDP(ctx context.Context) error {
	ticker := time.NewTicker(udpInterval)
	defer ticker.Stop()
	log := a.cfg.Log.With("part", "udp")
	u := udpKeeper{pods: a.pods, datapath: a.datapath, told: make(map[string]string)}
	for {
		s, changed := a.store.Load()
		if s != nil {
			for name, err := range u.follow(ctx, s) {
				log.Error("UDP is not as it should be", "of", name, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
		}
	}
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

// udpKeeper brings the capture of UDP in line with snapshots.
type udpKeeper struct {
	pods     *pods
	datapath *kernel.Datapath

	peers    *dataplane.Snapshot // that the kernel's peers are of
	policies *dataplane.Snapshot // that rules are of
	rules    *authz.Set
	told     map[string]string // errors that were told, by whom they are of
}

// follow returns what went wrong and has not been told yet.
func (u *udpKeeper) follow(ctx context.Context, s *dataplane.Snapshot) map[string]error {
	failed := make(map[string]error)
	if u.peers != s {
		if err := u.datapath.SetPeers(udpPeers(s)); err != nil {
			failed["peers"] = err
		} else {
			u.peers = s
		}
	}
	if u.policies != s {
		u.policies, u.rules = s, authz.NewSet(s)
	}
	for _, pod := range u.pods.all() {
		w := s.Workload(pod.UID())
		if w == nil || !w.Enrolled {
			continue // it is released, or about to be: its capture ends with it
		}
		if err := u.pods.setUDP(pod, w, u.want(s, w)); err != nil {
			failed[w.Name.String()] = err
		}
	}
	if err := u.pods.republish(ctx); err != nil {
		failed["publication"] = err
	}
	maps.DeleteFunc(u.told, func(name string, _ string) bool { return failed[name] == nil })
	maps.DeleteFunc(failed, func(name string, err error) bool {
		known := u.told[name] == err.Error()
		u.told[name] = err.Error()
		return known
	})
	return failed
}

// want is how the pod's UDP is to be captured; nil leaves it alone.
func (u *udpKeeper) want(s *dataplane.Snapshot, w *dataplane.Workload) *kernel.UDPConfig {
	mode := dataplane.UDPDefault
	if ns := s.Namespace(w.Name.Namespace); ns != nil {
		mode = ns.UDP()
	}
	if mode == dataplane.UDPOff {
		return nil
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

// setUDP captures the pod's UDP, or leaves it alone when want is nil.
func (p *pods) setUDP(s *servedPod, w *dataplane.Workload, want *kernel.UDPConfig) error {
	s.udpMu.Lock()
	defer s.udpMu.Unlock()
	if want == nil {
		s.udp = nil
		s.endUDPLocked()
		return s.ReleaseUDP()
	}
	if s.udp == nil || s.udp.Strict != want.Strict || s.udp.Require != want.Require || !slices.Equal(s.udp.Clear, want.Clear) {
		if err := s.CaptureUDP(*want); err != nil {
			return err
		}
		s.udp = want
	}
	p.serveUDPLocked(s, w.Name)
	return nil
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
			s.datagrams = nil // followUDP tries again
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

// udpOf are those of the pods whose UDP is captured.
func (p *pods) udpOf(uids []string) []string {
	var udp []string
	for _, uid := range uids {
		if s := p.get(uid); s != nil && s.Datagrams() != nil {
			udp = append(udp, uid)
		}
	}
	return udp
}

// republish publishes again what was published last, when the UDP of other pods is captured now.
func (p *pods) republish(ctx context.Context) error {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	udp := p.udpOf(p.published)
	if p.published == nil || slices.Equal(udp, p.publishedUDP) {
		return nil
	}
	return p.publishLocked(ctx, p.published, udp)
}

func (p *pods) publishLocked(ctx context.Context, uids, udp []string) error {
	if err := p.publisher.PublishCaptured(ctx, uids, udp); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	p.published, p.publishedUDP = uids, udp
	return nil
}
