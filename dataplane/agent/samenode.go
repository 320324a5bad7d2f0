package agent

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/kernelpath"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

func (a *Agent) newKernelPath() (err error) {
	a.paths, err = kernelpath.New(kernelpath.Config{
		Node: a.cfg.Node, Mode: a.cfg.SameNode, Store: &a.store, Kernel: a.datapath, Telemetry: a.telemetry,
		Interval: a.cfg.FlowInterval, Log: a.cfg.Log.With("part", "same node"),
	})
	if err != nil {
		return err
	}
	a.lead(a.paths.Run)
	return nil
}

// offers stands between the proxy, which is there from the start, and the kernel's paths, which
// only the agent that has the node can keep.
type offers struct{ *Agent }

var _ proxy.KernelPath = offers{}

// Offer is proxy.KernelPath's.
func (o offers) Offer(uid string, destination netip.AddrPort) []netip.AddrPort {
	if o.paths == nil {
		return nil
	}
	return o.paths.Offer(uid, destination)
}

// sameNodeJudge is for explanations: what would be decided now.
func (a *Agent) sameNodeJudge(s *dataplane.Snapshot) *samenode.Judge {
	if s == nil || a.datapath.Direct() != nil {
		return nil
	}
	return &samenode.Judge{
		Node: a.cfg.Node, Mode: a.cfg.SameNode, Snapshot: s, InForce: a.datapath.InForce, Rules: authz.NewSet(s).Rules,
	}
}
