package proxy

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane/route"
)

// KernelPath leads connections between captured pods of this node past the proxy.
type KernelPath interface {
	// Offer is told of each connection that a pod opened through the proxy, so that the next
	// one to the same destination need not come here. It returns the endpoints that are
	// reached by the kernel by now.
	Offer(uid string, destination netip.AddrPort) []netip.AddrPort
}

// leftToKernel are endpoints of q's service that the kernel serves, and that q is to be sent to
// only when others fail: connections that come here were meant for others, and all endpoints
// are to get as many.
func (s *servedPod) leftToKernel(q route.Flow) []netip.AddrPort {
	if s.cfg.KernelPath == nil {
		return nil
	}
	left := s.cfg.KernelPath.Offer(s.uid, q.Dst)
	if len(left) == 0 {
		return nil
	}
	q.Exclude = left
	if snapshot, _ := s.cfg.Store.Load(); route.Decide(snapshot, q, nil).Action == route.Refuse {
		return nil // there are no others
	}
	return left
}
