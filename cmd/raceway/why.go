package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newWhy(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "why SRC DST:PORT",
		Short: "Explain what becomes of a connection: tunnel or plain, allowed or denied, and why",
		Long: `Explain what would become of a connection from a pod to host:port now: whether the source is
captured, what the name resolves to, tunnel or plain and why, both identities, the deciding
policy and rule, and the command to try next. Nothing is sent.

SRC is a pod: name, namespace/name, deploy/name (or sts, ds, job …), namespace/deploy/name, or
its address. -n says where a name without namespace is looked up; otherwise it must be the
only one of the cluster.

DST is a service as the source would call it (db, db.shop, db.shop.svc.cluster.local),
namespace/name of a service or a pod, any form of SRC, or an address. PORT is a number or the
name of a service's port.

Without --agent the agent of the source's node answers, if it is on this machine: it knows
most.`,
		Example: `  raceway why web db:3306
  raceway why shop/deploy/web db.shop.svc.cluster.local:mysql
  raceway why web-7d4b9c 10.96.0.10:3306
  raceway why web [fd00:10:96::a]:3306 -o yaml`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s takes a source and a destination, as in \"raceway why web db:3306\": there are %d arguments", cmd.CommandPath(), len(args))
			}
			return nil
		},
		ValidArgsFunction: c.completeWhy,
		RunE: func(cmd *cobra.Command, args []string) error {
			q := admin.WhyQuery{Source: args[0], Destination: args[1], From: c.flags.namespace}
			why, err := c.askWhy(cmd.Context(), q)
			if err != nil {
				return err
			}
			if c.flags.output.forPrograms() {
				return c.writeValue(why)
			}
			return c.writeWhy(why)
		},
	}
}

// askWhy prefers the answer of the source's own node.
func (c *cli) askWhy(ctx context.Context, q admin.WhyQuery) (admin.Why, error) {
	agents, err := c.anyAgents(ctx)
	if err != nil {
		return admin.Why{}, err
	}
	answers := ask(ctx, agents, func(ctx context.Context, a agent) (admin.Why, error) { return a.Why(ctx, q) })
	var best *admin.Why
	var errs []error
	for i := range answers {
		a := &answers[i]
		switch {
		case a.err != nil:
			errs = append(errs, a.err)
		case a.value.Node == a.value.SourceNode:
			return a.value, nil
		case best == nil:
			best = &a.value
		}
	}
	if best == nil {
		return admin.Why{}, oneAnswer(errs)
	}
	return *best, nil
}

// oneAnswer says once what every agent says alike: a name that is unknown is so to all.
func oneAnswer(errs []error) error {
	var answer *admin.Error
	if !errors.As(errs[0], &answer) {
		return errors.Join(errs...)
	}
	for _, err := range errs[1:] {
		var other *admin.Error
		if !errors.As(err, &other) || other.Error() != answer.Error() {
			return errors.Join(errs...)
		}
	}
	return answer
}

func (c *cli) writeWhy(why admin.Why) error {
	outcome := (&layout{color: c.color}).paint(cell{why.Outcome, outcomeTone(why.Outcome)})
	if _, err := fmt.Fprintf(c.out, "%s to %s: %s\n\n", oneLine(why.Source), oneLine(why.Destination), outcome); err != nil {
		return err
	}
	columns := []column[admin.WhyStep]{
		{name: "STEP", cell: func(s admin.WhyStep) cell { return plain(s.Step) }},
		{name: "RESULT", cell: func(s admin.WhyStep) cell { return plain(s.Result) }},
		{name: "DETAIL", cell: func(s admin.WhyStep) cell { return plain(s.Detail) }},
	}
	if err := writeTable(c, columns, why.Steps); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.out, "\nNext: %s\n", oneLine(why.Next))
	return err
}

func outcomeTone(outcome string) tone {
	switch outcome {
	case admin.OutcomeTunnel, admin.OutcomeKernel:
		return toneGood
	case admin.OutcomeDenied, admin.OutcomeRefused:
		return toneBad
	case admin.OutcomeUnknown:
		return toneWarn
	}
	return toneNone
}
