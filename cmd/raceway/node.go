package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// nodeRelease is one run of `raceway node release`. The paths are those of the chart, as the
// node has them.
type nodeRelease struct {
	force                     bool
	bpfDir, stateDir          string
	cniConfDir, cniBinDir     string
	cniStateDir, snapshotFile string
	agentSocket, cniSocket    string
}

func newNode(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "node",
		Short:   "What is done on a node itself, without its agent",
		Long:    `Commands that run as root on a node, and need neither its agent nor an API server.`,
		Example: `  raceway node release --force`,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newNodeRelease(c))
	return cmd
}

func newNodeRelease(c *cli) *cobra.Command {
	var r nodeRelease
	cmd := &cobra.Command{
		Use:   "release --force",
		Short: "Release every pod of this node and leave nothing of Raceway on it",
		Long: `Take Raceway off this node: programs, maps, rules and routes of pods, the CNI plugin and its
state. Every pod of the node is back to plain networking, and its traffic is in clear.

It is for a node whose agent is gone for good, and refuses while one runs: where the cluster
can still be asked, use "raceway uninstall", or take the label off the namespaces. --force says
that you know. It may be repeated, and says what it removed.`,
		Example: `  raceway node release --force
  raceway node release --force --cni-conf-dir /etc/cni/net.d --cni-bin-dir /usr/lib/cni`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !r.force {
				return usagef("the traffic of this node's pods would be in clear: --force says that this is meant")
			}
			removed, err := r.run(cmd.Context())
			errs := []error{err}
			for _, what := range removed {
				errs = append(errs, c.say("removed %s", what))
			}
			if err == nil && len(removed) == 0 {
				errs = append(errs, c.say("there was nothing to remove"))
			}
			return errors.Join(errs...)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&r.force, "force", false, "do it")
	f.StringVar(&r.bpfDir, "bpf-dir", "/sys/fs/bpf/raceway", "the agent's directory of pins")
	f.StringVar(&r.stateDir, "state-dir", "/run/raceway/state", "the agent's state")
	f.StringVar(&r.agentSocket, "agent-socket", "/run/raceway/agent.sock", "the agent's admin socket")
	f.StringVar(&r.cniSocket, "cni-socket", "/run/raceway/cni.sock", "the socket of the CNI plugin")
	f.StringVar(&r.snapshotFile, "snapshot-file", "/var/lib/raceway/snapshot.json.gz", "the agent's view of the cluster")
	f.StringVar(&r.cniConfDir, "cni-conf-dir", "/etc/cni/net.d", "network configuration of this node, empty to leave it alone")
	f.StringVar(&r.cniBinDir, "cni-bin-dir", "/opt/cni/bin", "CNI plugins of this node")
	f.StringVar(&r.cniStateDir, "cni-state-dir", "/var/lib/raceway/cni", "the state of the CNI plugin")
	return cmd
}
