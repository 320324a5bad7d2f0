// Package authz evaluates Istio's AuthorizationPolicy and PeerAuthentication at L4, with
// the semantics of ztunnel. It is pure.
//
//	request ─► PeerAuthentication STRICT and no identity? ── yes ─► denied
//	              │ no
//	              ▼
//	           a DENY (or CUSTOM) rule matches? ──────────── yes ─► denied
//	              │ no
//	              ▼
//	           no ALLOW policy, or one of its rules matches? yes ─► allowed
//	              │ no
//	              ▼
//	            denied
//
// What cannot be judged at L4 is judged so that nothing passes that the author of the policy
// meant to stop: an L7 attribute in a DENY rule is left out, so that the rule matches more;
// in an ALLOW rule it makes the rule match nothing. CUSTOM is a DENY of what it matches. A
// policy that could not be read denies all that it selects, or, when it allows, allows
// nothing. Issues reports each of them.
//
// A negative match (notPrincipals, notNamespaces…) holds for a peer without an identity, as
// in Istio: a DENY of notPrincipals denies it, an ALLOW of notPrincipals alone allows it.
package authz

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// Request is a connection that asks to reach a workload.
type Request struct {
	// Peer is the identity that its certificate proved; zero for plaintext.
	Peer spiffe.ID
	// Source is the address that the connection, or its tunnel, came from.
	Source netip.Addr
	// Destination is the workload's address and the port asked for.
	Destination netip.AddrPort
}

// Kind says which kind of object decided.
type Kind string

// Kinds of deciding object; the empty Kind is none: nothing restricts the workload.
const (
	KindAuthorization  Kind = "AuthorizationPolicy"
	KindAuthentication Kind = "PeerAuthentication"
)

// Verdict is the outcome for one request. The zero Verdict denies.
type Verdict struct {
	Allowed bool
	// Kind and Policy name what decided; both are zero when nothing restricts the workload.
	// When ALLOW policies exist and none matches it is the first of them, and the Reason
	// names the others.
	Kind   Kind
	Policy dataplane.Name
	// Rule is the index of the deciding rule, -1 when no single rule decided.
	Rule int
	// Reason is one sentence for operators.
	Reason string
	// DryRun says what each dry-run policy would have done. It is nil after a refusal by
	// PeerAuthentication, which comes before all policies.
	DryRun []DryRun
}

// DryRun is what one dry-run policy, alone and beside the policies in force, would have done.
type DryRun struct {
	Policy dataplane.Name
	// Rule is the index of its rule that matched, -1 when none did.
	Rule int
	// WouldDeny says that with it in force the request would have been denied: by a DENY that
	// matches, or by an ALLOW that does not when no ALLOW in force matches either.
	WouldDeny bool
}

// Set holds the policies of one snapshot. Each policy and each workload is compiled once,
// when it is first asked for. It is safe for concurrent use.
type Set struct {
	snapshot *dataplane.Snapshot
	mu       sync.Mutex
	policies []*policy         // by index in the snapshot, nil until it is needed
	rules    map[string]*Rules // by workload UID
}

// NewSet makes the Set of s.
func NewSet(s *dataplane.Snapshot) *Set {
	return &Set{snapshot: s, policies: make([]*policy, len(s.AuthorizationPolicies())), rules: make(map[string]*Rules)}
}

// Rules returns what applies to w, a workload of the Set's snapshot.
func (set *Set) Rules(w *dataplane.Workload) *Rules {
	set.mu.Lock()
	defer set.mu.Unlock()
	rules := set.rules[w.UID]
	if rules == nil {
		rules = set.compileLocked(w)
		set.rules[w.UID] = rules
	}
	return rules
}

// Compile returns what applies to w in s. Whoever asks for many workloads of one snapshot
// shares the work with a Set.
func Compile(s *dataplane.Snapshot, w *dataplane.Workload) *Rules {
	return NewSet(s).Rules(w)
}

// Rules is what applies to one workload. It is immutable.
type Rules struct {
	strict  strictness
	deny    index
	allow   index
	allowed Verdict // of a request that no policy denies, when no ALLOW policy applies
	refused Verdict // of a request that no ALLOW rule matches; without the request's details
	// restricted says that an ALLOW policy applies.
	restricted bool
	dryRun     []*policy
}

// Strict names the PeerAuthentication that demands mutual TLS of connections to the port, if
// one does.
func (rules *Rules) Strict(port uint16) (by dataplane.Name, strict bool) {
	p := rules.strict.at(port)
	if p == nil {
		return dataplane.Name{}, false
	}
	return p.Name, true
}

// Evaluate decides r. It allocates only for a denial's reason and for dry-run policies.
func (rules *Rules) Evaluate(r Request) Verdict {
	r.Source = r.Source.Unmap().WithZone("")
	r.Destination = netip.AddrPortFrom(r.Destination.Addr().Unmap().WithZone(""), r.Destination.Port())
	if by := rules.strict.at(r.Destination.Port()); by != nil && r.Peer.IsZero() {
		return Verdict{
			Kind: KindAuthentication, Policy: by.Name, Rule: -1,
			Reason: fmt.Sprintf("PeerAuthentication %s is STRICT%s, and %s has no identity", by.Name, invalidity(by.Invalid), r),
		}
	}
	denying := rules.deny.first(r)
	allowing := rules.allow.first(r)
	v := rules.verdict(r, denying, allowing)
	if len(rules.dryRun) > 0 {
		v.DryRun = rules.dryRuns(r, allowing != nil)
	}
	return v
}

func (rules *Rules) verdict(r Request, denying, allowing *rule) Verdict {
	switch {
	case denying != nil:
		return Verdict{
			Kind: KindAuthorization, Policy: denying.policy.name, Rule: denying.index,
			Reason: fmt.Sprintf("%s denies %s", denying.title, r),
		}
	case allowing != nil:
		return Verdict{Allowed: true, Kind: KindAuthorization, Policy: allowing.policy.name, Rule: allowing.index, Reason: allowing.title}
	case rules.restricted:
		v := rules.refused
		v.Reason += r.String()
		return v
	}
	return rules.allowed
}

func (rules *Rules) dryRuns(r Request, allowed bool) []DryRun {
	results := make([]DryRun, 0, len(rules.dryRun))
	for _, p := range rules.dryRun {
		result := DryRun{Policy: p.name, Rule: -1}
		if matched := p.first(r); matched != nil {
			result.Rule = matched.index
		}
		matched := result.Rule >= 0
		result.WouldDeny = p.denies && matched || !p.denies && !matched && !allowed
		results = append(results, result)
	}
	return results
}

// String describes the request in a verdict's reason.
func (r Request) String() string {
	peer := "a peer without identity"
	if !r.Peer.IsZero() {
		peer = r.Peer.String()
	}
	return fmt.Sprintf("%s from %s to %s", peer, r.Source, r.Destination)
}

func invalidity(cause string) string {
	if cause == "" {
		return ""
	}
	return " because it could not be read (" + strings.TrimSuffix(cause, ".") + ")"
}
