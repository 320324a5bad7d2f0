// Command bench measures what the mesh costs on this machine, prints a table and writes JSON.
// It needs root: see package perf.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "worker" {
		return perf.Worker(ctx, args[1:], os.Stdin, os.Stdout)
	}
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	scenarios := flags.String("scenarios", "", "which, comma separated; default all: "+scenarioNames())
	workloads := flags.String("workloads", "", "which, comma separated; default all: "+workloadNames())
	rounds := flags.Int("rounds", 5, "how often each is measured, interleaved")
	duration := flags.Duration("duration", 5*time.Second, "of one measurement")
	rate := flags.Float64("rate", 1000, "requests per second of the paced workload")
	short := flags.Bool("short", false, "2 rounds of 300 ms: whether it works, not how fast")
	ipv6 := flags.Bool("ipv6", false, "pods have IPv6 addresses")
	binDir := flags.String("bin-dir", "", "directory of raceway-agent and raceway-ca; default builds them")
	agentArgs := flags.String("agent-args", "", "more arguments for the agents, space separated")
	out := flags.String("out", "perf/results", "directory for the JSON")
	haproxy := flags.String("haproxy", "", "HAProxy's program; default what PATH has")
	envoy := flags.String("envoy", os.Getenv("RACEWAY_ENVOY"), "Envoy's program; default RACEWAY_ENVOY, or what PATH has")
	verbose := flags.Bool("v", false, "say more")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	if *short {
		*rounds, *duration = 2, 300*time.Millisecond
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	config := perf.Config{
		Scenarios: list(*scenarios), Workloads: list(*workloads), Rounds: *rounds, Duration: *duration, Rate: *rate,
		HAProxy: *haproxy, Envoy: *envoy,
		IPv6: *ipv6, BinDir: *binDir, AgentArgs: strings.Fields(*agentArgs), Worker: []string{self, "worker"},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	}
	return bench(ctx, config, *out)
}

func bench(ctx context.Context, config perf.Config, out string) error {
	if err := config.Validate(); err != nil {
		return err
	}
	if config.BinDir == "" && config.NeedsMesh() {
		dir, err := os.MkdirTemp("", "raceway-bench-")
		if err != nil {
			return fmt.Errorf("make a directory to build into: %w", err)
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory, and the results are more important
		if err := lab.Build(ctx, lab.BuildOptions{Dir: dir}, "raceway-agent", "raceway-ca"); err != nil {
			return err
		}
		config.BinDir = dir
	}
	report, err := perf.Run(ctx, config)
	if err != nil {
		return err
	}
	if err := report.WriteTable(os.Stdout); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	path, err := report.WriteJSON(out)
	if err != nil {
		return err
	}
	_, err = fmt.Println("\nAll rounds are in " + path)
	return err
}

// list splits a flag's value; "" is none.
func list(value string) []string {
	return slices.DeleteFunc(strings.Split(value, ","), func(s string) bool { return s == "" })
}

func scenarioNames() string {
	var names []string
	for _, s := range perf.Scenarios() {
		names = append(names, s.Name)
	}
	return strings.Join(names, ", ")
}

func workloadNames() string {
	var names []string
	for _, w := range perf.Workloads() {
		names = append(names, w.Name)
	}
	return strings.Join(names, ", ")
}
