package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newCheck(c *cli) *cobra.Command {
	preview := false
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Prove that capture is in force, pod by pod, and say what is wrong",
		Long: `Look at what is in force now, for each agent and for each captured pod of its node: effective
programs, rules, listeners, sysctls, and a connection made for the purpose. Of a cluster also
what it allows, before an installation and after it: versions, kernels, the CNI, the kinds of
policies, agents and CA.

A subject that is in order is one line; -o wide shows each check. The exit code is 1 when a
check failed, and DETAIL says what is wrong and what to do.

--preview changes nothing and says, of the namespace of -n, which pods the label would capture,
which NetworkPolicy would block their tunnels, and which observed connections a STRICT
PeerAuthentication would refuse.`,
		Example: `  raceway check
  raceway check --preview -n shop
  raceway check --agent all -n shop
  raceway check -o json | jq '.[] | select(.ok | not)'`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if preview {
				return c.preview(cmd.Context())
			}
			return c.check(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&preview, "preview", false, "say what enrolling the namespace of -n would do")
	return cmd
}

func (c *cli) check(ctx context.Context) error {
	f, err := c.fleet()
	if err != nil {
		return err
	}
	var all []tagged[admin.Finding]
	p, clustered := f.(pods)
	if clustered {
		findings, err := p.Check(ctx)
		if err != nil {
			return err
		}
		for _, f := range findings {
			all = append(all, tagged[admin.Finding]{row: f})
		}
		if installed, err := p.Installed(ctx); err != nil || !installed {
			return errors.Join(c.writeFindings(all, false), err, verdict(all))
		}
	}
	agents, err := c.agents(ctx)
	if err == nil {
		var found []tagged[admin.Finding]
		found, err = rows(ask(ctx, agents, func(ctx context.Context, a agent) ([]admin.Finding, error) { return a.Check(ctx) }))
		all = append(all, found...)
	}
	if len(all) == 0 {
		return err
	}
	all = c.findingsOfNamespace(all)
	return errors.Join(c.writeFindings(all, clustered || len(agents) > 1), err, verdict(all))
}

// findingsOfNamespace keeps what concerns the agent itself whatever namespace is asked for.
func (c *cli) findingsOfNamespace(all []tagged[admin.Finding]) []tagged[admin.Finding] {
	if c.flags.namespace == "" {
		return all
	}
	return slices.DeleteFunc(all, func(t tagged[admin.Finding]) bool {
		namespace := findingNamespace(t.row)
		return namespace != "" && namespace != c.flags.namespace
	})
}

// verdict is nil when everything is in order.
func verdict(all []tagged[admin.Finding]) error {
	failed := 0
	for _, t := range all {
		if !t.row.OK {
			failed++
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d checks failed: %w", failed, len(all), errFound)
}

func (c *cli) writeFindings(all []tagged[admin.Finding], several bool) error {
	// The agent's own findings have no namespace and come first; checks of one subject
	// stay in the order in which they were made.
	slices.SortStableFunc(all, func(a, b tagged[admin.Finding]) int {
		return cmp.Or(cmp.Compare(a.agent, b.agent), cmp.Compare(findingNamespace(a.row), findingNamespace(b.row)), cmp.Compare(a.row.Subject, b.row.Subject))
	})
	if c.flags.output == formatTable {
		all = summarize(all)
	}
	v := listVerb[admin.Finding]{columns: findingColumns()}
	return v.write(c, all, several)
}

func findingColumns() []column[admin.Finding] {
	return []column[admin.Finding]{
		{name: "SUBJECT", cell: func(f admin.Finding) cell { return plain(f.Subject) }},
		{name: "STATUS", cell: func(f admin.Finding) cell {
			if f.OK {
				return cell{"ok", toneGood}
			}
			return cell{"FAILED", toneBad}
		}},
		{name: "CHECK", cell: func(f admin.Finding) cell { return plain(f.Check) }},
		{name: "DETAIL", cell: func(f admin.Finding) cell { return plain(f.Detail) }},
	}
}

func findingNamespace(f admin.Finding) string {
	for i, r := range f.Subject {
		if r == '/' {
			return f.Subject[:i]
		}
	}
	return ""
}

// summarize makes one row of each subject that is in order, and keeps of the others what
// failed; what there is to say of a check that did not fail is kept as well. Findings come
// sorted.
func summarize(all []tagged[admin.Finding]) []tagged[admin.Finding] {
	var short []tagged[admin.Finding]
	for len(all) > 0 {
		first := all[0]
		n := slices.IndexFunc(all, func(t tagged[admin.Finding]) bool {
			return t.agent != first.agent || t.row.Subject != first.row.Subject
		})
		if n < 0 {
			n = len(all)
		}
		inOrder, telling := true, []tagged[admin.Finding](nil)
		for _, t := range all[:n] {
			inOrder = inOrder && t.row.OK
			if !t.row.OK || t.row.Detail != "" {
				telling = append(telling, t)
			}
		}
		if inOrder {
			short = append(short, tagged[admin.Finding]{first.agent, admin.Finding{Subject: first.row.Subject, OK: true, Check: checks(n)}})
		}
		short = append(short, telling...)
		all = all[n:]
	}
	return short
}

func checks(n int) string {
	if n == 1 {
		return "1 check"
	}
	return fmt.Sprintf("%d checks", n)
}
