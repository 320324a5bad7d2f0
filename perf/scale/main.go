// Command scale measures what discovery costs on a large cluster: one agent's memory, CPU time
// and time to converge, and what changes of pods cost it and the API server.
//
//	make kubernetes && go run ./perf/scale
//
// etcd and the API server are real (package cluster) and alone: there are no kubelets and no
// controllers, so that 50,000 pods are as many objects and nothing more. Their status and
// their EndpointSlices are written as kubelets and the controller would. What is measured is
// discovery/kube with its Store, as the agent of one node has it, in processes of its own.
// It needs root, for a network namespace.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "source" {
		return runSource(ctx, args[1:])
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	c := Config{Self: []string{self}}
	flags := flag.NewFlagSet("scale", flag.ExitOnError)
	flags.IntVar(&c.Nodes, "nodes", 1000, "how many nodes")
	flags.IntVar(&c.Pods, "pods", 50_000, "how many pods")
	flags.IntVar(&c.Services, "services", 5000, "how many services, with an EndpointSlice each")
	flags.IntVar(&c.Policies, "policies", 1000, "how many policies")
	flags.IntVar(&c.Sources, "sources", 10, "how many agents' sources watch in the last round")
	flags.Float64Var(&c.Rate, "rate", 100, "changes of pods per second")
	flags.DurationVar(&c.Duration, "duration", time.Minute, "of the changes, in each round")
	flags.DurationVar(&c.Settling, "settling", 10*time.Second, "after a start: its garbage goes, and the file of the last good snapshot is written")
	out := flags.String("out", "perf/results", "directory for the JSON")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	report, err := Measure(ctx, c)
	if err != nil {
		return err
	}
	if err := report.WriteTable(os.Stdout); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	path, err := report.WriteJSON(*out)
	if err != nil {
		return err
	}
	_, err = fmt.Println("\nAll of it is in " + path)
	return err
}

// Config says what to measure.
type Config struct {
	Nodes, Pods, Services, Policies int
	Sources                         int
	Rate                            float64 // changes of pods per second
	Duration                        time.Duration
	Settling                        time.Duration // after a start
	Self                            []string      // the command line of this program
	Log                             *slog.Logger
}

// Validate reports everything that is wrong.
func (c Config) Validate() error {
	var errs []error
	if c.Nodes < 2 || c.Nodes > c.Pods || c.Services < 1 || c.Services > c.Pods || c.Policies < 0 || c.Sources < 1 || c.Sources > c.Nodes {
		errs = append(errs, errors.New("want two nodes or more, a pod at least for each node and for each service, and at most as many sources as nodes"))
	}
	if c.Pods > 250*c.Nodes || c.Nodes > 1<<16 {
		errs = append(errs, errors.New("a node has addresses for 250 pods, and there are those of 65,536 nodes"))
	}
	if c.Rate <= 0 || c.Duration < time.Second {
		errs = append(errs, errors.New("want a rate of changes, and a second or more of them"))
	}
	return errors.Join(errs...)
}
