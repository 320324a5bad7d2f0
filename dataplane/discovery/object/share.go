package object

import (
	"fmt"
	"maps"
	"slices"
	"unique"
)

// intern returns s without the memory of its own, for strings that many objects have.
func intern(s string) string { return unique.Make(s).Value() }

// sharedMaps keeps one map for all objects that have the same: the labels of a Deployment's
// pods are all alike. The maps are not changed any more.
type sharedMaps[V comparable] struct {
	maps map[string]*sharedMap[V]
}

type sharedMap[V comparable] struct {
	content map[string]V
	users   int
}

// take returns a map like m, which has one user more.
func (s *sharedMaps[V]) take(m map[string]V) map[string]V {
	if len(m) == 0 {
		return m
	}
	key := keyOfMap(m)
	shared := s.maps[key]
	if shared == nil {
		shared = &sharedMap[V]{content: m}
		if s.maps == nil {
			s.maps = make(map[string]*sharedMap[V])
		}
		s.maps[key] = shared
	}
	shared.users++
	return shared.content
}

// drop takes a user from a map that take returned.
func (s *sharedMaps[V]) drop(m map[string]V) {
	if len(m) == 0 {
		return
	}
	key := keyOfMap(m)
	if s.maps[key].users--; s.maps[key].users == 0 {
		delete(s.maps, key)
	}
}

// keyOfMap is the same for equal maps alone: everything is quoted.
func keyOfMap[V comparable](m map[string]V) string {
	var key []byte
	for _, k := range slices.Sorted(maps.Keys(m)) {
		key = fmt.Appendf(key, "%q%q", k, fmt.Sprint(m[k]))
	}
	return string(key)
}
