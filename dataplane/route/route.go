// Package route decides where an enrolled pod's connection goes: (snapshot, flow) ->
// Decision. It is pure: no clock, no I/O, and the only chance in it is the caller's.
//
//	              ┌ port of a service's external IP, or of a node ───┐
//	              ├ cluster IP ─ port known? ─ endpoints ─ pick one ─┐
//	destination ──┤                                                  ├─► workload ─┬ captured     ─► Tunnel
//	              ├ pod IP ──────────────────────────────────────────┘             └ not captured ─► Passthrough
//	              ├ pod range, nobody known there ─► Wait
//	              └ anything else ────────────────► Passthrough
//
// A captured workload is reached through a tunnel or not at all: no rule here turns a
// tunnel into plaintext, so a failed tunnel can only be tried at another endpoint.
package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Action is what is to be done with a connection.
type Action int

// The zero Action refuses, so that a Decision nobody filled in lets nothing through.
const (
	// Refuse resets the connection; the reason says why.
	Refuse Action = iota
	// Tunnel opens an HBONE tunnel to Decision.Workload for Decision.Target.
	Tunnel
	// Passthrough dials Decision.Target in clear.
	Passthrough
	// Wait asks again once there is a newer snapshot, within a bound, and then refuses.
	Wait
)

var actions = [...]string{"refuse", "tunnel", "passthrough", "wait"}

func (a Action) String() string { return actions[a] }

// MarshalText makes the action a word in JSON and YAML.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Flow is a connection that an enrolled pod opens.
type Flow struct {
	// Source is the pod that opens it; nil when it is not known (then its network is the local one).
	Source *dataplane.Workload
	// Node is the source's node, for services that care where an endpoint is; "" takes Source's.
	Node string
	// Dst is the original destination; a v4-mapped address is unmapped.
	Dst netip.AddrPort
	// UDP says that it is of datagrams, which only some workloads take in tunnels.
	UDP bool
	// Exclude holds the targets that were tried for this connection already, so that
	// another one is chosen. Empty the first time.
	Exclude []netip.AddrPort
}

// Decision is where a flow goes.
type Decision struct {
	Action Action
	// Reason is one sentence for operators.
	Reason string
	// Target is the address to reach: for a service, the chosen endpoint and its target port.
	// It is zero when the flow ends before one is chosen.
	Target netip.AddrPort
	// Service is what the flow asked for, nil when its destination is no cluster IP.
	Service *dataplane.Service
	// Workload is the pod at Target, nil when it is not one. Workload.Identity is what it
	// must prove.
	Workload *dataplane.Workload
	// Alternates is how many other targets remain to be tried should this one fail: put
	// Target into Flow.Exclude and decide again.
	Alternates int
}

// Decide says where f goes. pick chooses one of n > 0 equal candidates by returning its
// index below n; nil picks at random. s may be nil: nothing is known yet.
func Decide(s *dataplane.Snapshot, f Flow, pick func(n int) int) Decision {
	if pick == nil {
		pick = rand.IntN
	}
	f.Dst = netip.AddrPortFrom(f.Dst.Addr().Unmap(), f.Dst.Port())
	if f.Node == "" && f.Source != nil {
		f.Node = f.Source.Node
	}
	switch {
	case !f.Dst.IsValid():
		return Decision{Reason: "the connection has no destination address"}
	case s == nil:
		return Decision{Action: Wait, Target: f.Dst, Reason: "the state of the cluster is not known yet"}
	}
	if svc := s.ServiceAt(f.Dst.Addr()); svc != nil && f.UDP {
		port, ok := svc.UDPPort(f.Dst.Port())
		if !ok {
			return Decision{Service: svc, Reason: fmt.Sprintf("service %s has no UDP port %d", svc.Name, f.Dst.Port())}
		}
		return decideService(s, f, svc, port, svc.InternalTraffic, pick)
	} else if svc != nil {
		port, ok := svc.Port(f.Dst.Port())
		if !ok {
			return Decision{Service: svc, Reason: fmt.Sprintf("service %s has no TCP port %d", svc.Name, f.Dst.Port())}
		}
		return decideService(s, f, svc, port, svc.InternalTraffic, pick)
	}
	if f.UDP { // services take it by their cluster IPs alone
		return decideTarget(s, f)
	}
	// What a service does not serve of an external address is somebody else's: another
	// service's, or the node's whose address it is.
	if svc := s.ServiceAtExternal(f.Dst); svc != nil {
		port, _ := svc.Port(f.Dst.Port())
		return decideService(s, f, svc, port, dataplane.TrafficCluster, pick) // as from node ports
	}
	if s.NodeAt(f.Dst.Addr()) != nil {
		if svc, port := s.ServiceAtNodePort(f.Dst.Port()); svc != nil {
			// externalTrafficPolicy is for those who come from outside: kube-proxy gives pods every endpoint.
			return decideService(s, f, svc, port, dataplane.TrafficCluster, pick)
		}
	}
	return decideTarget(s, f)
}

// decideTarget is for an address that leads to no service.
func decideTarget(s *dataplane.Snapshot, f Flow) Decision {
	if f.tried(f.Dst) {
		return Decision{Target: f.Dst, Workload: s.WorkloadAt(f.Dst.Addr()), Reason: fmt.Sprintf("%s was tried and there is no other address to try", f.Dst)}
	}
	if w := s.WorkloadAt(f.Dst.Addr()); w != nil {
		return decideWorkload(s, f, w, f.Dst)
	}
	return decideAddress(s, f.Dst)
}

// Options are the decisions that Decide picks from for f, when they are all alike to it: one
// for a pod's address, one for each endpoint of a cluster IP. There is none for a service whose
// clients keep to an endpoint, and for addresses that are not the cluster's own.
func Options(s *dataplane.Snapshot, f Flow) []Decision {
	f.Dst = netip.AddrPortFrom(f.Dst.Addr().Unmap(), f.Dst.Port())
	if f.Node == "" && f.Source != nil {
		f.Node = f.Source.Node
	}
	svc := s.ServiceAt(f.Dst.Addr())
	if svc == nil {
		w := s.WorkloadAt(f.Dst.Addr())
		if w == nil || s.NodeAt(f.Dst.Addr()) != nil || s.ServiceAtExternal(f.Dst) != nil {
			return nil
		}
		return []Decision{decideWorkload(s, f, w, f.Dst)}
	}
	port, ok := svc.Port(f.Dst.Port())
	if !ok || svc.SessionAffinity {
		return nil
	}
	choices, _ := candidates(s, f, svc, port, svc.InternalTraffic)
	options := make([]Decision, len(choices))
	for i, c := range choices {
		options[i] = c.decide(s, f)
		options[i].Service = svc
	}
	return options
}

func decideService(s *dataplane.Snapshot, f Flow, svc *dataplane.Service, port dataplane.ServicePort, policy dataplane.TrafficPolicy, pick func(int) int) Decision {
	choices, why := candidates(s, f, svc, port, policy)
	if len(choices) == 0 {
		return Decision{Service: svc, Reason: why}
	}
	chosen := choose(f, svc, choices, pick)
	d := chosen.decide(s, f)
	d.Service = svc
	d.Reason = fmt.Sprintf("service %s chose %s: %s", svc.Name, chosen.target, d.Reason)
	d.Alternates = chosen.alternates
	return d
}

// decideWorkload is for a target that is known to be w's.
func decideWorkload(s *dataplane.Snapshot, f Flow, w *dataplane.Workload, target netip.AddrPort) Decision {
	d := Decision{Target: target, Workload: w}
	switch {
	case w.HostNetwork:
		d.Action = Passthrough
		d.Reason = fmt.Sprintf("%s is on its node's own network, which is never captured", w.Name)
	case w.Network != f.network():
		d.Reason = fmt.Sprintf("%s is on the network %s and this pod on %s; connections between networks are not supported", w.Name, networkName(w.Network), networkName(f.network()))
	case w.Captured && dataplane.IsDataPlanePort(target.Port()):
		d.Reason = fmt.Sprintf("port %d of %s belongs to the data plane", target.Port(), w.Name)
	case w.Captured && f.UDP && !w.UDP:
		d.Action = Passthrough
		d.Reason = fmt.Sprintf("%s is captured, but its agent has not published that it takes UDP", w.Name)
	case w.Captured:
		d.Action = Tunnel
		d.Reason = w.Name.String() + " is captured"
	case w.Enrolled && s.Stale():
		d.Action = Wait
		d.Reason = fmt.Sprintf("%s is enrolled, and whether it is captured by now is not known", w.Name)
	case w.Enrolled:
		d.Action = Passthrough
		d.Reason = fmt.Sprintf("%s is enrolled, but the agent of node %q has not published it as captured", w.Name, w.Node)
	default:
		d.Action = Passthrough
		d.Reason = fmt.Sprintf("%s is not enrolled", w.Name)
	}
	return d
}

// decideAddress is for a target that is neither a service's nor a pod's.
func decideAddress(s *dataplane.Snapshot, target netip.AddrPort) Decision {
	d := Decision{Action: Passthrough, Target: target}
	if node := s.NodeAt(target.Addr()); node != nil {
		d.Reason = fmt.Sprintf("%s is an address of node %s", target.Addr(), node.Name)
		return d
	}
	if s.InPodCIDR(target.Addr()) {
		d.Action = Wait
		d.Reason = fmt.Sprintf("%s is in a pod range, but no pod with that address is known", target.Addr())
		return d
	}
	d.Reason = fmt.Sprintf("%s is outside the cluster", target.Addr())
	return d
}

func (f Flow) tried(target netip.AddrPort) bool { return slices.Contains(f.Exclude, target) }

func (f Flow) network() string {
	if f.Source == nil {
		return ""
	}
	return f.Source.Network
}

func networkName(network string) string {
	if network == "" {
		return "local"
	}
	return fmt.Sprintf("%q", network)
}
