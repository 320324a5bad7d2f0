package object

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// serviceNameLabel on an EndpointSlice names its service.
const serviceNameLabel = "kubernetes.io/service-name"

// view is a Set while its Contents are made: what depends on more than one object.
type view struct {
	set       *Set
	uids      map[dataplane.Name]string // of pods that do not go by their own
	slices    map[dataplane.Name][]endpointSlice
	pods      map[string][]pod    // by namespace; nil until asked for
	reserved  map[netip.Addr]bool // pod and cluster IPs; nil until asked for
	balanced  map[netip.Addr]bool // addresses of load balancers; as reserved
	conflicts []Conflict
}

func newView(s *Set) *view {
	v := &view{set: s, slices: make(map[dataplane.Name][]endpointSlice)}
	if s.twice > 0 {
		v.tellApart()
	}
	return v
}

// tellApart settles the UIDs of pods. Two pods with one UID (a copied YAML file) would share
// one status and one capture; the later by name gets a UID of its own, the same on every node.
func (v *view) tellApart() {
	v.uids = make(map[dataplane.Name]string)
	owners := make(map[string]Key)
	for _, e := range v.set.kinds[KindPod].ordered() {
		p, key := e.value.(pod), Key{Kind: KindPod, Name: e.name}
		uid := p.UID
		if other, taken := owners[uid]; taken {
			uid = derivedUID(key.Name)
			v.uids[key.Name] = uid
			v.conflicts = append(v.conflicts, Conflict{Key: key, Cause: fmt.Sprintf(
				"has the UID %s of %s: it goes by %s until it gets its own or none", p.UID, other, uid)})
		}
		owners[uid] = key
	}
}

// uid is what the pod goes by.
func (v *view) uid(p *pod) string {
	if uid, other := v.uids[p.Name]; other {
		return uid
	}
	return p.UID
}

// external are the addresses outside the cluster at which the service is reached. Whoever may
// write a Service could otherwise draw another's traffic to it (CVE-2020-8554).
func (v *view) external(s service) []netip.Addr {
	if len(s.balanced)+len(s.external) == 0 {
		return nil
	}
	v.reserve()
	var out []netip.Addr
	for _, a := range slices.Concat(s.balanced, s.external) {
		switch {
		case v.reserved[a]:
			v.refuse(s, a, "a pod's or a service's own")
		case v.balanced[a] && !slices.Contains(s.balanced, a):
			v.refuse(s, a, "a load balancer's for another service")
		default:
			out = appendAddr(out, a)
		}
	}
	return out
}

func (v *view) refuse(s service, a netip.Addr, whose string) {
	v.conflicts = append(v.conflicts, Conflict{
		Key:   Key{Kind: KindService, Name: s.Name},
		Cause: fmt.Sprintf("external address %s is %s: ignored", a, whose),
	})
}

// reserve collects what no external IP may claim.
func (v *view) reserve() {
	if v.reserved == nil {
		v.reserved, v.balanced = make(map[netip.Addr]bool), make(map[netip.Addr]bool)
		for _, e := range v.set.kinds[KindPod].ordered() {
			if p := e.value.(pod); p.Live() && !p.HostNetwork {
				add(v.reserved, p.Addrs)
			}
		}
		for _, e := range v.set.kinds[KindService].ordered() {
			s := e.value.(service)
			add(v.reserved, s.Addrs)
			add(v.balanced, s.balanced)
		}
	}
}

func add(set map[netip.Addr]bool, addrs []netip.Addr) {
	for _, a := range addrs {
		set[a] = true
	}
}

func (v *view) podsOf(namespace string) []pod {
	if v.pods == nil {
		v.pods = make(map[string][]pod)
		for _, e := range v.set.kinds[KindPod].ordered() {
			v.pods[e.name.Namespace] = append(v.pods[e.name.Namespace], e.value.(pod))
		}
	}
	return v.pods[namespace]
}

func (v *view) pod(n dataplane.Name) (pod, bool) {
	p, ok := v.set.kinds[KindPod].get(n).(pod)
	return p, ok
}

func (v *view) zone(node string) string {
	n, _ := v.set.kinds[KindNode].get(dataplane.Name{Name: node}).(dataplane.Node)
	return n.Zone
}

func (v *view) service(s service, clusterDomain string) dataplane.Service {
	out := s.Service
	out.Host = s.Name.Name + "." + s.Name.Namespace + ".svc." + clusterDomain
	out.External = v.external(s)
	switch eps, found := v.slices[s.Name]; {
	case s.externalName:
	case found:
		out.Endpoints = v.mergeSlices(eps)
	case len(s.Selector) > 0:
		out.Endpoints = v.selectEndpoints(s)
	}
	return out
}

// mergeSlices combines the slices of one service. An address that moves from one slice to
// another can be in both for a moment: the ready one counts, and ports add up.
func (v *view) mergeSlices(list []endpointSlice) []dataplane.Endpoint {
	var out []dataplane.Endpoint
	at := make(map[netip.Addr]int)
	for _, slice := range list {
		for _, e := range slice.endpoints {
			ep := v.resolve(e)
			i, known := at[ep.Addr]
			if !known {
				at[ep.Addr] = len(out)
				out = append(out, ep)
				continue
			}
			out[i] = mergeEndpoints(out[i], ep)
		}
	}
	return out
}

func mergeEndpoints(a, b dataplane.Endpoint) dataplane.Endpoint {
	if b.Ready && !a.Ready {
		a, b = b, a
	}
	ports := make(map[string]uint16, len(a.Ports)+len(b.Ports))
	for name, port := range b.Ports {
		ports[name] = port
	}
	for name, port := range a.Ports {
		ports[name] = port
	}
	a.Ports = ports
	return a
}

// resolve finds the pod of a slice's endpoint. A pod whose YAML names no UID is known by
// its name; one that does must be the very one, or the slice speaks of a predecessor. An
// address that is not the named pod's is left to whoever routes, which drops it; but of a
// hostNetwork pod no address tells that it is that pod's, so there the address counts alone.
func (v *view) resolve(e sliceEndpoint) dataplane.Endpoint {
	out := e.Endpoint
	if e.pod != (dataplane.Name{}) {
		p, known := v.pod(e.pod)
		switch {
		case !known || e.uid != "" && !p.uidDerived && p.UID != e.uid:
			out.WorkloadUID = e.uid
		case !p.HostNetwork || slices.Contains(p.Addrs, e.Addr):
			out.WorkloadUID = v.uid(&p)
			if out.Node == "" {
				out.Node = p.Node
			}
		}
	}
	if out.Zone == "" {
		out.Zone = v.zone(out.Node)
	}
	return out
}

// selectEndpoints does what the EndpointSlice controller does, for a hand-written directory
// without one: every address, of the service's IP families, of every pod that matches.
func (v *view) selectEndpoints(s service) []dataplane.Endpoint {
	var out []dataplane.Endpoint
	for _, p := range v.podsOf(s.Name.Namespace) {
		if !p.Live() || !matches(s.Selector, p.Labels) {
			continue
		}
		targets := slices.Concat(s.targets, s.udpTargets)
		ports := make(map[string]uint16, len(targets))
		for _, t := range targets {
			if port := t.on(p); port != 0 {
				ports[t.name] = port
			}
		}
		if len(ports) == 0 && len(targets) > 0 {
			continue // none of its ports has the target's name
		}
		for _, a := range p.Addrs {
			if !s.wants(a) {
				continue
			}
			out = append(out, dataplane.Endpoint{
				Addr:        a,
				WorkloadUID: v.uid(&p),
				Node:        p.Node,
				Zone:        v.zone(p.Node),
				Ready:       s.PublishNotReady || p.Ready && !p.Terminating,
				Serving:     p.Ready,
				Terminating: p.Terminating,
				Ports:       ports,
			})
		}
	}
	return out
}

func matches(selector, labels map[string]string) bool {
	for k, want := range selector {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}
