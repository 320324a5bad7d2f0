package route

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// candidate is an endpoint that a flow may be sent to.
type candidate struct {
	endpoint   *dataplane.Endpoint
	target     netip.AddrPort
	workload   *dataplane.Workload // nil when the address is no known pod's
	alternates int                 // how many others could take its place
}

// decide is for the endpoint that was chosen.
func (c candidate) decide(s *dataplane.Snapshot, f Flow) Decision {
	if c.workload != nil {
		return decideWorkload(s, f, c.workload, c.target)
	}
	if c.endpoint.WorkloadUID != "" {
		return Decision{Action: Wait, Target: c.target, Reason: fmt.Sprintf("the pod at %s is not known yet", c.target.Addr())}
	}
	if svc := s.ServiceAt(c.target.Addr()); svc != nil { // in clear, whoever is behind it
		return Decision{Target: c.target, Reason: fmt.Sprintf("%s is the cluster IP of service %s, which can be no endpoint", c.target.Addr(), svc.Name)}
	}
	return decideAddress(s, c.target)
}

// candidates are the endpoints to choose from, or why there are none. The order of the
// steps is kube-proxy's: who may serve at all (ready, else serving while it terminates),
// restricted by the traffic policy, then preferred by trafficDistribution, which never
// leaves a flow without an endpoint.
func candidates(s *dataplane.Snapshot, f Flow, svc *dataplane.Service, port dataplane.ServicePort, policy dataplane.TrafficPolicy) ([]candidate, string) {
	if len(svc.Endpoints) == 0 {
		return nil, fmt.Sprintf("service %s has no endpoints", svc.Name)
	}
	reachable := addressable(s, f, svc, port)
	if len(reachable) == 0 {
		return nil, fmt.Sprintf("service %s has no %s endpoint for port %d", svc.Name, family(f.Dst.Addr()), port.Port)
	}
	restriction := ""
	if policy == dataplane.TrafficLocal {
		restriction = fmt.Sprintf(" on node %q, and its internalTrafficPolicy is Local", f.Node)
		reachable = keep(reachable, func(c candidate) bool { return f.Node != "" && c.endpoint.Node == f.Node })
		if len(reachable) == 0 {
			return nil, fmt.Sprintf("service %s has no endpoint%s", svc.Name, restriction)
		}
	}
	able := serving(svc, reachable)
	if len(able) == 0 {
		return nil, fmt.Sprintf("service %s has no ready endpoint%s", svc.Name, restriction)
	}
	untried := keep(able, func(c candidate) bool { return !f.tried(c.target) })
	if len(untried) == 0 {
		return nil, fmt.Sprintf("every endpoint of service %s was tried", svc.Name)
	}
	if f.UDP { // it is not to go in clear while there is a choice
		if takers := keep(untried, func(c candidate) bool { return c.workload != nil && c.workload.UDP }); len(takers) > 0 {
			untried = takers
		}
	}
	preferred := untried
	if policy != dataplane.TrafficLocal {
		preferred = prefer(s, f, svc.Distribution, untried)
	}
	for i := range preferred {
		preferred[i].alternates = len(untried) - 1
	}
	return preferred, ""
}

// choose is left to pick, unless the service wants its clients to keep to one endpoint. Then
// it is the endpoint that weighs most with the client's address (rendezvous hashing): agents
// agree on it without a word, and a client moves only when its endpoint goes.
func choose(f Flow, svc *dataplane.Service, choices []candidate, pick func(int) int) candidate {
	client, known := f.client()
	if !svc.SessionAffinity || !known {
		return choices[pick(len(choices))]
	}
	return slices.MaxFunc(choices, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(weight(client, a.target), weight(client, b.target)), a.target.Compare(b.target))
	})
}

// client is the source's address of the flow's family.
func (f Flow) client() (netip.Addr, bool) {
	if f.Source == nil {
		return netip.Addr{}, false
	}
	at := slices.IndexFunc(f.Source.Addrs, func(a netip.Addr) bool { return a.Is4() == f.Dst.Addr().Is4() })
	if at < 0 {
		return netip.Addr{}, false
	}
	return f.Source.Addrs[at], true
}

func weight(client netip.Addr, target netip.AddrPort) uint64 {
	var pair [16 + 16 + 2]byte
	from, to := client.As16(), target.Addr().As16()
	copy(pair[:], from[:])
	copy(pair[16:], to[:])
	binary.BigEndian.PutUint16(pair[32:], target.Port())
	sum := sha256.Sum256(pair[:]) // every agent's weights are the same, and even
	return binary.BigEndian.Uint64(sum[:])
}

// addressable keeps the endpoints of the flow's family that have the port.
func addressable(s *dataplane.Snapshot, f Flow, svc *dataplane.Service, port dataplane.ServicePort) []candidate {
	found := make([]candidate, 0, len(svc.Endpoints))
	for i := range svc.Endpoints {
		ep := &svc.Endpoints[i]
		addr := ep.Addr.Unmap()
		number, ok := ep.Ports[port.Name]
		if !ok || addr.Is4() != f.Dst.Addr().Is4() {
			continue
		}
		w, current := workloadOf(s, ep, addr)
		if !current {
			continue
		}
		found = append(found, candidate{endpoint: ep, target: netip.AddrPortFrom(addr, number), workload: w})
	}
	return found
}

// workloadOf returns the pod behind an endpoint, nil when none is known. An endpoint whose
// pod has finished, or whose address is another pod's by now, is not current: what was
// meant for the old pod must not reach the new one.
func workloadOf(s *dataplane.Snapshot, ep *dataplane.Endpoint, addr netip.Addr) (w *dataplane.Workload, current bool) {
	at := s.WorkloadAt(addr)
	if ep.WorkloadUID == "" {
		return at, true
	}
	named := s.Workload(ep.WorkloadUID)
	switch {
	case named == nil:
		return nil, at == nil
	case named == at, named.HostNetwork:
		return named, named.Live()
	}
	return nil, false
}

// serving keeps who may take a new connection: ready ones, or while there are none those
// that still serve as they terminate (KEP-1669).
func serving(svc *dataplane.Service, all []candidate) []candidate {
	if svc.PublishNotReady {
		return all
	}
	ready := keep(all, func(c candidate) bool { return c.endpoint.Ready })
	if len(ready) > 0 {
		return ready
	}
	return keep(all, func(c candidate) bool { return c.endpoint.Serving && c.endpoint.Terminating })
}

// prefer applies trafficDistribution (KEP-4444, KEP-3015): PreferSameNode falls back to the
// zone and then to all, PreferSameZone and its older name PreferClose to all.
func prefer(s *dataplane.Snapshot, f Flow, distribution dataplane.TrafficDistribution, all []candidate) []candidate {
	switch distribution {
	case dataplane.PreferSameNode:
		sameNode := keep(all, func(c candidate) bool { return f.Node != "" && c.endpoint.Node == f.Node })
		if len(sameNode) > 0 {
			return sameNode
		}
	case dataplane.PreferSameZone, dataplane.PreferClose:
	default:
		return all
	}
	zone := zoneOf(s, f.Node)
	sameZone := keep(all, func(c candidate) bool { return zone != "" && c.zone(s) == zone })
	if len(sameZone) > 0 {
		return sameZone
	}
	return all
}

func (c candidate) zone(s *dataplane.Snapshot) string {
	if c.endpoint.Zone != "" {
		return c.endpoint.Zone
	}
	return zoneOf(s, c.endpoint.Node)
}

func zoneOf(s *dataplane.Snapshot, node string) string {
	if n := s.Node(node); n != nil {
		return n.Zone
	}
	return ""
}

// keep returns all itself when every candidate is wanted, which is the common case.
func keep(all []candidate, want func(candidate) bool) []candidate {
	first := slices.IndexFunc(all, func(c candidate) bool { return !want(c) })
	if first < 0 {
		return all
	}
	kept := append(make([]candidate, 0, len(all)-1), all[:first]...)
	for _, c := range all[first+1:] {
		if want(c) {
			kept = append(kept, c)
		}
	}
	return kept
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}
