//go:build !linux

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newPerfRun(*cli) *cobra.Command {
	return &cobra.Command{
		Use:     "run",
		Short:   "Measure on this machine",
		Example: "  raceway perf run",
		RunE:    func(*cobra.Command, []string) error { return errors.New("the benchmark needs Linux") },
	}
}

func newPerfJob(*cli) *cobra.Command {
	return &cobra.Command{
		Use:     "job",
		Short:   "Measure between two nodes of a cluster",
		Example: "  raceway perf job --client-node a --server-node b",
		RunE:    func(*cobra.Command, []string) error { return errors.New("the benchmark needs Linux") },
	}
}

func newPerfSoak(*cli) *cobra.Command {
	return &cobra.Command{
		Use:     "soak",
		Short:   "Put a long mixed load on the mesh, and look for what is lost or leaks",
		Example: "  raceway perf soak",
		RunE:    func(*cobra.Command, []string) error { return errors.New("the benchmark needs Linux") },
	}
}

func addPerfWorkers(*cobra.Command) {}
