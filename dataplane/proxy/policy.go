package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
)

// guarded is what policy knows of an inbound connection.
type guarded struct {
	request authz.Request

	mu       sync.Mutex
	decided  bool
	snapshot *dataplane.Snapshot     // of the last evaluation
	dryRun   map[dataplane.Name]bool // dry-run policies that would deny it, as counted
}

// deniedError is a connection that policy refused or cut.
type deniedError struct{ cause string }

func (e *deniedError) Error() string { return e.cause }

// denial says which policy and rule decided.
func denial(deed string, v authz.Verdict) *deniedError {
	if v.Kind == "" {
		return &deniedError{cause: fmt.Sprintf("%s: %s", deed, v.Reason)}
	}
	return &deniedError{cause: fmt.Sprintf("%s: %s: %s", deed, policyText(v), v.Reason)}
}

// policyText is "namespace/name rule 0", and "" when no policy decided.
func policyText(v authz.Verdict) string {
	switch {
	case v.Kind == "":
		return ""
	case v.Rule < 0:
		return v.Policy.String()
	}
	return v.Policy.String() + " rule " + strconv.Itoa(v.Rule)
}

// authorize decides an inbound connection for the first time. It is among the live flows
// already, so a snapshot that comes meanwhile decides it again.
func (s *servedPod) authorize(f *flow) error {
	g := f.guarded
	g.mu.Lock() // first, so that recheck of a newer snapshot waits for this decision or precedes it
	defer g.mu.Unlock()
	snapshot, now, last := s.workload()
	if snapshot == nil {
		return errNotServed
	}
	if now == nil {
		now = last
	}
	v := s.rulesFor(snapshot, now).Evaluate(g.request)
	g.decided, g.snapshot = true, snapshot
	s.count(v)
	g.countDryRun(v, s.cfg.Telemetry.Decided)
	f.attempt.Policy = policyText(v)
	if !v.Allowed {
		return denial("policy denied", v)
	}
	return nil
}

func (s *servedPod) count(v authz.Verdict) {
	s.cfg.Telemetry.Decided(telemetry.Decision{Kind: string(v.Kind), Policy: v.Policy, Allowed: v.Allowed})
}

// countDryRun counts what dry-run policies would do, once for each time that one changes
// its mind about the connection.
func (g *guarded) countDryRun(v authz.Verdict, count func(telemetry.Decision)) {
	before := g.dryRun
	if len(v.DryRun) == 0 {
		g.dryRun = nil
		return
	}
	g.dryRun = make(map[dataplane.Name]bool, len(v.DryRun))
	for _, d := range v.DryRun {
		g.dryRun[d.Policy] = d.WouldDeny
		if denied, counted := before[d.Policy]; !counted || denied != d.WouldDeny {
			count(telemetry.Decision{Kind: string(authz.KindAuthorization), Policy: d.Policy, Allowed: !d.WouldDeny, DryRun: true})
		}
	}
}

// followPolicy decides live inbound connections again with each new snapshot and cuts those
// that are denied now.
func (p *Proxy) followPolicy(ctx context.Context) {
	for {
		snapshot, changed := p.cfg.Store.Load()
		if snapshot != nil {
			for _, s := range p.all() {
				s.recheck(snapshot)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *servedPod) recheck(snapshot *dataplane.Snapshot) {
	w := snapshot.Workload(s.uid)
	if w == nil {
		return // it vanished: what lives ends with its enrolment
	}
	flows := s.liveFlows()
	if len(flows) == 0 {
		return
	}
	rules := s.rulesFor(snapshot, w)
	for _, f := range flows {
		if f.guarded == nil {
			continue
		}
		if err := s.recheckFlow(f.guarded, snapshot, rules); err != nil {
			s.cut(f, err)
		}
	}
}

func (s *servedPod) recheckFlow(g *guarded, snapshot *dataplane.Snapshot, rules *authz.Rules) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	current, _ := s.cfg.Store.Load()
	if !g.decided || g.snapshot == snapshot || current != snapshot {
		return nil // authorize will use this snapshot, or has; or a newer one is next
	}
	g.snapshot = snapshot
	v := rules.Evaluate(g.request)
	g.countDryRun(v, s.cfg.Telemetry.Decided)
	if v.Allowed {
		return nil
	}
	s.count(v)
	return denial("policy changed", v)
}

// followTrust looks at every pod whenever trust or revocations changed.
func (p *Proxy) followTrust(ctx context.Context) {
	changed := p.cfg.Certs.Changed()
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		changed = p.cfg.Certs.Changed() // before the look, so that no change falls between
		for _, s := range p.all() {
			s.recheckTrust()
		}
	}
}

// recheckTrust cuts live tunnels whose certificate was revoked, and lets new streams start
// on connections that are verified against the trust of the day.
func (s *servedPod) recheckTrust() {
	s.retireTunnels()
	s.server.Retire(func(state tls.ConnectionState) bool { return s.cfg.Certs.Distrusted(state) != nil })
	for _, f := range s.liveFlows() {
		if conn := f.tunnelConn(s); conn != nil {
			if err := s.revoked(conn); err != nil {
				s.cut(f, err)
			}
		}
	}
}

func (s *servedPod) revoked(conn *hbone.Conn) error {
	if err := s.cfg.Certs.Revoked(conn.TLS); err != nil {
		return &deniedError{cause: "certificate revoked: " + err.Error()}
	}
	return nil
}

// setTunnel notes which tunnel connection carries an outbound flow.
func (f *flow) setTunnel(s *servedPod, conn *hbone.Conn) {
	f.attempt.Socket = tcpOf(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	f.tunnel = conn
}

func (f *flow) tunnelConn(s *servedPod) *hbone.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.tunnel
}

// tcpOf is the socket of a tunnel connection, for its facts; nil when it is not one.
func tcpOf(conn *hbone.Conn) syscall.Conn {
	if tcp, ok := conn.Raw.(*net.TCPConn); ok {
		return tcp
	}
	return nil
}
