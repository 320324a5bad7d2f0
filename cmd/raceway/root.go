package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/raceway/internal/kube"
)

// globalFlags are the flags of every verb.
type globalFlags struct {
	agents    []string
	output    format
	namespace string
	noHeaders bool
	cluster   kube.Options
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "raceway",
		Short: "Look into the Raceway data plane of a cluster, or of this node",
		Long: `raceway asks agents what they capture, carry, allow and refuse, and why.

Where an agent runs on this machine, it is asked on its unix socket in ` + defaultSocketDir + `,
which root alone can open. Elsewhere the agents of the kubeconfig's cluster are, by a command
that runs inside their pods (it needs the right to create pods/exec there).

Exit codes: 0 done; 1 something is wrong (check, demo); 2 the command line, or a name on
it, cannot be used; 3 no agent could be asked, or it could not answer.`,
		Example: `  raceway workloads                    which pods are captured
  raceway why web db:3306              what becomes of a connection, and why
  raceway flows -f -n shop             connections as they open, close and are denied
  raceway check                        prove that capture is in force`,
		Args:                       cobra.ArbitraryArgs, // an unknown verb gets our own error
		DisableFlagsInUseLine:      true,
		SilenceErrors:              true,
		SuggestionsMinimumDistance: 2,
		SilenceUsage:               true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownVerb(cmd, args[0])
		},
	}
	root.SetOut(c.out)
	root.SetErr(c.errOut)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w: run %q for the flags it has", err, cmd.CommandPath()+" -h")
	})
	c.addGlobalFlags(root)
	root.AddCommand(
		newWorkloads(c), newServices(c), newPolicies(c), newCertificates(c), newConnections(c),
		newFlows(c), newWhy(c), newCheck(c), newLogLevel(c), newDemo(c), newVersion(c),
		newPerf(c), newBugReport(c), newUninstall(c), newNode(c), newAdminPipe(c),
	)
	return root
}

func (c *cli) addGlobalFlags(root *cobra.Command) {
	c.flags = globalFlags{output: formatTable}
	if c.agentEnv != "" {
		c.flags.agents = strings.Split(c.agentEnv, ",")
	}
	f := root.PersistentFlags()
	f.StringSliceVar(&c.flags.agents, "agent", c.flags.agents, "whom to ask: a node's name, a socket's path, or all; may be repeated (default: the only agent of this machine, or all of the cluster; env "+agentEnv+")")
	f.VarP(&c.flags.output, "output", "o", "table, wide, json or yaml")
	f.StringVarP(&c.flags.namespace, "namespace", "n", "", "only this namespace")
	f.BoolVar(&c.flags.noHeaders, "no-headers", false, "leave out the header line of tables")
	f.StringVar(&c.flags.cluster.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster to ask, even where an agent runs on this machine")
	f.StringVar(&c.flags.cluster.Context, "context", "", "its context (default: the current one)")
	f.StringVar(&c.flags.cluster.Namespace, "system-namespace", kube.DefaultNamespace, "namespace in which Raceway is installed")
	registerFlagCompletion(root, "agent", c.completeAgents)
	registerFlagCompletion(root, "output", cobra.FixedCompletions(formatNames(), cobra.ShellCompDirectiveNoFileComp))
	registerFlagCompletion(root, "namespace", c.completeNamespaces)
}

func unknownVerb(root *cobra.Command, verb string) error {
	hint := ""
	if near := root.SuggestionsFor(verb); len(near) > 0 {
		hint = fmt.Sprintf(" did you mean %q?", strings.Join(near, `" or "`))
	}
	return usagef("there is no command %q:%s run \"raceway -h\" for the list", verb, hint)
}

// noArgs is for verbs that take flags only.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usagef("%s takes no arguments, but there is %q: run %q for examples", cmd.CommandPath(), args[0], cmd.CommandPath()+" -h")
}
