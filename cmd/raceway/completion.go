package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// completionTimeout bounds how long a Tab key waits for an agent.
const completionTimeout = 2 * time.Second

// registerFlagCompletion panics for a flag that does not exist: a mistake of this program.
func registerFlagCompletion(cmd *cobra.Command, flag string, fn cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, fn); err != nil {
		panic(err)
	}
}

func (c *cli) completeAgents(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var offers []string
	ctx, cancel := completionContext(cmd)
	defer cancel()
	if f, err := c.fleet(); err == nil {
		all, _ := f.agents(ctx) // a completion has nowhere to report to
		for _, a := range all {
			offers = append(offers, a.name)
		}
	}
	return append(offers, allAgents), cobra.ShellCompDirectiveDefault // or a path
}

func (c *cli) completeNamespaces(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, w := range completionRows(cmd, c, func(ctx context.Context, a agent) ([]admin.Workload, error) { return a.Workloads(ctx) }) {
		names = append(names, w.Namespace)
	}
	slices.Sort(names)
	return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
}

// completeWhy offers pods for the source, services with their ports for the destination.
func (c *cli) completeWhy(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	var offers []string
	switch len(args) {
	case 0:
		for _, w := range completionRows(cmd, c, func(ctx context.Context, a agent) ([]admin.Workload, error) { return a.Workloads(ctx) }) {
			if c.flags.namespace == "" || c.flags.namespace == w.Namespace {
				offers = append(offers, w.Namespace+"/"+w.Name)
			}
		}
	case 1:
		for _, s := range completionRows(cmd, c, func(ctx context.Context, a agent) ([]admin.Service, error) { return a.Services(ctx) }) {
			for _, p := range s.Ports {
				offers = append(offers, fmt.Sprintf("%s.%s:%d", s.Name, s.Namespace, p))
			}
		}
	}
	slices.Sort(offers)
	offers = slices.DeleteFunc(slices.Compact(offers), func(o string) bool { return !strings.HasPrefix(o, typed) })
	return offers, cobra.ShellCompDirectiveNoFileComp
}

// completionContext bounds how long an answer is waited for.
func completionContext(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	return context.WithTimeout(parent, completionTimeout)
}

// completionRows is empty when no agent answers.
func completionRows[T any](cmd *cobra.Command, c *cli, fetch func(context.Context, agent) ([]T, error)) []T {
	ctx, cancel := completionContext(cmd)
	defer cancel()
	agents, err := c.anyAgents(ctx)
	if err != nil {
		return nil
	}
	var all []T
	for _, a := range ask(ctx, agents, fetch) {
		all = append(all, a.value...)
	}
	return all
}
