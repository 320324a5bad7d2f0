// Package perf measures what the mesh costs, on a cluster of network namespaces on this
// machine (package lab).
//
//	round 1: scenario A: bulk-1 bulk-8 …   scenario B: bulk-1 bulk-8 …   …
//	round 2: scenario A: …
//
// Each scenario of each round is a lab of its own with fresh processes: two nodes, a client
// pod, a server pod and, unless it is without mesh, a CA and an agent on each node. Load is
// made by processes of their own inside the pods. Rounds interleave the scenarios, so that
// a machine that slows down meanwhile slows all of them; what is reported is the median of
// the rounds, with the least and the greatest.
//
// Everything runs on the one machine: the CPU time is that of all of it together (client,
// server, both nodes' proxies, kernel), which is why it is the whole machine's that counts.
package perf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/perf/report"
)

// Config says what to measure. The zero value measures everything.
type Config struct {
	Scenarios []string      // by name; default all of them, without yardsticks that are not installed
	Workloads []string      // by name; default all of them
	Rounds    int           // default 5
	Duration  time.Duration // of each workload in each round; default 2 s
	Warmup    time.Duration // before it, not measured; default a fifth of Duration
	IPv6      bool
	// Rate is the fixed request rate of the paced workload; default 1000 per second.
	Rate float64
	// IdleConns is how many connections the idle workload holds; default 10,000. Where
	// each takes several descriptors of a proxy, the limit of those bounds it.
	IdleConns int
	// IdleFlows is how many flows of UDP the flows workload holds; default 2,000.
	IdleFlows int
	// Pods is how many the pods workload has captured; default 100.
	Pods int
	// Settle is how long proxies get to give back what they needed only for their start, or for
	// setting idle connections or pods up; default 25 s, which is more than an agent takes to rest.
	Settle time.Duration
	// Rules is how many rules the policies of the rules scenario have; default 10,000.
	Rules int
	// BinDir holds raceway-agent and raceway-ca; needed by all scenarios but those without mesh.
	BinDir string
	// AgentArgs are added to the agents' command lines.
	AgentArgs []string
	// HAProxy and Envoy are the paths of these yardsticks' programs; default what PATH has.
	HAProxy, Envoy string
	// Worker is the command line of a program that runs Worker with the arguments that
	// follow it. Required.
	Worker []string
	// Log tells how it goes; default nothing.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if len(c.Scenarios) == 0 {
		c.Scenarios = c.installed()
	}
	if len(c.Workloads) == 0 {
		c.Workloads = names(Workloads())
	}
	if c.Rounds == 0 {
		c.Rounds = 5
	}
	if c.Duration == 0 {
		c.Duration = 2 * time.Second
	}
	if c.Warmup == 0 {
		c.Warmup = c.Duration / 5
	}
	if c.IdleConns == 0 {
		c.IdleConns = 10000
	}
	if c.IdleFlows == 0 {
		c.IdleFlows = 2000
	}
	if c.Pods == 0 {
		c.Pods = 100
	}
	if c.Settle == 0 {
		c.Settle = 25 * time.Second
	}
	if c.Rules == 0 {
		c.Rules = 10000
	}
	if c.Rate == 0 {
		c.Rate = 1000
	}
	return c
}

// Validate reports everything that is wrong.
func (c Config) Validate() error {
	var errs []error
	for _, check := range []struct {
		what        string
		chosen, all []string
	}{
		{"scenario", c.Scenarios, names(Scenarios())},
		{"workload", c.Workloads, names(Workloads())},
	} {
		for _, name := range check.chosen {
			if !slices.Contains(check.all, name) {
				errs = append(errs, fmt.Errorf("there is no %s %q: want %s", check.what, name, strings.Join(check.all, ", ")))
			}
		}
	}
	if c.Rounds < 0 || c.Duration < 0 || c.Warmup < 0 || c.Rate < 0 || c.IdleConns < 0 || c.IdleFlows < 0 || c.Pods < 0 || c.Settle < 0 || c.Rules < 0 {
		errs = append(errs, errors.New("rounds, duration, warm-up, rate, idle connections and flows, pods, their time to settle and rules cannot be negative"))
	}
	if len(c.Worker) == 0 {
		errs = append(errs, errors.New("no worker command"))
	}
	for _, name := range c.Scenarios {
		if _, err := c.pair(name); err != nil {
			errs = append(errs, fmt.Errorf("scenario %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// NeedsMesh reports whether some scenario needs raceway-agent and raceway-ca.
func (c Config) NeedsMesh() bool {
	return len(c.Scenarios) == 0 || slices.ContainsFunc(Scenarios(), func(s Scenario) bool { return s.Mesh && slices.Contains(c.Scenarios, s.Name) })
}

func names[T interface{ name() string }](all []T) []string {
	list := make([]string, len(all))
	for i, x := range all {
		list[i] = x.name()
	}
	return list
}

func newReport(c Config) *report.Report {
	r := &report.Report{Machine: ThisMachine(), Rounds: c.Rounds, Duration: c.Duration, Rate: c.Rate, IPv6: c.IPv6}
	for _, s := range Scenarios() {
		r.Scenarios = append(r.Scenarios, report.Entry{Name: s.Name, Title: s.Title})
	}
	for _, w := range Workloads() {
		r.Workloads = append(r.Workloads, report.Entry{Name: w.Name, Title: w.Title})
	}
	r.Workloads = append(r.Workloads, report.Entry{Name: report.MemoryWorkload, Title: "memory of a proxy, the larger of both"})
	return r
}

// Run measures. It needs root.
func Run(ctx context.Context, c Config) (*report.Report, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	found := newReport(c)
	found.Machine.HAProxy, found.Machine.Envoy = c.versions()
	if load, err := strconv.ParseFloat(strings.Fields(found.Machine.Load)[0], 64); err == nil && load > float64(found.Machine.Cores)/4 {
		c.Log.Warn("the machine is busy with something else: the results will be noisy", "load", load)
	}
	for round := range c.Rounds {
		for _, s := range Scenarios() {
			if !slices.Contains(c.Scenarios, s.Name) {
				continue
			}
			c.Log.Info("measure", "round", round+1, "of", c.Rounds, "scenario", s.Name)
			if err := runScenario(ctx, c, s, found); err != nil {
				return nil, fmt.Errorf("scenario %s, round %d: %w", s.Name, round+1, err)
			}
		}
	}
	return found, nil
}
