package authz

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// strictness is PeerAuthentication's outcome for one workload: for each port, the object
// that demands an identity, nil when none does.
type strictness struct {
	all    *dataplane.PeerAuthentication
	byPort map[uint16]*dataplane.PeerAuthentication // overrides all; a nil value is permissive
}

func (s *strictness) at(port uint16) *dataplane.PeerAuthentication {
	if by, ok := s.byPort[port]; ok {
		return by
	}
	return s.all
}

// strictnessOf composes the three levels as Istio does: of each the oldest counts (then the
// first by name), the more specific overrides unless it is UNSET, and ports can be
// set by an object with a selector only.
func strictnessOf(s *dataplane.Snapshot, w *dataplane.Workload) strictness {
	var mesh, namespace, workload *dataplane.PeerAuthentication
	all := s.PeerAuthentications()
	for i := range all {
		p := &all[i]
		if !AuthenticationApplies(s, p, w) {
			continue
		}
		level := &namespace
		switch {
		case len(p.Selector) > 0:
			level = &workload
		case p.Name.Namespace == s.RootNamespace():
			level = &mesh
		}
		if *level == nil || older(p, *level) {
			*level = p
		}
	}
	var result strictness
	for _, p := range []*dataplane.PeerAuthentication{mesh, namespace, workload} {
		if p != nil {
			result.all = demand(p, modeOf(p), result.all)
		}
	}
	if workload == nil || workload.Invalid != "" {
		return result
	}
	result.byPort = make(map[uint16]*dataplane.PeerAuthentication, len(workload.PortModes))
	for port, mode := range workload.PortModes {
		result.byPort[port] = demand(workload, mode, result.all)
	}
	return result
}

// demand returns who demands an identity once p with that mode overrides inherited.
func demand(p *dataplane.PeerAuthentication, mode dataplane.MTLSMode, inherited *dataplane.PeerAuthentication) *dataplane.PeerAuthentication {
	switch mode {
	case dataplane.MTLSUnset, "UNSET":
		return inherited
	case dataplane.MTLSPermissive, dataplane.MTLSDisable:
		return nil
	case dataplane.MTLSStrict:
		return p
	}
	return p // a mode that is not understood asks for something; STRICT is the most that it can be
}

func modeOf(p *dataplane.PeerAuthentication) dataplane.MTLSMode {
	if p.Invalid != "" {
		return dataplane.MTLSStrict
	}
	return p.Mode
}

func older(a, b *dataplane.PeerAuthentication) bool {
	return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.Name.Name, b.Name.Name)) < 0
}

// AuthenticationApplies reports whether p is meant for w. One with a selector in the root
// namespace is meant for nobody: Istio reads selectors in other namespaces only.
func AuthenticationApplies(s *dataplane.Snapshot, p *dataplane.PeerAuthentication, w *dataplane.Workload) bool {
	if len(p.Selector) > 0 && p.Name.Namespace == s.RootNamespace() {
		return false
	}
	return inScope(s, p.Name.Namespace, w) && dataplane.MatchLabels(p.Selector, w.Labels)
}

// AuthenticationIssues says in words what of p is not enforced as written.
func AuthenticationIssues(s *dataplane.Snapshot, p *dataplane.PeerAuthentication) []string {
	var issues []string
	report := func(format string, args ...any) { issues = append(issues, fmt.Sprintf(format, args...)) }
	if p.Invalid != "" {
		report("the object could not be read (%s): it counts as STRICT for all that it selects", p.Invalid)
	}
	if len(p.Selector) > 0 && p.Name.Namespace == s.RootNamespace() {
		report("a selector in the root namespace selects nothing: put the object into the workloads' namespace")
	}
	if len(p.PortModes) > 0 && len(p.Selector) == 0 {
		report("portLevelMtls without a selector has no effect")
	}
	modes := []dataplane.MTLSMode{p.Mode}
	for _, mode := range p.PortModes {
		modes = append(modes, mode)
	}
	slices.Sort(modes)
	for _, mode := range slices.Compact(modes) {
		switch mode {
		case dataplane.MTLSUnset, "UNSET", dataplane.MTLSPermissive, dataplane.MTLSStrict:
		case dataplane.MTLSDisable:
			report("mode DISABLE is PERMISSIVE here: a captured workload always accepts the tunnel")
		default:
			report("mode %q is unknown and counts as STRICT", string(mode))
		}
	}
	return issues
}
