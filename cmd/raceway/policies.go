package main

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newPolicies(c *cli) *cobra.Command {
	return newList(c, listVerb[admin.Policy]{
		use: "policies", aliases: []string{"policy", "pol"},
		short: "List the policies, what they decided, and what of them cannot be enforced",
		long: `List the AuthorizationPolicies and PeerAuthentications that the agent knows.

PODS is how many pods of the agent's node a policy selects, ALLOWED and DENIED how many
connections it decided there. A dry run denies nothing: its DENIED counts what it would have.
ISSUES says what of a policy cannot be enforced as written, and what is done instead.`,
		example: `  raceway policies
  raceway policies -n shop --agent all`,
		fetch:      func(ctx context.Context, a agent) ([]admin.Policy, error) { return a.Policies(ctx) },
		namespaces: func(p admin.Policy) []string { return []string{p.Namespace} },
		compare:    comparePolicies,
		merge:      mergePolicies,
		columns: []column[admin.Policy]{
			{name: "KIND", cell: func(p admin.Policy) cell { return plain(p.Kind) }},
			{name: "NAMESPACE", cell: func(p admin.Policy) cell { return plain(p.Namespace) }},
			{name: "NAME", cell: func(p admin.Policy) cell { return plain(p.Name) }},
			{name: "ACTION", cell: func(p admin.Policy) cell {
				if p.DryRun {
					return cell{p.Action + " (dry run)", toneWarn}
				}
				return plain(cmp.Or(p.Action, "UNSET")) // a PeerAuthentication that inherits its mode
			}},
			{name: "PODS", right: true, cell: func(p admin.Policy) cell { return plain(strconv.Itoa(p.Workloads)) }},
			{name: "ALLOWED", right: true, cell: func(p admin.Policy) cell { return plain(strconv.FormatUint(p.Allowed, 10)) }},
			{name: "DENIED", right: true, cell: func(p admin.Policy) cell { return plain(strconv.FormatUint(p.Denied, 10)) }},
			{name: "ISSUES", cell: func(p admin.Policy) cell { return cell{strings.Join(p.Issues, "; "), toneBad} }},
		},
	})
}

func comparePolicies(a, b admin.Policy) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// mergePolicies adds up what the nodes counted.
func mergePolicies(all []tagged[admin.Policy]) []admin.Policy {
	merged := []admin.Policy{}
	for _, t := range all {
		last := len(merged) - 1
		if last < 0 || comparePolicies(merged[last], t.row) != 0 {
			t.row.Issues = slices.Clone(t.row.Issues)
			merged = append(merged, t.row)
			continue
		}
		m := &merged[last]
		m.Workloads += t.row.Workloads
		m.Allowed += t.row.Allowed
		m.Denied += t.row.Denied
		for _, issue := range t.row.Issues {
			if !slices.Contains(m.Issues, issue) {
				m.Issues = append(m.Issues, issue)
			}
		}
	}
	return merged
}
