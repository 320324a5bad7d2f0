package demo

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

const (
	loadConns    = 8
	loadRate     = 500 // requests per second
	loadDuration = 3 * time.Second
	loadWarmup   = 300 * time.Millisecond
)

// measurement is what a load of fixed rate took.
type measurement struct {
	latency traffic.Latency
	machine time.Duration // CPU time of everything on this machine
	agents  time.Duration // of it, that of the two agents
}

// measure makes a short load from web to db.
func (s *story) measure(ctx context.Context) (m measurement, err error) {
	question := loadQuestion{Target: s.db.pod.AddrPort(loadPort), Conns: loadConns, Rate: loadRate, Duration: loadWarmup}
	var result traffic.RateResult
	if err := s.web.ask(ctx, "load", question, &result); err != nil {
		return m, err
	}
	machine, agents, err := s.busy()
	if err != nil {
		return m, err
	}
	question.Duration = loadDuration
	if err := s.web.ask(ctx, "load", question, &result); err != nil {
		return m, err
	}
	machineAfter, agentsAfter, err := s.busy()
	return measurement{result.Latency, machineAfter - machine, agentsAfter - agents}, err
}

// busy is the CPU time that the machine and the agents have used so far.
func (s *story) busy() (machine, agents time.Duration, err error) {
	if machine, err = machineBusy(); err != nil {
		return 0, 0, err
	}
	for _, n := range s.lab.Nodes() {
		u, err := s.lab.Agent(n).Usage()
		if err != nil {
			return 0, 0, err
		}
		agents += u.User + u.System
	}
	return machine, agents, nil
}

// machineBusy adds up the first line of /proc/stat, without what is idle:
// cpu user nice system idle iowait irq softirq steal guest guest_nice (proc(5)).
func machineBusy() (time.Duration, error) {
	// USER_HZ is 100 on every Linux that Go runs on.
	const tick = 10 * time.Millisecond
	content, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read the machine's CPU time: %w", err)
	}
	line, _, _ := strings.Cut(string(content), "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("read the machine's CPU time: /proc/stat begins with %q", line)
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the machine's CPU time: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick, nil
}

func (s *story) showCost() {
	p := s.page
	p.say("What it cost, for %d requests of 1 KiB a second from web to db on %d connections, in %d s each:", loadRate, loadConns, loadDuration/time.Second)
	p.block(costTable(s.plainly, s.meshed))
	if busy := time.Duration(runtime.NumCPU()) * loadDuration * 9 / 10; max(s.plainly.machine, s.meshed.machine) > busy {
		p.note("This machine was busy throughout, so the numbers mean little: something else runs on it.")
	}
	p.note("Clients, servers, both nodes and whatever else runs share this machine's %d processors. \"make bench\" measures with more care.", runtime.NumCPU())
}

func costTable(plainly, meshed measurement) string {
	var b strings.Builder
	row := func(name, p50, p99, machine, agents string) {
		fmt.Fprintf(&b, "%-14s %10s %10s %20s %12s\n", name, p50, p99, machine, agents)
	}
	row("", "p50", "p99", "CPU, whole machine", "CPU, agents")
	for _, m := range []struct {
		name string
		measurement
	}{{"without mesh", plainly}, {"through HBONE", meshed}} {
		row(m.name, micros(m.latency.P50), micros(m.latency.P99), seconds(m.machine), seconds(m.agents))
	}
	return b.String()
}

func micros(d time.Duration) string {
	if d >= 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%d µs", d.Microseconds())
}
