package explain

import (
	"slices"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

// onOneNode reports whether p is between two pods of the agent's node that might talk by the
// kernel alone.
func (e *explanation) onOneNode(p *path) bool {
	return e.SameNode != nil && e.via == viaAgent && e.src.Node == e.Node && p.workload != nil && p.workload.Node == e.Node
}

// whyEncrypted says why p takes a tunnel all the same; "" when it does not.
func (e *explanation) whyEncrypted(p *path) string {
	if why := e.SameNode.Reaches(e.src, p.workload, p.target); why != "" {
		return why
	}
	decided := e.SameNode.Decide(e.src, e.dst.addr)
	if slices.Contains(decided.Local, samenode.Endpoint{Workload: p.workload, At: p.target}) {
		return ""
	}
	return "the agent chooses the endpoint: by session affinity, or because the address is not a cluster IP"
}

func (e *explanation) explainSameNode(p *path) {
	switch {
	case p.outcome == admin.OutcomeKernel:
		e.step("same node", "kernel", "both pods are on node "+e.Node+": by the kernel alone, unencrypted, from the second connection on")
	case p.encrypted != "":
		e.step("same node", "tunnel", p.encrypted)
	}
}
