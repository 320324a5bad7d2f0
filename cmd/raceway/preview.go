package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// preview says what the label on a namespace would do.
func (c *cli) preview(ctx context.Context) error {
	if c.flags.namespace == "" {
		return usagef("--preview is about one namespace: name it with -n")
	}
	cluster, err := c.cluster()
	if err != nil {
		return err
	}
	findings, err := cluster.Preview(ctx, c.flags.namespace)
	if err != nil {
		return err
	}
	// Before an installation there is no agent to have seen anything.
	agents, err := pods{cluster}.agents(ctx)
	if err == nil {
		var observed []admin.Finding
		observed, err = plaintextTo(ctx, agents, c.flags.namespace)
		findings = append(findings, observed...)
	} else if installed, _ := cluster.Installed(ctx); !installed {
		err = nil
	}
	slices.SortStableFunc(findings, func(a, b admin.Finding) int { return cmp.Compare(a.Subject, b.Subject) })
	all := make([]tagged[admin.Finding], 0, len(findings))
	for _, f := range findings {
		all = append(all, tagged[admin.Finding]{row: f})
	}
	return errors.Join(writeRows(c, findingColumns(), findings), err, verdict(all))
}

// plaintextTo are connections that agents have seen reach the namespace's pods without an
// identity, once for each peer and port.
func plaintextTo(ctx context.Context, agents []agent, namespace string) ([]admin.Finding, error) {
	seen, err := rows(ask(ctx, agents, func(ctx context.Context, a agent) ([]admin.Connection, error) {
		live, err := a.Connections(ctx)
		if err != nil {
			return nil, err
		}
		err = a.Flows(ctx, false, func(f admin.Flow) error {
			live = append(live, f.Connection)
			return nil
		})
		return live, err
	}))
	var findings []admin.Finding
	for _, t := range seen {
		c := t.row
		if c.Direction != "inbound" || c.Protocol != dataplane.ProtocolTCP || c.Destination.Namespace != namespace {
			continue
		}
		from := c.Source.Addr.Addr().String()
		if c.Source.Workload != "" {
			from = c.Source.Namespace + "/" + c.Source.Workload
		}
		f := admin.Finding{
			Subject: namespace + "/" + c.Destination.Workload, Check: "STRICT",
			Detail: fmt.Sprintf("would refuse %s, which speaks plaintext to port %d", from, c.Destination.Addr.Port()),
		}
		if !slices.Contains(findings, f) {
			findings = append(findings, f)
		}
	}
	return findings, err
}
