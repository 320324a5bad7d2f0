package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/perf"
)

// startTimeout is for a source to know the cluster.
const startTimeout = 5 * time.Minute

// Measure makes a cluster and measures on it. It needs root.
func Measure(ctx context.Context, c Config) (_ *Report, err error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	report := &Report{
		Machine: perf.ThisMachine(),
		Nodes:   c.Nodes, Pods: c.Pods, Services: c.Services, Policies: c.Policies, Rate: c.Rate, Duration: c.Duration,
	}
	s, err := newSite(ctx, c)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	api, _ := s.plane.Processes()
	if report.APIServerBytes, _, err = memory(api); err != nil {
		return nil, err
	}
	file := filepath.Join(s.dir, "snapshot.json.gz")
	for _, o := range []struct {
		name string
		sourceOptions
	}{
		{"streamed list (WatchList)", sourceOptions{file: file}},
		{"plain list", sourceOptions{list: true}},
		{"last good snapshot, then streamed list", sourceOptions{file: file, readFile: true}},
	} {
		c.Log.Info("measure a start", "from", o.name)
		start, err := s.measureStart(ctx, o.name, o.sourceOptions)
		if err != nil {
			return nil, fmt.Errorf("start from %s: %w", o.name, err)
		}
		report.Starts = append(report.Starts, start)
	}
	for _, sources := range slices.Compact([]int{0, 1, c.Sources}) {
		c.Log.Info("measure changes", "sources", sources)
		load, err := s.measureLoad(ctx, sources)
		if err != nil {
			return nil, fmt.Errorf("changes with %d sources: %w", sources, err)
		}
		report.Loads = append(report.Loads, load)
	}
	return report, nil
}

// used is the CPU time of processes.
func used(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		t, err := cpuTime(pid)
		if err != nil {
			return 0, err
		}
		sum += t
	}
	return sum, nil
}

// measureStart measures how a source gets to know the cluster.
func (s *site) measureStart(ctx context.Context, name string, o sourceOptions) (_ Start, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	api, _ := s.plane.Processes()
	before, err := used(api)
	if err != nil {
		return Start{}, err
	}
	p, err := s.start(ctx, o)
	if err != nil {
		return Start{}, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	out := Start{Name: name}
	if err := p.await(ctx, "its first snapshot", func() bool { return !p.published.IsZero() }); err != nil {
		return Start{}, err
	}
	out.Published = p.published.Sub(p.started)
	if out.PublishedCPU, err = used(p.cmd.Process.Pid); err != nil {
		return Start{}, err
	}
	if err := p.await(ctx, "a snapshot of all", func() bool { return !p.current.IsZero() }); err != nil {
		return Start{}, err
	}
	out.Current = p.current.Sub(p.started)
	if out.CurrentCPU, err = used(p.cmd.Process.Pid); err != nil {
		return Start{}, err
	}
	if out.Received, err = received(p.cmd.Process.Pid); err != nil {
		return Start{}, err
	}
	after, err := used(api)
	if err != nil {
		return Start{}, err
	}
	out.APIServerCPU = after - before
	select {
	case <-ctx.Done():
		return Start{}, context.Cause(ctx)
	case <-time.After(s.config.Settling):
	}
	now, err := p.ask(ctx)
	if err != nil {
		return Start{}, err
	}
	if err := s.complete(now); err != nil {
		return Start{}, err
	}
	out.Heap, out.HeapPerPod = now.Heap, now.Heap/uint64(s.config.Pods)
	out.Resident, out.ResidentPeak, err = memory(p.cmd.Process.Pid)
	return out, err
}

// complete reports what a source does not know, of what it was measured with.
func (s *site) complete(now stats) error {
	c := s.config
	// The API server has a service of its own.
	if now.Workloads != c.Pods || now.Services != c.Services+1 || now.Policies != c.Policies || now.Captured != c.Pods {
		return fmt.Errorf("the source knows %d pods, %d of them captured, %d services and %d policies", now.Workloads, now.Captured, now.Services, now.Policies)
	}
	return nil
}

// measureLoad changes pods while that many sources watch.
func (s *site) measureLoad(ctx context.Context, sources int) (_ Load, err error) {
	own, foreign := s.probes()
	var watching []*source
	defer func() {
		for _, p := range watching {
			err = errors.Join(err, p.stop())
		}
	}()
	started, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for n := range sources {
		o := sourceOptions{node: n, file: filepath.Join(s.dir, fmt.Sprintf("snapshot-%d.json.gz", n))}
		if n == 0 {
			o.pods = []string{string(own.uid), string(foreign.uid)}
		}
		p, err := s.start(ctx, o)
		if err != nil {
			return Load{}, err
		}
		watching = append(watching, p)
		// One after the other: a herd is not what this is about.
		if err := p.await(started, "a snapshot of all", func() bool { return !p.current.IsZero() }); err != nil {
			return Load{}, err
		}
	}
	select {
	case <-ctx.Done():
		return Load{}, context.Cause(ctx)
	case <-time.After(s.config.Settling):
	}
	m := &meter{site: s, watching: watching}
	if err := m.read(ctx, 1); err != nil {
		return Load{}, err
	}
	out := Load{Sources: sources}
	if err := s.run(ctx, watching, own, foreign, &out); err != nil {
		return Load{}, err
	}
	if err := m.read(ctx, -1); err != nil {
		return Load{}, err
	}
	m.fill(&out)
	return out, nil
}

// run changes pods for the configured time.
func (s *site) run(ctx context.Context, watching []*source, own, foreign *pod, out *Load) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.Duration)
	defer cancel()
	probes := make(map[*pod]bool)
	latencies := make(map[*pod][]time.Duration)
	var mu sync.Mutex
	var errs []error
	var all, routing sync.WaitGroup
	done := make(chan struct{})
	if len(watching) > 0 {
		seen := map[string]chan event{string(own.uid): make(chan event, 1), string(foreign.uid): make(chan event, 1)}
		routing.Go(func() { route(watching[0].events, seen, done) })
		for _, p := range []*pod{own, foreign} {
			probes[p] = true
			all.Go(func() {
				l, err := s.probe(ctx, p, seen[string(p.uid)])
				mu.Lock()
				defer mu.Unlock()
				latencies[p], errs = l, append(errs, err)
			})
		}
	}
	start := time.Now()
	changes, err := s.load(ctx, probes)
	out.Took = time.Since(start)
	cancel()
	all.Wait()
	close(done)
	routing.Wait()
	out.Changes = float64(changes+len(latencies[own])+len(latencies[foreign])) / out.Took.Seconds()
	out.Own, out.Foreign = quantiles(latencies[own]), quantiles(latencies[foreign])
	return errors.Join(append(errs, err)...)
}

// route gives each probe the events of its pod, until done.
func route(events <-chan event, seen map[string]chan event, done <-chan struct{}) {
	for {
		select {
		case e, going := <-events:
			if !going {
				for _, c := range seen {
					close(c)
				}
				return
			}
			seen[e.Pod] <- e
		case <-done:
			return
		}
	}
}

// quantiles are those of latencies; all zero when there are none.
func quantiles(all []time.Duration) Latency {
	if len(all) == 0 {
		return Latency{}
	}
	slices.Sort(all)
	at := func(q float64) time.Duration { return all[int(q*float64(len(all)-1))] }
	return Latency{Count: len(all), P50: at(0.5), P99: at(0.99), Max: all[len(all)-1]}
}

// meter adds up what processes have used between two readings.
type meter struct {
	site     *site
	watching []*source

	sources, api, etcd time.Duration
	snapshots          int
	allocated          int64
	received           int64
	peak, apiPeak      uint64
}

func (m *meter) read(ctx context.Context, sign int) error {
	api, etcd := m.site.plane.Processes()
	pids := make([]int, 0, len(m.watching))
	// At the beginning the asking is not measured, nor at the end.
	ask := func() error {
		for _, p := range m.watching {
			now, err := p.ask(ctx)
			if err != nil {
				return err
			}
			m.snapshots -= sign * now.Snapshots
			m.allocated -= int64(sign) * int64(now.Allocated)
		}
		return nil
	}
	if sign > 0 {
		if err := ask(); err != nil {
			return err
		}
	}
	for _, p := range m.watching {
		pids = append(pids, p.cmd.Process.Pid)
		_, most, err := memory(p.cmd.Process.Pid)
		if err != nil {
			return err
		}
		m.peak = max(m.peak, most)
		got, err := received(p.cmd.Process.Pid)
		if err != nil {
			return err
		}
		m.received -= int64(sign) * int64(got)
	}
	_, apiPeak, err := memory(api)
	if err != nil {
		return err
	}
	m.apiPeak = apiPeak
	for _, part := range []struct {
		sum  *time.Duration
		pids []int
	}{{&m.sources, pids}, {&m.api, []int{api}}, {&m.etcd, []int{etcd}}} {
		t, err := used(part.pids...)
		if err != nil {
			return err
		}
		*part.sum -= time.Duration(sign) * t
	}
	if sign < 0 {
		return ask()
	}
	return nil
}

func (m *meter) fill(out *Load) {
	seconds := out.Took.Seconds()
	out.APIServerPeak = m.apiPeak
	out.APIServerCores, out.EtcdCores = m.api.Seconds()/seconds, m.etcd.Seconds()/seconds
	if n := float64(len(m.watching)); n > 0 {
		out.SourceCores = m.sources.Seconds() / seconds / n
		out.Snapshots = float64(m.snapshots) / seconds / n
		out.Allocated = uint64(float64(m.allocated) / seconds / n)
		out.Received = uint64(float64(m.received) / seconds / n)
		out.ResidentPeak = m.peak
	}
}
