package object

import (
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// services are the services of the last Contents, and what of them cannot be used again. A
// service is made of itself, its slices, where their pods are, and the zones of nodes.
type services struct {
	domain string // of their host names
	built  map[dataplane.Name]dataplane.Service
	moved  map[dataplane.Name]bool // pods
}

// changed takes in that an object was old and is now now; nil is none.
func (s *services) changed(name dataplane.Name, old, now any) {
	if s.built == nil {
		return
	}
	for _, value := range [...]any{old, now} {
		switch value := value.(type) {
		case service:
			delete(s.built, name)
		case endpointSlice:
			delete(s.built, value.service)
		}
	}
	before, wasPod := old.(pod)
	after, isPod := now.(pod)
	if (wasPod || isPod) && !(wasPod && isPod && before.stands(&after)) {
		s.moved[name] = true
	}
	// What is not a node has no zone.
	from, _ := old.(dataplane.Node)
	to, _ := now.(dataplane.Node)
	if from.Zone != to.Zone {
		s.forget()
	}
}

// stands reports whether endpoints of the pod are the same as of the other.
func (p *pod) stands(other *pod) bool {
	return p.UID == other.UID && p.uidDerived == other.uidDerived && p.Node == other.Node &&
		p.HostNetwork == other.HostNetwork && slices.Equal(p.Addrs, other.Addrs)
}

// forget has all services built anew.
func (s *services) forget() { *s = services{} }

// services lists all, of which it builds those that changed.
func (v *view) services(clusterDomain string) []dataplane.Service {
	kept := &v.set.services
	// With UIDs that several pods have, any pod can change what any other goes by.
	if kept.domain != clusterDomain || v.set.twice > 0 {
		kept.forget()
	}
	if kept.built == nil {
		kept.domain = clusterDomain
		kept.built = make(map[dataplane.Name]dataplane.Service)
	}
	v.findSlices(kept)
	kept.moved = make(map[dataplane.Name]bool)

	entries := v.set.kinds[KindService].ordered()
	out := make([]dataplane.Service, 0, len(entries))
	for _, e := range entries {
		built, done := kept.built[e.name]
		if !done {
			s := e.value.(service)
			built = v.service(s, clusterDomain)
			if v.keeps(s) {
				kept.built[e.name] = built
			}
		}
		out = append(out, built)
	}
	if v.set.twice > 0 {
		kept.forget()
	}
	return out
}

// keeps reports whether a service depends on nothing but what services.changed looks at:
// external addresses are held against those of all, and selectors against all labels.
func (v *view) keeps(s service) bool {
	_, sliced := v.slices[s.Name]
	return len(s.balanced)+len(s.external) == 0 && (sliced || len(s.Selector) == 0)
}

// findSlices collects the slices of the services that are to be built.
func (v *view) findSlices(kept *services) {
	entries := v.set.kinds[KindEndpointSlice].ordered()
	if len(kept.moved) > 0 {
		for _, e := range entries {
			slice := e.value.(endpointSlice)
			if slices.ContainsFunc(slice.endpoints, func(ep sliceEndpoint) bool { return kept.moved[ep.pod] }) {
				delete(kept.built, slice.service)
			}
		}
	}
	for _, e := range entries {
		slice := e.value.(endpointSlice)
		if _, done := kept.built[slice.service]; !done {
			v.slices[slice.service] = append(v.slices[slice.service], slice)
		}
	}
}
