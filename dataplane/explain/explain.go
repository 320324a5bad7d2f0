// Package explain answers `raceway why SRC DST:PORT`: what would become of a connection
// now, and why. It asks the same packages that decide about real connections (route at the
// source, authz at the destination) and puts their answers into words. It is pure.
//
//	capture ──► resolve ──► route ──► identity ──► policy ──► outcome, next command
package explain

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

// Question is what Explain is asked, and by whom.
type Question struct {
	// Snapshot is the cluster as the agent sees it, nil before its first complete view.
	Snapshot *dataplane.Snapshot
	// Node is the node of the agent that answers.
	Node string
	// Capture is the state of a pod of Node, and the reason for it. Required.
	Capture func(uid string) (dataplane.CaptureState, string)
	// Certificate reports why a pod of Node has no valid certificate, nil when it has one.
	// A nil func leaves the question out.
	Certificate func(spiffe.ID) error
	// SameNode judges whether connections between pods of Node go by the kernel alone. nil
	// when none do.
	SameNode *samenode.Judge

	// Source is a pod: its name, namespace/name, deploy/name (or another kind of owner, or
	// pod), namespace/deploy/name, or its IP address.
	Source string
	// Destination is host:port. The host is a service as the source would call it (db,
	// db.shop, db.shop.svc.cluster.local), or namespace/name of a service or pod, or any
	// form of Source, or an IP address. The port is a number or a service port's name.
	Destination string
	// From is the namespace where a source without one is looked up, "" for all.
	From string
}

// Explain returns an *admin.Error when a name is unknown, ambiguous or cannot be read.
func Explain(q Question) (admin.Why, error) {
	if q.Snapshot == nil {
		return admin.Why{}, admin.NotReady("the agent has no complete view of the cluster yet: try again in a moment, and look at its log if it stays so")
	}
	src, err := q.source()
	if err != nil {
		return admin.Why{}, err
	}
	dst, err := q.destination(src)
	if err != nil {
		return admin.Why{}, err
	}
	e := &explanation{Question: q, src: src, dst: dst}
	e.why.Node, e.why.SourceNode = q.Node, src.Node
	e.why.Source = src.Name.String()
	e.why.Destination = dst.String()
	e.why.SourceID = src.Identity

	e.explainCapture()
	e.explainResolve()
	paths := e.paths()
	first := &paths[0]
	e.explainRoute(first)
	e.explainSameNode(first)
	e.explainIdentity(first)
	e.explainPolicy(first)
	e.explainOthers(paths)
	e.conclude(first)
	return e.why, nil
}

// explanation is one answer in the making.
type explanation struct {
	Question
	src *dataplane.Workload
	dst destination
	via via
	why admin.Why
}

// via says who carries what the source sends.
type via int

const (
	viaNetwork via = iota // the pod's own stack: the source is not captured
	viaAgent              // the agent's proxy: the source is captured
	viaUnclear            // its capture is under way, or cannot be seen from here
)

func (e *explanation) step(step, result, detail string) {
	e.why.Steps = append(e.why.Steps, admin.WhyStep{Step: step, Result: result, Detail: detail})
}

func (e *explanation) explainCapture() {
	result, detail := "", ""
	e.via, result, detail = e.captureOf(e.src)
	e.step("capture", result, detail)
}

// captureOf is how far the capture of w is: from this agent's own pods at first hand, from
// those of others as their agents published it.
func (e *explanation) captureOf(w *dataplane.Workload) (via, string, string) {
	local := w.Node == e.Node
	state, reason := dataplane.CaptureNone, ""
	if local {
		state, reason = e.Capture(w.UID)
	}
	switch {
	case local && state == dataplane.CaptureInForce:
		return viaAgent, "captured", "on this node, " + w.Node
	case local && state == dataplane.CaptureFailed:
		return viaUnclear, "failed", orElse(reason, "the agent's log says why") + "; the agent tries again"
	case local && state == dataplane.CapturePending:
		return viaUnclear, "pending", orElse(reason, "enrolment is under way")
	case local && state == dataplane.CaptureReleasing:
		return viaNetwork, "releasing", "new connections are plain, earlier ones drain through the agent"
	case !local && w.Captured:
		return viaAgent, "captured", "as the agent of node " + w.Node + " published"
	case w.Enrolled && local:
		return viaUnclear, "pending", "its labels ask for capture, and the agent has not begun"
	case w.Enrolled:
		return viaUnclear, "pending", "its labels ask for capture, and the agent of node " + w.Node + " has not published it as captured"
	}
	return viaNetwork, "not captured", e.notEnrolled(w)
}

// notEnrolled says why w is none of ours, as Snapshot decides it.
func (e *explanation) notEnrolled(w *dataplane.Workload) string {
	mode, labelled := w.Labels[dataplane.ModeLabel]
	switch {
	case w.HostNetwork:
		return "it uses the node's network (hostNetwork), which is never captured"
	case labelled && mode == dataplane.ModeNone:
		return "its label " + dataplane.ModeLabel + "=" + mode + " opts out"
	case labelled:
		return "its label " + dataplane.ModeLabel + " is " + quoted(mode) + ", neither " + dataplane.ModeAmbient + " nor " + dataplane.ModeNone
	case e.Snapshot.Namespace(w.Name.Namespace) == nil:
		return "its namespace " + w.Name.Namespace + " is not known to the agent"
	}
	return "neither it nor namespace " + w.Name.Namespace + " has the label " + dataplane.ModeLabel + "=" + dataplane.ModeAmbient
}

func (e *explanation) explainResolve() {
	result, detail := e.dst.addr.String(), e.dst.detail
	if s := e.dst.service; s != nil {
		result = "service " + s.Name.String() + " at " + e.dst.addr.String()
		if !e.dst.addr.IsValid() {
			result = "service " + s.Name.String()
		}
	} else if w := e.dst.workload; w != nil {
		result = "pod " + w.Name.String() + " at " + e.dst.addr.String()
	}
	e.step("resolve", result, detail)
}

// sourceAddr is the address that the source has in the family of to.
func (e *explanation) sourceAddr(to netip.Addr) netip.Addr {
	for _, a := range e.src.Addrs {
		if a.Is4() == to.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
