// Package samenode judges which connections between two pods of a node may go by the kernel
// alone, without tunnel and agent. It asks the packages that decide about connections through
// the agent (route at the source, authz at the destination), and adds what an operator demands
// to be encrypted. It is pure.
//
//	destination ─► route: equal options ─► each: here? in force? encrypted? policy? ─► Verdict
//
// What is not plainly decidable is left to the agent.
package samenode

import (
	"fmt"
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/route"
)

// Judge decides for one node by one snapshot. All fields but Mode are required.
type Judge struct {
	Node     string
	Mode     dataplane.SameNodeMode // of namespaces that say nothing
	Snapshot *dataplane.Snapshot
	// InForce reports whether everything that a pod of the node says and hears is captured.
	InForce func(uid string) bool
	// Rules is what policy says of a pod.
	Rules func(*dataplane.Workload) *authz.Rules
}

// Endpoint is a pod of the node and where it is reached.
type Endpoint struct {
	Workload *dataplane.Workload
	At       netip.AddrPort
}

// Verdict is what becomes of a pod's connections to a destination.
type Verdict struct {
	// Total is how many endpoints are equally good, wherever they are.
	Total int
	// Local are those of them that are reached by the kernel.
	Local []Endpoint
}

// Decide judges connections of source to destination.
func (j *Judge) Decide(source *dataplane.Workload, destination netip.AddrPort) Verdict {
	if j.Snapshot.Stale() || source.Node != j.Node || !j.InForce(source.UID) {
		return Verdict{}
	}
	options := route.Options(j.Snapshot, route.Flow{Source: source, Node: j.Node, Dst: destination})
	v := Verdict{Total: len(options)}
	for _, d := range options {
		if d.Action == route.Tunnel && j.Reaches(source, d.Workload, d.Target) == "" {
			v.Local = append(v.Local, Endpoint{Workload: d.Workload, At: d.Target})
		}
	}
	return v
}

// Reaches says why connections of source to a captured pod may not go by the kernel; "" when
// they may.
func (j *Judge) Reaches(source, destination *dataplane.Workload, at netip.AddrPort) string {
	switch {
	case source == destination:
		return "it is the pod itself"
	case source.Node != j.Node || destination.Node != j.Node:
		return fmt.Sprintf("%s is on node %s", destination.Name, destination.Node)
	case !j.InForce(source.UID):
		return fmt.Sprintf("the capture of %s is not complete", source.Name)
	case !j.InForce(destination.UID):
		return fmt.Sprintf("the capture of %s is not complete", destination.Name)
	}
	rules := j.Rules(destination)
	if why := j.encrypted(source, destination, rules, at.Port()); why != "" {
		return why
	}
	return denied(rules, source, at)
}

// denied asks for every address that the source may use: they are not told apart before it
// connects.
func denied(rules *authz.Rules, source *dataplane.Workload, at netip.AddrPort) string {
	asked := false
	for _, from := range source.Addrs {
		if from.Is4() != at.Addr().Is4() {
			continue
		}
		asked = true
		if v := rules.Evaluate(authz.Request{Peer: source.Identity, Source: from, Destination: at}); !v.Allowed {
			return v.Reason
		}
	}
	if !asked {
		return fmt.Sprintf("%s has no address of the destination's family", source.Name)
	}
	return ""
}

// Encrypted says why connections of source to a port of destination must be encrypted although
// both are on one node; "" when they need not.
func (j *Judge) Encrypted(source, destination *dataplane.Workload, port uint16) string {
	return j.encrypted(source, destination, j.Rules(destination), port)
}

func (j *Judge) encrypted(source, destination *dataplane.Workload, rules *authz.Rules, port uint16) string {
	for _, w := range []*dataplane.Workload{source, destination} {
		if mode, by := j.modeOf(w); mode == dataplane.SameNodeTunnel {
			return by + " demands tunnels on one node as well"
		}
	}
	by, strict := rules.Strict(port)
	if mode, _ := j.modeOf(destination); strict && mode != dataplane.SameNodeKernel {
		return fmt.Sprintf("PeerAuthentication %s is STRICT", by)
	}
	return ""
}

// modeOf is the mode of w's namespace, and who says so. A label that cannot be read counts as
// the one that is on the safe side.
func (j *Judge) modeOf(w *dataplane.Workload) (mode dataplane.SameNodeMode, by string) {
	if ns := j.Snapshot.Namespace(w.Name.Namespace); ns != nil {
		if value, ok := ns.Labels[dataplane.SameNodeLabel]; ok {
			mode := dataplane.SameNodeMode(value)
			if mode == dataplane.SameNodeDefault || mode.Validate() != nil {
				mode = dataplane.SameNodeTunnel
			}
			return mode, fmt.Sprintf("the label %s=%s of namespace %s", dataplane.SameNodeLabel, value, ns.Name)
		}
	}
	return j.Mode, "the mesh's configuration"
}

// Issues lists the namespaces whose label is no mode, with what it counts as.
func Issues(s *dataplane.Snapshot) []string {
	var issues []string
	for _, ns := range s.Namespaces() {
		value, ok := ns.Labels[dataplane.SameNodeLabel]
		if ok && (value == "" || dataplane.SameNodeMode(value).Validate() != nil) {
			issues = append(issues, fmt.Sprintf("namespace %s: label %s is %q, neither %s nor %s: it counts as %s",
				ns.Name, dataplane.SameNodeLabel, value, dataplane.SameNodeKernel, dataplane.SameNodeTunnel, dataplane.SameNodeTunnel))
		}
	}
	return issues
}
