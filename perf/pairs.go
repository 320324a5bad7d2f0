package perf

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/perf/report"
)

// Remote runs Worker with args inside a pod, joined to its input and output. Closing the stream
// ends its input; a read's error says why a worker failed.
type Remote func(ctx context.Context, args ...string) (io.ReadWriteCloser, error)

// Pair is a client's pod and a server's, which runs the worker `serve`.
type Pair struct {
	report.Entry
	Client Remote
	Server netip.Addr
}

// RunPairs measures between pods of a cluster: the pairs in turn, in each of the rounds. Nodes has
// a pod of each node that takes part, whose machines' CPU time is added up; the first one's is
// described. Of c it uses Workloads (those that are no load of a client's, and those of UDP, are not
// possible; by default ShortLoads), Rounds, Duration, Warmup, Rate and Log.
func RunPairs(ctx context.Context, c Config, pairs []Pair, nodes []Remote) (_ *report.Report, err error) {
	if len(c.Workloads) == 0 {
		c.Workloads = ShortLoads()
	}
	workloads, err := loads(c.Workloads)
	if err != nil {
		return nil, err
	}
	c.Scenarios = nil
	for _, p := range pairs {
		c.Scenarios = append(c.Scenarios, p.Name)
	}
	c = c.withDefaults()
	found := &report.Report{Rounds: c.Rounds, Duration: c.Duration, Rate: c.Rate}
	if found.Machine, err = remoteMachine(ctx, nodes[0]); err != nil {
		return nil, err
	}
	for _, p := range pairs {
		found.Scenarios = append(found.Scenarios, p.Entry)
		found.IPv6 = p.Server.Is6()
	}
	for _, w := range workloads {
		found.Workloads = append(found.Workloads, report.Entry{Name: w.Name, Title: w.Title})
	}
	var meters meters
	defer func() { err = errors.Join(err, meters.close()) }()
	for _, n := range nodes {
		m, err := dialWorker(ctx, n, "meter")
		if err != nil {
			return nil, err
		}
		meters = append(meters, m)
	}
	for round := range c.Rounds {
		for _, p := range pairs {
			c.Log.Info("measure", "round", round+1, "of", c.Rounds, "scenario", p.Name)
			for _, w := range workloads {
				t := task{Workload: w.Name, To: netip.AddrPortFrom(p.Server, serverPort), Duration: c.Duration, Warmup: c.Warmup, Rate: c.Rate}
				got, used, err := p.load(ctx, t, meters)
				if err != nil {
					return nil, fmt.Errorf("%s, workload %s, round %d: %w", p.Title, w.Name, round+1, err)
				}
				record(found, p.Name, w.Name, got, used)
			}
		}
	}
	return found, nil
}

// loads are the workloads of these names, of those that a client makes.
func loads(names []string) (chosen []Workload, err error) {
	for _, w := range Workloads() {
		if slices.Contains(names, w.Name) && w.betweenPods() {
			chosen = append(chosen, w)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(chosen, func(w Workload) bool { return w.Name == name }) {
			err = errors.Join(err, fmt.Errorf("there is no workload %q between pods: want %s", name, strings.Join(LoadNames(), ", ")))
		}
	}
	return chosen, err
}

// LoadNames are what Config.Workloads may name for RunPairs.
func LoadNames() []string {
	return names(slices.DeleteFunc(Workloads(), func(w Workload) bool { return !w.betweenPods() }))
}

// betweenPods is of those that need nothing of agents.
func (w Workload) betweenPods() bool { return w.run != nil && !w.udp }

// load runs one client to its end and returns what the nodes used meanwhile.
func (p Pair) load(ctx context.Context, t task, meters meters) (_ outcome, _ usage, err error) {
	argument, err := json.Marshal(t)
	if err != nil {
		return outcome{}, usage{}, fmt.Errorf("write the task: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout+2*(t.Warmup+t.Duration))
	defer cancel()
	w, err := dialWorker(ctx, p.Client, "load", string(argument))
	if err != nil {
		return outcome{}, usage{}, err
	}
	defer func() {
		if err != nil && ctx.Err() != nil { // which closed the stream
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		err = errors.Join(err, w.close())
	}()
	switch line, err := w.line(); {
	case err != nil:
		return outcome{}, usage{}, err
	case line != "ready":
		return outcome{}, usage{}, fmt.Errorf("the worker says %q, not %q", line, "ready")
	}
	before, err := meters.read()
	if err != nil {
		return outcome{}, usage{}, err
	}
	var found outcome
	if err := w.ask(&found); err != nil {
		return outcome{}, usage{}, err
	}
	after, err := meters.read()
	return found, after.minus(before), err
}

// meters are workers on different machines.
type meters []*remoteWorker

func (m meters) read() (sum usage, err error) {
	for _, w := range m {
		var u usage
		if err := w.ask(&u); err != nil {
			return usage{}, fmt.Errorf("read a node's CPU time: %w", err)
		}
		sum = sum.plus(u)
	}
	return sum, nil
}

func (m meters) close() (err error) {
	for _, w := range m {
		err = errors.Join(err, w.close())
	}
	return err
}

// remoteWorker is a worker that we talk to by lines, until ctx ends.
type remoteWorker struct {
	stream io.ReadWriteCloser
	in     *bufio.Reader
	stop   func() bool
}

func dialWorker(ctx context.Context, r Remote, args ...string) (*remoteWorker, error) {
	stream, err := r(ctx, args...)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.Close() }) // which has line return
	return &remoteWorker{stream: stream, in: bufio.NewReader(stream), stop: stop}, nil
}

func (w *remoteWorker) line() (string, error) {
	line, err := w.in.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("hear a worker: %w", err)
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// ask has the worker go on, and reads the answer.
func (w *remoteWorker) ask(answer any) error {
	if _, err := io.WriteString(w.stream, "\n"); err != nil {
		return fmt.Errorf("have a worker go on: %w", err)
	}
	return w.hear(answer)
}

func (w *remoteWorker) hear(answer any) error {
	line, err := w.line()
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(line), answer); err != nil {
		return fmt.Errorf("a worker says %q: %w", line, err)
	}
	return nil
}

func (w *remoteWorker) close() error {
	if !w.stop() {
		return nil // ctx's end closes it
	}
	return w.stream.Close()
}

func remoteMachine(ctx context.Context, r Remote) (m report.Machine, err error) {
	w, err := dialWorker(ctx, r, "machine")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	return m, w.hear(&m)
}

// CheckLoads reports every name that is no workload for RunPairs.
func CheckLoads(names []string) error {
	_, err := loads(names)
	return err
}
