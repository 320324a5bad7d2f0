package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/route"
)

// maxPaths bounds how many endpoints of a service are compared.
const maxPaths = 64

// path is what becomes of a connection that takes one of the endpoints.
type path struct {
	outcome  string
	result   string // of the route step
	reason   string
	target   netip.AddrPort
	workload *dataplane.Workload // nil when the target is not a pod's
	verdict  *authz.Verdict      // nil when no policy is enforced there
	// encrypted says why it is a tunnel although both ends are on this node.
	encrypted string
}

func (p *path) tunnel() bool { return p.result == admin.OutcomeTunnel }

// paths holds one path for each endpoint that may be chosen, at least one.
func (e *explanation) paths() []path {
	n := 1
	first := e.path(func(candidates int) int {
		n = candidates
		return 0
	})
	paths := []path{first}
	for i := 1; i < min(n, maxPaths); i++ {
		paths = append(paths, e.path(func(int) int { return i }))
	}
	return paths
}

func (e *explanation) path(pick func(int) int) path {
	if !e.dst.addr.IsValid() {
		return path{
			outcome: admin.OutcomeRefused, result: "no address",
			reason: fmt.Sprintf("the name of service %s stands for no address while no endpoint is ready", e.dst.service.Name),
		}
	}
	if e.dst.addr.Addr().IsLoopback() || slices.Contains(e.src.Addrs, e.dst.addr.Addr()) {
		return path{
			outcome: admin.OutcomePlain, result: admin.OutcomePlain, target: e.dst.addr, workload: e.src,
			reason: "a pod's connection to itself never leaves it and is never redirected",
		}
	}
	d := route.Decide(e.Snapshot, route.Flow{Source: e.src, Node: e.src.Node, Dst: e.dst.addr}, pick)
	p := path{reason: d.Reason, target: d.Target, workload: d.Workload}
	switch {
	case e.via == viaNetwork && d.Target.IsValid():
		// The cluster's own load balancing chooses by the same rules; whether it could
		// be tunnelled is not asked.
		p.result = admin.OutcomePlain
		p.reason = "the source is not captured, so its packets go as they are"
		if d.Service != nil {
			p.reason += fmt.Sprintf(", to an endpoint of service %s such as %s", d.Service.Name, d.Target)
		}
	case d.Action == route.Tunnel:
		p.result = admin.OutcomeTunnel
	case d.Action == route.Passthrough:
		p.result = admin.OutcomePlain
	case d.Action == route.Wait:
		p.result = "wait"
		p.reason += "; the agent waits for it within a bound and then refuses"
	default:
		p.result = admin.OutcomeRefused
	}
	p.outcome = e.outcome(&p)
	if p.outcome == admin.OutcomeTunnel && e.onOneNode(&p) {
		if p.encrypted = e.whyEncrypted(&p); p.encrypted == "" {
			p.outcome = admin.OutcomeKernel
		}
	}
	return p
}

// outcome judges p and, where it reaches a captured pod, fills in the verdict there.
func (e *explanation) outcome(p *path) string {
	if p.result == admin.OutcomeRefused || p.result == "wait" {
		return admin.OutcomeRefused
	}
	if e.enforced(p.workload) {
		p.verdict = e.verdict(p, e.peer(p))
	}
	switch {
	case e.via == viaUnclear:
		return e.unclear(p)
	case p.verdict != nil && !p.verdict.Allowed:
		return admin.OutcomeDenied
	case p.tunnel() && e.certificateError() != nil:
		return admin.OutcomeRefused
	}
	return p.result
}

// unclear is the outcome while the source's capture is under way: known only when it is the
// same with capture and without.
func (e *explanation) unclear(p *path) string {
	if p.verdict == nil && p.result == admin.OutcomePlain {
		return admin.OutcomePlain
	}
	if p.verdict != nil && !p.verdict.Allowed && !e.verdict(p, spiffe.ID{}).Allowed {
		return admin.OutcomeDenied
	}
	return admin.OutcomeUnknown
}

// enforced reports whether an agent judges what reaches w.
func (e *explanation) enforced(w *dataplane.Workload) bool {
	if w == nil || w == e.src {
		return false
	}
	if w.Node == e.Node {
		if state, _ := e.Capture(w.UID); state == dataplane.CaptureInForce {
			return true
		}
	}
	return w.Captured
}

// peer is the identity that the destination sees.
func (e *explanation) peer(p *path) spiffe.ID {
	if p.tunnel() {
		return e.src.Identity
	}
	return spiffe.ID{}
}

func (e *explanation) verdict(p *path, peer spiffe.ID) *authz.Verdict {
	v := authz.Compile(e.Snapshot, p.workload).Evaluate(authz.Request{
		Peer: peer, Source: e.sourceAddr(p.target.Addr()), Destination: p.target,
	})
	return &v
}

// certificateError is about the source; only its own node's agent knows.
func (e *explanation) certificateError() error {
	if e.Certificate == nil || e.src.Node != e.Node {
		return nil
	}
	return e.Certificate(e.src.Identity)
}

func (e *explanation) explainRoute(p *path) {
	result := p.result
	if e.via == viaUnclear && p.tunnel() {
		result = "tunnel, once the source is captured"
	}
	e.step("route", result, p.reason)
}

func (e *explanation) explainIdentity(p *path) {
	if p.workload != nil {
		e.why.DestID = p.workload.Identity
	}
	switch {
	case p.tunnel() && e.via == viaAgent && e.certificateError() != nil:
		e.step("identity", "no certificate", fmt.Sprintf("%s: %v", e.src.Identity, e.certificateError()))
	case p.outcome == admin.OutcomeKernel:
		e.step("identity", "by the node", e.src.Identity.String()+" to "+p.workload.Identity.String()+", as the agent knows both pods' network namespaces")
	case p.tunnel():
		e.step("identity", "mutual TLS", e.src.Identity.String()+" to "+p.workload.Identity.String())
	case p.result == admin.OutcomePlain:
		e.step("identity", "none", "a plain connection proves no identity")
	}
}

func (e *explanation) explainPolicy(p *path) {
	switch {
	case p.result != admin.OutcomeTunnel && p.result != admin.OutcomePlain:
		return
	case p.workload == nil:
		e.step("policy", "none", "the destination is not a pod of the mesh, so no policy applies to it")
		return
	case p.workload == e.src:
		e.step("policy", "none", "a pod's connection to itself is not judged")
		return
	case p.verdict == nil:
		e.step("policy", "not enforced", fmt.Sprintf("%s is not captured, so no policy is enforced there", p.workload.Name))
		return
	}
	v := p.verdict
	result := "denied"
	if v.Allowed {
		result = "allowed"
	}
	e.why.Policy = policyName(v.Policy, v.Rule)
	e.step("policy", result, v.Reason)
	for _, d := range v.DryRun {
		result := "would allow"
		if d.WouldDeny {
			result = "would deny"
		}
		matched := "no rule of it matches"
		if d.Rule >= 0 {
			matched = "rule " + strconv.Itoa(d.Rule) + " matches"
		}
		e.step("dry run", result, fmt.Sprintf("AuthorizationPolicy %s: %s; it is not in force", d.Policy, matched))
	}
}

// policyName is "namespace/name rule 0", as connections and flows say it.
func policyName(n dataplane.Name, rule int) string {
	switch {
	case n == dataplane.Name{}:
		return ""
	case rule < 0:
		return n.String()
	}
	return n.String() + " rule " + strconv.Itoa(rule)
}

// explainOthers says when the answer depends on the endpoint that is chosen.
func (e *explanation) explainOthers(paths []path) {
	var differ []string
	for i := range paths[1:] {
		if p := &paths[i+1]; p.outcome != paths[0].outcome {
			differ = append(differ, fmt.Sprintf("%s is %s", p.name(), p.outcome))
		}
	}
	if len(differ) > 0 {
		e.step("endpoints", "differ", fmt.Sprintf("this is about %s, but %s", paths[0].name(), strings.Join(differ, ", ")))
	}
}

func (p *path) name() string {
	if p.workload != nil {
		return p.workload.Name.String()
	}
	return p.target.String()
}
