package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spf13/cobra"
)

// levelRow is one agent's log level.
type levelRow struct {
	Level slog.Level `json:"level"`
}

func newLogLevel(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "log-level [LEVEL]",
		Short: "Show the agent's log level, or change it until it restarts",
		Long: `Show how much the agent logs, or change it: DEBUG, INFO, WARN or ERROR, or between them as in
INFO+2. A restart brings back the level of the agent's --log-level flag.`,
		Example: `  raceway log-level
  raceway log-level debug --agent all`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("%s takes one level, but there are %d arguments", cmd.CommandPath(), len(args))
			}
			return nil
		},
		ValidArgsFunction: cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := len(args) == 1
			var level slog.Level
			if change {
				if err := level.UnmarshalText([]byte(args[0])); err != nil {
					return usagef("%q is not a log level: it is debug, info, warn or error", args[0])
				}
			}
			return c.logLevel(cmd.Context(), change, level)
		},
	}
}

func (c *cli) logLevel(ctx context.Context, change bool, level slog.Level) error {
	agents, err := c.agents(ctx)
	if err != nil {
		return err
	}
	all, err := rows(ask(ctx, agents, func(ctx context.Context, a agent) ([]levelRow, error) {
		if change {
			if err := a.SetLogLevel(ctx, level); err != nil {
				return nil, err
			}
		}
		now, err := a.LogLevel(ctx)
		if err != nil {
			return nil, err
		}
		return []levelRow{{now}}, nil
	}))
	if len(all) == 0 {
		return err
	}
	v := listVerb[levelRow]{columns: []column[levelRow]{
		{name: "LEVEL", cell: func(l levelRow) cell { return plain(l.Level.String()) }},
	}}
	return errors.Join(v.write(c, all, len(agents) > 1), err)
}
