package explain

import (
	"fmt"
	"strings"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/authz"
)

// conclude sets the outcome, and the command that shows or changes what decided it.
func (e *explanation) conclude(p *path) {
	e.why.Outcome = p.outcome
	e.why.Next = e.next(p)
}

func (e *explanation) next(p *path) string {
	strict := p.verdict != nil && !p.verdict.Allowed && p.verdict.Kind == authz.KindAuthentication
	switch p.outcome {
	case admin.OutcomeTunnel, admin.OutcomeKernel:
		return "raceway connections -n " + e.src.Name.Namespace + e.agent(e.src)
	case admin.OutcomeUnknown:
		return e.nextCapture(e.src)
	case admin.OutcomeRefused:
		return e.nextRefused(p)
	case admin.OutcomeDenied:
		if strict && e.via != viaAgent {
			return e.nextEnrol(e.src)
		}
		return nextPolicy(p)
	}
	switch {
	case p.workload == e.src:
		return "raceway workloads -n " + e.src.Name.Namespace
	case e.via == viaNetwork:
		return e.nextEnrol(e.src)
	case e.via == viaUnclear:
		return e.nextCapture(e.src)
	case p.workload != nil:
		return e.nextEnrol(p.workload)
	}
	return "raceway flows -f" + e.agent(e.src)
}

// nextEnrol is what brings w into the mesh.
func (e *explanation) nextEnrol(w *dataplane.Workload) string {
	_, labelled := w.Labels[dataplane.ModeLabel]
	switch {
	case w.HostNetwork:
		return fmt.Sprintf("kubectl -n %s get pod %s -o yaml", w.Name.Namespace, w.Name.Name)
	case w.Enrolled:
		return e.nextCapture(w)
	case labelled:
		return fmt.Sprintf("kubectl -n %s label pod %s --overwrite %s=%s", w.Name.Namespace, w.Name.Name, dataplane.ModeLabel, dataplane.ModeAmbient)
	}
	return fmt.Sprintf("kubectl label namespace %s %s=%s", w.Name.Namespace, dataplane.ModeLabel, dataplane.ModeAmbient)
}

// nextCapture shows how far the capture of w has come.
func (e *explanation) nextCapture(w *dataplane.Workload) string {
	if w.Node == e.Node {
		if state, _ := e.Capture(w.UID); state == dataplane.CaptureFailed {
			return "raceway check"
		}
	}
	return "raceway workloads -n " + w.Name.Namespace + e.agent(w)
}

func (e *explanation) nextRefused(p *path) string {
	switch {
	case p.tunnel():
		return "raceway certificates"
	case e.dst.service != nil && !e.dst.hasPort():
		return fmt.Sprintf("kubectl -n %s get service %s -o yaml", e.dst.service.Name.Namespace, e.dst.service.Name.Name)
	case e.dst.service != nil:
		return fmt.Sprintf("kubectl -n %s get endpointslices -l kubernetes.io/service-name=%s", e.dst.service.Name.Namespace, e.dst.service.Name.Name)
	}
	return "kubectl get pods -A -o wide --field-selector status.podIP=" + e.dst.addr.Addr().String()
}

// nextPolicy shows what denied.
func nextPolicy(p *path) string {
	kind := strings.ToLower(string(p.verdict.Kind))
	if p.verdict.Policy == (dataplane.Name{}) {
		return "raceway policies -n " + p.workload.Name.Namespace
	}
	return fmt.Sprintf("kubectl -n %s get %s %s -o yaml", p.verdict.Policy.Namespace, kind, p.verdict.Policy.Name)
}

// agent is the flag that asks the agent of w's node.
func (e *explanation) agent(w *dataplane.Workload) string {
	if w.Node == e.Node || w.Node == "" {
		return ""
	}
	return " --agent " + w.Node
}
