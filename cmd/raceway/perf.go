package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/perf/report"
)

func newPerf(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "perf",
		Short: "Measure what the mesh costs, and compare with what it did",
		Long: `Measure throughput, latency, new connections and memory with the mesh, without it and beside
others, all in one run; and compare the results of two runs.`,
		Example: `  raceway perf run --short
  raceway perf job --client-node a --server-node b
  raceway perf compare before.json after.json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPerfRun(c), newPerfJob(c), newPerfSoak(c), newPerfCompare(c), newPerfShow(c))
	addPerfWorkers(cmd)
	return cmd
}

func newPerfCompare(c *cli) *cobra.Command {
	var (
		t   report.Thresholds
		all bool
	)
	cmd := &cobra.Command{
		Use:   "compare BEFORE.json AFTER.json",
		Short: "Tell what became slower or dearer between two results",
		Long: `Compare two results of ` + "`raceway perf run`" + `, metric by metric. A change counts when the
Mann-Whitney U test takes the rounds for those of two different things, and the medians differ
by more than --ratio. It takes at least four rounds on each side to tell.

The exit code is 1 when something became worse.`,
		Example: "  raceway perf compare before.json after.json",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s takes two results, but there are %d arguments: run %q for examples", cmd.CommandPath(), len(args), cmd.CommandPath()+" -h")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			before, err := report.Read(args[0])
			if err != nil {
				return usageError{err}
			}
			after, err := report.Read(args[1])
			if err != nil {
				return usageError{err}
			}
			comparison := report.Compare(before, after, t)
			if err := comparison.WriteTable(c.out, all); err != nil {
				return err
			}
			if worse := comparison.Regressions(); len(worse) > 0 {
				return fmt.Errorf("%d metrics became worse: %w", len(worse), errFound)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Float64Var(&t.Alpha, "alpha", 0.05, "how likely chance may be for a change that counts")
	f.Float64Var(&t.Ratio, "ratio", 0.05, "how much of the median a change must be to count")
	f.BoolVar(&all, "all", false, "show what did not change, too")
	return cmd
}

func newPerfShow(c *cli) *cobra.Command {
	plots := ""
	cmd := &cobra.Command{
		Use:     "show RESULT.json",
		Short:   "Show a result as a table with its targets, and draw its plots",
		Long:    "Print the table of a result, and what it reached of the targets; with --plots, draw it too.",
		Example: "  raceway perf show result.json --plots .",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("%s takes one result, but there are %d arguments", cmd.CommandPath(), len(args))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			found, err := report.Read(args[0])
			if err != nil {
				return usageError{err}
			}
			if err := c.showReport(found); err != nil || plots == "" {
				return err
			}
			path, err := found.WritePlots(plots)
			if err != nil {
				return err
			}
			return c.say("drawn in %s", path)
		},
	}
	cmd.Flags().StringVar(&plots, "plots", "", "directory for an SVG; default none is drawn")
	return cmd
}

// showReport prints the table, and below it what was reached of the targets.
func (c *cli) showReport(r *report.Report) error {
	if err := r.WriteTable(c.out); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	if err := c.say(""); err != nil {
		return err
	}
	if err := r.WriteTargets(c.out); err != nil {
		return fmt.Errorf("print the targets: %w", err)
	}
	return nil
}
