package object

import (
	"maps"
	"reflect"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Set holds the objects of one cluster, and of the last Contents what the next one can use
// again. The zero Set is empty and ready; it is not safe for concurrent use.
type Set struct {
	kinds    map[Kind]*list
	uids     map[string]int // how many pods have each UID
	twice    int            // the UIDs that several have
	labels   sharedMaps[string]
	ports    sharedMaps[uint16]
	services services
}

// Put adds o or replaces the object of the same key, and reports whether that changed
// anything that the data plane reads.
func (s *Set) Put(o Object) bool {
	l := s.kinds[o.Key.Kind]
	if l == nil {
		l = new(list)
		if s.kinds == nil {
			s.kinds = make(map[Kind]*list)
		}
		s.kinds[o.Key.Kind] = l
	}
	old := l.get(o.Key.Name)
	if old != nil && reflect.DeepEqual(old, o.value) {
		return false
	}
	now := o.value
	// In this order, so that what both share stays.
	if p, ok := now.(pod); ok {
		now = s.add(p)
	}
	if p, ok := old.(pod); ok {
		s.remove(p)
	}
	s.services.changed(o.Key.Name, old, now)
	l.put(o.Key.Name, now)
	return true
}

// Delete removes the object of that key and reports whether there was one.
func (s *Set) Delete(k Key) bool {
	l := s.kinds[k.Kind]
	old := l.get(k.Name)
	if old == nil {
		return false
	}
	if p, ok := old.(pod); ok {
		s.remove(p)
	}
	s.services.changed(k.Name, old, nil)
	l.remove(k.Name)
	return true
}

// add counts a pod, and has it share with others what is the same.
func (s *Set) add(p pod) pod {
	if s.uids == nil {
		s.uids = make(map[string]int)
	}
	s.uids[p.UID]++
	if s.uids[p.UID] == 2 {
		s.twice++
	}
	p.Labels, p.ports = s.labels.take(p.Labels), s.ports.take(p.ports)
	return p
}

func (s *Set) remove(p pod) {
	switch s.uids[p.UID]--; s.uids[p.UID] {
	case 0:
		delete(s.uids, p.UID)
	case 1:
		s.twice--
	}
	s.labels.drop(p.Labels)
	s.ports.drop(p.ports)
}

// Get returns the object of that key.
func (s *Set) Get(k Key) (Object, bool) {
	value := s.kinds[k.Kind].get(k.Name)
	return Object{Key: k, value: value}, value != nil
}

// Keys lists the keys of all objects in order.
func (s *Set) Keys() []Key {
	var keys []Key
	for _, kind := range slices.Sorted(maps.Keys(s.kinds)) {
		keys = append(keys, s.KeysOf(kind)...)
	}
	return keys
}

// KeysOf lists the keys of all objects of a kind in order.
func (s *Set) KeysOf(kind Kind) []Key {
	entries := s.kinds[kind].ordered()
	keys := make([]Key, 0, len(entries))
	for _, e := range entries {
		keys = append(keys, Key{Kind: kind, Name: e.name})
	}
	return keys
}

// Contents converts all that the set holds. The captured map is left to the source. Each
// call returns fresh slices of shared, immutable parts, as NewSnapshot needs them.
func (s *Set) Contents(mesh Mesh) (dataplane.Contents, []Conflict) {
	if mesh.ClusterDomain == "" {
		mesh.ClusterDomain = "cluster.local"
	}
	v := newView(s)
	c := dataplane.Contents{
		TrustDomain: mesh.TrustDomain, RootNamespace: mesh.RootNamespace,
		Namespaces:      all[dataplane.Namespace](s, KindNamespace),
		Nodes:           all[dataplane.Node](s, KindNode),
		Authorizations:  all[dataplane.AuthorizationPolicy](s, KindAuthorizationPolicy),
		Authentications: all[dataplane.PeerAuthentication](s, KindPeerAuthentication),
		Services:        v.services(mesh.ClusterDomain),
	}
	pods := s.kinds[KindPod].ordered()
	c.Workloads = make([]dataplane.Workload, len(pods))
	for i, e := range pods {
		p, w := e.value.(pod), &c.Workloads[i]
		*w = p.Workload
		w.UID, w.Cluster = v.uid(&p), mesh.Cluster
	}
	return c, v.conflicts
}

// all lists the objects of a kind whose conversion is what Contents have of them.
func all[T any](s *Set, kind Kind) []T {
	entries := s.kinds[kind].ordered()
	out := make([]T, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.value.(T))
	}
	return out
}
