package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/perf"
)

// perfRun is one run of the verb.
type perfRun struct {
	perf.Config
	short, verbose bool
	agentArgs, out string
}

func newPerfRun(c *cli) *cobra.Command {
	var r perfRun
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Measure on this machine, into a table, JSON and plots",
		Long: `Measure on clusters of network namespaces on this machine, which come and go: without mesh,
through HBONE, and through pairs of relays that are yardsticks (bare Go, HAProxy, Envoy). What
is measured is interleaved in rounds; the table shows medians, and below it stand the targets
that the run covers. It needs root, and raceway-agent and raceway-ca beside this program.`,
		Example: `  raceway perf run
  raceway perf run --scenarios relay-tls,hbone-cross --workloads bulk-1,bulk-8 --rounds 7`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := endable(cmd.Context())
			defer stop()
			config, err := r.config(c, cmd)
			if err != nil {
				return err
			}
			if err := config.Validate(); err != nil {
				return usageError{err}
			}
			found, err := perf.Run(ctx, config)
			if err != nil {
				return err
			}
			if err := c.showReport(found); err != nil {
				return err
			}
			path, err := found.WriteJSON(r.out)
			if err != nil {
				return err
			}
			plots, err := found.WritePlots(r.out)
			if err != nil {
				return err
			}
			if plots != "" {
				plots = ", and drawn in " + plots
			}
			return c.say("\nAll rounds are in %s%s.", path, plots)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&r.Scenarios, "scenarios", nil, "which; default all: "+strings.Join(perf.ScenarioNames(), ", "))
	f.StringSliceVar(&r.Workloads, "workloads", nil, "which; default all: "+strings.Join(perf.WorkloadNames(), ", "))
	f.IntVar(&r.Rounds, "rounds", 5, "how often each is measured, interleaved")
	f.DurationVar(&r.Duration, "duration", 2*time.Second, "of one measurement")
	f.Float64Var(&r.Rate, "rate", 1000, "requests per second of the paced workloads")
	f.IntVar(&r.IdleConns, "idle", 10000, "connections of the idle workload")
	f.IntVar(&r.IdleFlows, "flows", 2000, "flows of UDP of the flows workload")
	f.IntVar(&r.Pods, "pods", 100, "pods of the workload that captures many")
	f.IntVar(&r.Rules, "rules", 10000, "rules of the scenario with many policies")
	f.BoolVar(&r.short, "short", false, "2 rounds of 300 ms of the main workloads: whether it works, not how fast")
	f.BoolVar(&r.IPv6, "ipv6", false, "pods have IPv6 addresses")
	f.StringVar(&r.BinDir, "bin-dir", "", "directory of raceway-agent and raceway-ca; default that of this program")
	f.StringVar(&r.agentArgs, "agent-args", "", "more arguments for the agents, space separated")
	f.StringVar(&r.HAProxy, "haproxy", "", "HAProxy's program; default what PATH has")
	f.StringVar(&r.Envoy, "envoy", os.Getenv("RACEWAY_ENVOY"), "Envoy's program; default RACEWAY_ENVOY, or what PATH has")
	f.StringVar(&r.out, "out", "perf/results", "directory for the JSON and the plots")
	f.BoolVar(&r.verbose, "verbose", false, "say more")
	return cmd
}

func newPerfSoak(c *cli) *cobra.Command {
	var r perfRun
	cmd := &cobra.Command{
		Use:   "soak",
		Short: "Put a long mixed load on the mesh, and look for what is lost or leaks",
		Long: `Put a mixed load on a cluster of network namespaces on this machine: streams with checksums,
half-closes, slow readers, requests and resets, while policies change. The exit code is 1 when
something is lost or changed, or when an agent leaks goroutines, descriptors or memory.`,
		Example:           "  raceway perf soak --duration 1h",
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := endable(cmd.Context())
			defer stop()
			config, err := r.config(c, cmd)
			if err != nil {
				return err
			}
			d := config.Duration
			config.Duration = 0
			found, err := perf.Soak(ctx, config, d)
			if err != nil {
				return demoError{err}
			}
			content, err := json.MarshalIndent(found, "", "  ")
			if err != nil {
				return fmt.Errorf("print what was found: %w", err)
			}
			return c.say("%s", content)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&r.Duration, "duration", time.Minute, "of the load")
	f.BoolVar(&r.IPv6, "ipv6", false, "pods have IPv6 addresses")
	f.StringVar(&r.BinDir, "bin-dir", "", "directory of raceway-agent and raceway-ca; default that of this program")
	f.StringVar(&r.agentArgs, "agent-args", "", "more arguments for the agents, space separated")
	f.BoolVar(&r.verbose, "verbose", false, "say more")
	return cmd
}

func (r *perfRun) config(c *cli, cmd *cobra.Command) (perf.Config, error) {
	self, err := os.Executable()
	if err != nil {
		return perf.Config{}, fmt.Errorf("find this program: %w", err)
	}
	if r.BinDir == "" {
		r.BinDir = filepath.Dir(self)
	}
	if r.short {
		r.Rounds, r.Duration = 2, 300*time.Millisecond
		if !cmd.Flags().Changed("workloads") {
			r.Workloads = perf.ShortWorkloads()
		}
	}
	level := slog.LevelInfo
	if r.verbose {
		level = slog.LevelDebug
	}
	r.AgentArgs = strings.Fields(r.agentArgs)
	r.Worker = []string{self, "perf", "worker", "--"}
	r.Log = slog.New(slog.NewTextHandler(c.errOut, &slog.HandlerOptions{Level: level}))
	return r.Config, nil
}

// addPerfWorkers adds the process inside the benchmark's pods.
func addPerfWorkers(parent *cobra.Command) {
	parent.AddCommand(&cobra.Command{
		Use: "worker", Hidden: true, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return perf.Worker(cmd.Context(), args, cmd.InOrStdin(), os.Stdout)
		},
	})
}
