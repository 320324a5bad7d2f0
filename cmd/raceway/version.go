package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/internal/version"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// versionRow is this program, or one agent.
type versionRow struct {
	Component string `json:"component"`
	admin.Version
}

func newVersion(c *cli) *cobra.Command {
	client := false
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of the agents",
		Long: `Print the versions of this program and of the agents of this machine, with each agent's
kernel and the way it captures inbound connections.`,
		Example: `  raceway version
  raceway version --client`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all := []versionRow{{"raceway", admin.Version{Version: version.String()}}}
			var err error
			if !client {
				var agents []versionRow
				agents, err = c.agentVersions(cmd.Context())
				all = append(all, agents...)
			}
			return errors.Join(writeRows(c, versionColumns(), all), err)
		},
	}
	cmd.Flags().BoolVar(&client, "client", false, "this program's version only")
	return cmd
}

func versionColumns() []column[versionRow] {
	return []column[versionRow]{
		{name: "COMPONENT", cell: func(v versionRow) cell { return plain(v.Component) }},
		{name: "VERSION", cell: func(v versionRow) cell { return plain(v.Version.Version) }},
		{name: "NODE", cell: func(v versionRow) cell { return plain(v.Node) }},
		{name: "KERNEL", cell: func(v versionRow) cell { return plain(v.Kernel) }},
		{name: "INBOUND CAPTURE", cell: func(v versionRow) cell { return plain(v.Inbound) }},
	}
}

func (c *cli) agentVersions(ctx context.Context) ([]versionRow, error) {
	agents, err := c.anyAgents(ctx)
	if err != nil {
		return nil, err
	}
	all, err := rows(ask(ctx, agents, func(ctx context.Context, a agent) ([]versionRow, error) {
		v, err := a.Version(ctx)
		if err != nil {
			return nil, err
		}
		return []versionRow{{"raceway-agent", v}}, nil
	}))
	var versions []versionRow
	for _, t := range all {
		versions = append(versions, t.row)
	}
	return versions, err
}
