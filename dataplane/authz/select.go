package authz

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Applies reports whether p is meant for w: it is in w's namespace or in the root namespace,
// its selector matches, and it is not bound to a gateway or waypoint. A policy without
// effect (AUDIT, a dry run) may apply too.
func Applies(s *dataplane.Snapshot, p *dataplane.AuthorizationPolicy, w *dataplane.Workload) bool {
	return !p.TargetRefs && inScope(s, p.Name.Namespace, w) && dataplane.MatchLabels(p.Selector, w.Labels)
}

func inScope(s *dataplane.Snapshot, namespace string, w *dataplane.Workload) bool {
	return namespace == w.Name.Namespace || namespace != "" && namespace == s.RootNamespace()
}

// Issues says in words what of p cannot be enforced as written, and what happens instead.
// It is empty for a policy that is enforced to the letter.
func Issues(p *dataplane.AuthorizationPolicy) []string {
	if p.TargetRefs {
		return []string{"the policy is bound to a waypoint or gateway by targetRefs: it has no effect on workloads"}
	}
	return compile(p).issues
}

func (set *Set) compileLocked(w *dataplane.Workload) *Rules {
	rules := &Rules{
		strict:  strictnessOf(set.snapshot, w),
		allowed: Verdict{Allowed: true, Rule: -1, Reason: "no ALLOW policy applies to " + w.Name.String() + " and no DENY policy matches"},
	}
	var denying, allowing []*policy
	for _, p := range set.applyingLocked(w) {
		source := p.source
		switch {
		case source.Action == dataplane.ActionAudit:
		case source.DryRun:
			if !p.invalid {
				rules.dryRun = append(rules.dryRun, p)
			}
		case p.denies:
			denying = append(denying, p)
		default:
			allowing = append(allowing, p)
		}
	}
	rules.deny, rules.allow = merge(denying), merge(allowing)
	if len(allowing) > 0 {
		rules.restricted = true
		rules.refused = Verdict{Kind: KindAuthorization, Policy: allowing[0].name, Rule: -1, Reason: fmt.Sprintf("no ALLOW policy matched (%s) ", list(allowing))}
	}
	return rules
}

// merge shares the index of a policy that is alone among all the workloads it selects.
func merge(policies []*policy) index {
	if len(policies) == 1 {
		return policies[0].index
	}
	var rules []*rule
	for _, p := range policies {
		rules = append(rules, p.rules...)
	}
	return newIndex(rules)
}

// applyingLocked returns the policies for w by namespace and name, so that which of several
// that match is named does not depend on the order that they were read in.
func (set *Set) applyingLocked(w *dataplane.Workload) []*policy {
	var found []*policy
	all := set.snapshot.AuthorizationPolicies()
	for i := range all {
		if !Applies(set.snapshot, &all[i], w) {
			continue
		}
		if set.policies[i] == nil {
			set.policies[i] = compile(&all[i])
		}
		found = append(found, set.policies[i])
	}
	slices.SortStableFunc(found, func(a, b *policy) int {
		return cmp.Or(cmp.Compare(a.name.Namespace, b.name.Namespace), cmp.Compare(a.name.Name, b.name.Name))
	})
	return found
}

// list names at most a handful.
func list(policies []*policy) string {
	const most = 5
	var b strings.Builder
	for i, p := range policies {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(policies)-most)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(p.name.String())
	}
	return b.String()
}
