package perf

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf/report"
)

// memory is what a proxy holds.
type memory struct {
	rss  uint64
	heap uint64 // in use by Go's heap and stacks; 0 of a proxy that does not say
}

// sides are the proxies by the end of the link at which they are. On one node the client's
// serves both ends.
func (st *site) sides() map[string]*lab.Process {
	if st.scenario.Yardstick {
		return map[string]*lab.Process{"server": st.relays[0], "client": st.relays[1]}
	}
	all := make(map[string]*lab.Process)
	for side, pod := range map[string]*lab.Pod{"server": st.server, "client": st.client} {
		if a := st.lab.Agent(pod.Node); a != nil {
			all[side] = a.Process
		}
	}
	if st.scenario.SameNode {
		delete(all, "server")
	}
	return all
}

// idle measures open connections.
func (st *site) idle(ctx context.Context, found *report.Report) error {
	return st.hold(ctx, found, task{Workload: report.IdleWorkload, Conns: st.config.IdleConns})
}

// flows measures flows of UDP.
func (st *site) flows(ctx context.Context, found *report.Report) error {
	return st.hold(ctx, found, task{Workload: report.FlowsWorkload, Conns: st.config.IdleFlows})
}

// hold measures what an open connection on which nothing moves, or a flow, costs the proxies beyond
// the kernel's memory, and that each of them still works afterwards.
func (st *site) hold(ctx context.Context, found *report.Report, t task) error {
	workload, conns := t.Workload, t.Conns
	if st.scenario.Mesh { // an agent gives back what its start took
		if err := errors.Join(st.settle(ctx), st.memory(found, "at rest")); err != nil {
			return err
		}
	}
	before, err := st.held(ctx)
	if err != nil {
		return err
	}
	t.To = st.target()
	argument, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("write the task: %w", err)
	}
	w, err := st.startWorker(st.client, "hold", string(argument))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*setupTimeout+time.Duration(conns)*10*time.Millisecond)
	defer cancel()
	if err := w.expect(ctx, "ready"); err != nil {
		return errors.Join(err, st.limitsReached(ctx))
	}
	if err := st.settle(ctx); err != nil {
		return err
	}
	after, err := st.held(ctx)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w.in, "\n"); err != nil {
		return fmt.Errorf("have the connections asked: %w", err)
	}
	if _, err := w.line(ctx); err != nil {
		return err
	}
	what := "connections"
	if st.scenario.udp {
		what = "flows"
	}
	found.Add(st.scenario.Name, workload, what, "held", float64(conns))
	for _, side := range []string{"client", "server"} {
		if _, there := after[side]; !there {
			continue
		}
		each := func(after, before uint64) float64 { return (float64(after) - float64(before)) / float64(conns) / 1000 }
		found.Add(st.scenario.Name, workload, "RSS "+side, "kB each", each(after[side].rss, before[side].rss))
		if after[side].heap > 0 {
			found.Add(st.scenario.Name, workload, "Go memory "+side, "kB each", each(after[side].heap, before[side].heap))
		}
	}
	return w.process.Wait(ctx)
}

// holding is c for a lab of its own that holds idle connections or flows: as many as its proxies can, and
// agents that are allowed so many.
func (c Config) holding(s Scenario) (Config, error) {
	limit, err := descriptors()
	if err != nil {
		return c, err
	}
	c.IdleConns = min(c.IdleConns, (limit-512)/s.descriptors())
	c.IdleFlows = min(c.IdleFlows, (limit-512)/s.descriptors())
	bound := strconv.Itoa(max(c.IdleConns, c.IdleFlows) * s.ends())
	c.AgentArgs = append([]string{"--pod-connections", bound, "--node-connections", bound}, c.AgentArgs...)
	return c, nil
}

// settle leaves the proxies alone.
func (st *site) settle(ctx context.Context) error {
	select {
	case <-time.After(st.config.Settle):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// limitsReached is an error that names the limits of agents that bit, nil when none did.
func (st *site) limitsReached(ctx context.Context) error {
	var errs []error
	for _, n := range st.lab.Nodes() {
		a := st.lab.Agent(n)
		if a == nil {
			continue
		}
		metrics, err := a.Metrics(ctx)
		if err != nil {
			return err
		}
		for line := range strings.Lines(metrics) {
			if strings.HasPrefix(line, "raceway_limit_reached_total") {
				errs = append(errs, fmt.Errorf("%s says %s", n.Name, strings.TrimSpace(line)))
			}
		}
	}
	return errors.Join(errs...)
}

// held is what the proxy at each side holds now.
func (st *site) held(ctx context.Context) (map[string]memory, error) {
	all := make(map[string]memory)
	for side, p := range st.sides() {
		u, err := p.Usage()
		if err != nil {
			return nil, err
		}
		m := memory{rss: u.RSS}
		for _, n := range st.lab.Nodes() {
			a := st.lab.Agent(n)
			if a == nil || a.Process != p {
				continue
			}
			metrics, err := a.Metrics(ctx)
			if err != nil {
				return nil, err
			}
			m.heap = uint64(gauge(metrics, "go_memstats_heap_inuse_bytes") + gauge(metrics, "go_memstats_stack_inuse_bytes"))
		}
		all[side] = m
	}
	return all, nil
}

// gauge is the value of a metric without labels in Prometheus' text format; 0 when there is none.
func gauge(metrics, name string) float64 {
	for line := range strings.Lines(metrics) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, _ := strconv.ParseFloat(strings.TrimSpace(value), 64) // then it is 0
			return v
		}
	}
	return 0
}

// descriptors is how many a connection takes in one process: of one end where connections
// share a tunnel, of both where they do not, and two pipes more where bytes are spliced.
func (s Scenario) descriptors() int {
	switch {
	case s.Name == "relay-plain", s.PassThrough, s.SameNode:
		return 6
	case s.Yardstick:
		return 2
	}
	return 1
}

// ends is how many ends of a connection are at one agent.
func (s Scenario) ends() int {
	if s.SameNode {
		return 2
	}
	return 1
}

// descriptors is how many a process can have open.
func descriptors() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	return int(min(limit.Max, 1<<20)), nil
}
