package telemetry

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Decision is what one policy decided about one connection.
type Decision struct {
	// Kind and Policy name what decided; both zero means that no policy restricts the workload.
	Kind    string // AuthorizationPolicy or PeerAuthentication
	Policy  dataplane.Name
	Allowed bool
	DryRun  bool
}

// PolicyCount is how often a policy allowed and denied, dry runs included.
type PolicyCount struct{ Allowed, Denied uint64 }

type policyKey struct {
	kind   string
	name   dataplane.Name
	dryRun bool
}

type policySeries struct {
	PolicyCount
	allowed, denied prometheus.Counter // nil before the first
	used            time.Time
}

// Decided counts a decision.
func (t *Telemetry) Decided(d Decision) {
	m := t.metrics
	key := policyKey{kind: d.Kind, name: d.Policy, dryRun: d.DryRun}
	now := time.Now()
	m.policyMu.Lock()
	defer m.policyMu.Unlock()
	s := m.policies[key]
	if s == nil {
		s = &policySeries{}
		m.policies[key] = s
		m.grown()
	}
	s.used = now
	count, counter, outcome := &s.Allowed, &s.allowed, "allow"
	if !d.Allowed {
		count, counter, outcome = &s.Denied, &s.denied, "deny"
	}
	if *counter == nil {
		*counter = m.decisions.WithLabelValues(key.values(outcome)...)
	}
	*count++
	(*counter).Inc()
}

func (k policyKey) values(outcome string) []string {
	kind, namespace, name := k.kind, k.name.Namespace, k.name.Name
	if kind == "" {
		kind, namespace, name = "none", "none", "none"
	}
	return []string{kind, namespace, name, outcome, strconv.FormatBool(k.dryRun)}
}

// PolicyCounts is what the policy of that kind and name decided since the start: in force,
// or in dry runs. One that went from the one to the other has both, which do not add up: a
// dry run denied nothing.
func (t *Telemetry) PolicyCounts(kind string, name dataplane.Name, dryRun bool) PolicyCount {
	t.metrics.policyMu.Lock()
	defer t.metrics.policyMu.Unlock()
	if s := t.metrics.policies[policyKey{kind: kind, name: name, dryRun: dryRun}]; s != nil {
		return s.PolicyCount
	}
	return PolicyCount{}
}

func (m *metrics) sweepPolicies(now time.Time, s *dataplane.Snapshot) {
	type policy struct {
		kind string
		name dataplane.Name
	}
	exists := map[policy]bool{{}: true}
	for _, p := range s.AuthorizationPolicies() {
		exists[policy{"AuthorizationPolicy", p.Name}] = true
	}
	for _, p := range s.PeerAuthentications() {
		exists[policy{"PeerAuthentication", p.Name}] = true
	}
	m.policyMu.Lock()
	defer m.policyMu.Unlock()
	for key, series := range m.policies {
		if exists[policy{key.kind, key.name}] || now.Sub(series.used) < m.cfg.StaleAfter {
			continue
		}
		delete(m.policies, key)
		m.decisions.DeleteLabelValues(key.values("allow")...)
		m.decisions.DeleteLabelValues(key.values("deny")...)
	}
}

// HandshakeFailed counts a TLS handshake that failed. cause is a short stable word.
func (t *Telemetry) HandshakeFailed(d Direction, cause string) {
	t.metrics.handshakes.WithLabelValues(string(d), cause).Inc()
}

// Repaired counts that a part of the capture was missing and was put back.
func (t *Telemetry) Repaired(part string) { t.metrics.repairs.WithLabelValues(part).Inc() }

// DatagramMoved counts a datagram of a flow of UDP that begins in that direction.
func (t *Telemetry) DatagramMoved(d Direction) { t.metrics.moved[d].Inc() }

// DatagramsDropped counts n that were not. cause is a short stable word.
func (t *Telemetry) DatagramsDropped(d Direction, cause string, n uint64) {
	t.metrics.dropped.WithLabelValues(string(d), cause).Add(float64(n))
}

// LimitReached counts that a limit bit. limit is a short stable word.
func (t *Telemetry) LimitReached(limit string) { t.metrics.limits.WithLabelValues(limit).Inc() }
