package main

import (
	"context"
	"errors"
	"slices"

	"github.com/spf13/cobra"
)

// listVerb is a verb that prints rows which agents hold.
type listVerb[T any] struct {
	use     string
	aliases []string
	short   string
	long    string
	example string
	fetch   func(context.Context, agent) ([]T, error)
	// namespaces are those that a row belongs to; a nil func is for rows of none.
	namespaces func(T) []string
	compare    func(a, b T) int
	// merge makes one list of what several agents say of the same things; nil for rows
	// that are each agent's own, which are then shown with its name.
	merge   func([]tagged[T]) []T
	columns []column[T]
}

func newList[T any](c *cli, v listVerb[T]) *cobra.Command {
	return &cobra.Command{
		Use: v.use, Aliases: v.aliases, Short: v.short, Long: v.long, Example: v.example,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return v.run(cmd.Context(), c) },
	}
}

func (v *listVerb[T]) run(ctx context.Context, c *cli) error {
	agents, err := c.agents(ctx)
	if err != nil {
		return err
	}
	all, err := rows(ask(ctx, agents, v.fetch))
	if err != nil && len(all) == 0 {
		return err
	}
	all = v.ofNamespace(all, c.flags.namespace)
	sortRows(all, v.compare)
	return errors.Join(v.write(c, all, len(agents) > 1), err) // err is of agents that did not answer
}

func (v *listVerb[T]) ofNamespace(all []tagged[T], namespace string) []tagged[T] {
	if namespace == "" || v.namespaces == nil {
		return all
	}
	var kept []tagged[T]
	for _, t := range all {
		if slices.Contains(v.namespaces(t.row), namespace) {
			kept = append(kept, t)
		}
	}
	return kept
}

func (v *listVerb[T]) write(c *cli, all []tagged[T], several bool) error {
	if several && v.merge == nil {
		if all == nil {
			all = []tagged[T]{}
		}
		return writeRows(c, tagColumns(v.columns), all)
	}
	single := make([]T, 0, len(all))
	for _, t := range all {
		single = append(single, t.row)
	}
	if several {
		single = v.merge(all)
	}
	return writeRows(c, v.columns, single)
}

func writeRows[T any](c *cli, columns []column[T], all []T) error {
	if c.flags.output.forPrograms() {
		return c.writeValue(all)
	}
	return writeTable(c, columns, all)
}

// tagColumns puts the agent before the columns.
func tagColumns[T any](columns []column[T]) []column[tagged[T]] {
	out := []column[tagged[T]]{{name: "AGENT", cell: func(t tagged[T]) cell { return plain(t.agent) }}}
	for _, col := range columns {
		out = append(out, column[tagged[T]]{
			name: col.name, wide: col.wide, right: col.right, width: col.width,
			cell: func(t tagged[T]) cell { return col.cell(t.row) },
		})
	}
	return out
}
