package perf

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf/report"
)

const (
	namespace = "bench"
	// setupTimeout is for pods to be captured or a worker to get ready, its warm-up apart.
	setupTimeout = 60 * time.Second
)

// site is one scenario that stands.
type site struct {
	config   Config
	scenario Scenario
	lab      *lab.Lab
	client   *lab.Pod
	server   *lab.Pod
	relays   []*lab.Process // of a yardstick
}

// runScenario measures every workload on the scenario and adds to the report: those that go
// alone in labs of their own, and those of UDP in another one than the rest, whose memory is shown.
func runScenario(ctx context.Context, c Config, s Scenario, found *report.Report) error {
	together := make(map[bool][]Workload) // by whether they are of UDP
	for _, w := range Workloads() {
		switch {
		case !slices.Contains(c.Workloads, w.Name), !w.on(s):
		case w.alone == nil:
			together[w.udp] = append(together[w.udp], w)
		default:
			s := s
			s.udp = w.udp
			holding, err := c.holding(s)
			if err != nil {
				return err
			}
			measure := func(st *site) error { return w.alone(st, ctx, found) }
			if err := onSite(ctx, holding, s, measure); err != nil {
				return fmt.Errorf("workload %s: %w", w.Name, err)
			}
		}
	}
	for _, udp := range []bool{false, true} {
		if len(together[udp]) == 0 {
			continue
		}
		s.udp = udp
		if err := onSite(ctx, c, s, func(st *site) error { return st.measureAll(ctx, together[udp], found) }); err != nil {
			return err
		}
	}
	return nil
}

// measureAll measures workloads one after the other.
func (st *site) measureAll(ctx context.Context, all []Workload, found *report.Report) error {
	if err := st.memory(found, "at the start"); err != nil {
		return err
	}
	if err := st.verify(ctx); err != nil {
		return err
	}
	for _, w := range all {
		if err := st.measure(ctx, w, found); err != nil {
			return fmt.Errorf("workload %s: %w", w.Name, err)
		}
	}
	return st.memory(found, "at the end")
}

// onSite builds the scenario, and takes it down after measure.
func onSite(ctx context.Context, c Config, s Scenario, measure func(*site) error) (err error) {
	l, err := lab.New(ctx, lab.Options{IPv6: c.IPv6, BinDir: c.BinDir, Log: c.Log})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Close())
		if left := l.Leftovers(); len(left) != 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
		}
	}()
	st := &site{config: c, scenario: s, lab: l}
	if err := st.build(ctx); err != nil {
		return err
	}
	return measure(st)
}

func (st *site) build(ctx context.Context) (err error) {
	serverNode := 2
	if st.scenario.SameNode {
		serverNode = 1
	}
	if st.client, err = st.lab.AddPod(lab.PodSpec{Namespace: namespace, Name: "client", Node: 1}); err != nil {
		return err
	}
	if st.server, err = st.lab.AddPod(lab.PodSpec{Namespace: namespace, Name: "server", Node: serverNode}); err != nil {
		return err
	}
	for _, p := range []*lab.Pod{st.client, st.server} {
		// Ports and TIME_WAIT must not be what bounds new connections per second.
		if err := p.Sysctl("net.ipv4.ip_local_port_range", "16384 65000", "net.ipv4.tcp_tw_reuse", "1"); err != nil {
			return err
		}
	}
	if err := st.startServer(ctx); err != nil {
		return err
	}
	switch {
	case st.scenario.Mesh:
		return st.enrol(ctx)
	case st.scenario.Yardstick:
		return st.startRelays(ctx)
	}
	return nil
}

// enrol starts the mesh and waits until both pods are in it.
func (st *site) enrol(ctx context.Context) error {
	mode := "tunnel"
	if st.scenario.Kernel {
		mode = "kernel"
	}
	if err := st.lab.StartMesh(ctx, append([]string{"--same-node", mode}, st.config.AgentArgs...)...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	if st.scenario.PassThrough {
		if err := st.lab.LabelPod(st.client, dataplane.ModeAmbient); err != nil {
			return err
		}
		return st.lab.WaitCapture(ctx, dataplane.CaptureInForce, st.client)
	}
	if st.scenario.Rules {
		if err := st.lab.ApplyFile("rules.yaml", manyPolicies(st.config.Rules)); err != nil {
			return err
		}
	}
	if err := st.lab.LabelNamespace(namespace, dataplane.ModeAmbient); err != nil {
		return err
	}
	err := errors.Join(
		st.lab.WaitCapture(ctx, dataplane.CaptureInForce, st.client, st.server),
		st.lab.WaitProtocol(ctx, dataplane.ProtocolHBONE, st.client, st.server),
	)
	if err != nil || !st.scenario.udp {
		return err
	}
	return st.awaitUDP(ctx)
}

func (st *site) startServer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	w, err := st.startWorker(st.server, "serve")
	if err != nil {
		return err
	}
	return w.expect(ctx, "listening")
}

// verify makes sure that the scenario is what it says: the traffic of one probe is in
// tunnels, or is not.
func (st *site) verify(ctx context.Context) (err error) {
	workload, count := "paced", (*lab.Capture).CountPort
	if st.scenario.udp {
		workload, count = "datagram-exchange", (*lab.Capture).CountDatagrams
	}
	// The client's own link sees both kinds on one node and across nodes.
	probe := func() error {
		if _, _, err := st.load(ctx, task{Workload: workload, Duration: 100 * time.Millisecond, Rate: 160}); err != nil {
			return fmt.Errorf("probe the path: %w", err)
		}
		return nil
	}
	if st.scenario.Kernel { // not for the first connections
		if err := probe(); err != nil {
			return err
		}
	}
	c, err := st.client.Node.Capture(ctx, st.client.HostEnd())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := probe(); err != nil {
		return err
	}
	tunnel, err := count(c, ctx, dataplane.PortTunnel)
	if err != nil {
		return err
	}
	plain, err := count(c, ctx, serverPort)
	if err != nil {
		return err
	}
	tunnelled := st.scenario.Mesh && !st.scenario.PassThrough && !st.scenario.Kernel || st.scenario.Yardstick
	if got := tunnel > 0 && plain == 0; got != tunnelled || tunnel+plain == 0 {
		return fmt.Errorf("the probe made %d packets in tunnels and %d in clear, which is not %q", tunnel, plain, st.scenario.Title)
	}
	return nil
}

func (st *site) measure(ctx context.Context, w Workload, found *report.Report) error {
	got, used, err := st.load(ctx, task{
		Workload: w.Name, Duration: st.config.Duration, Warmup: st.config.Warmup, Rate: st.config.Rate,
	})
	if err != nil {
		return err
	}
	record(found, st.scenario.Name, w.Name, got, used)
	return nil
}

// record adds what a client found and what the machines used meanwhile.
func record(found *report.Report, scenario, workload string, got outcome, used usage) {
	add := func(metric, unit string, value float64) { found.Add(scenario, workload, metric, unit, value) }
	if got.Sent > 0 {
		recordDatagrams(add, got, used)
		return
	}
	if got.Bytes > 0 {
		gb := float64(got.Bytes) / 1e9
		add("throughput", "Gbit/s", gb*8/got.Elapsed.Seconds())
		used.each(func(kind string, t time.Duration) { add("CPU "+kind, "s/GB", t.Seconds()/gb) })
		return
	}
	count := float64(got.Latency.Count)
	add("rate", "1/s", count/got.Elapsed.Seconds())
	add("p50", "µs", micros(got.Latency.P50))
	add("p99", "µs", micros(got.Latency.P99))
	add("p99.9", "µs", micros(got.Latency.P999))
	used.each(func(kind string, t time.Duration) { add("CPU "+kind, "µs each", micros(t)/count) })
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// target is where clients connect.
func (st *site) target() netip.AddrPort {
	if st.scenario.Yardstick {
		return st.path().Entry
	}
	return st.server.AddrPort(serverPort)
}

// load runs one client to its end and returns what the machine used meanwhile.
func (st *site) load(ctx context.Context, t task) (outcome, usage, error) {
	t.To = st.target()
	argument, err := json.Marshal(t)
	if err != nil {
		return outcome{}, usage{}, fmt.Errorf("write the task: %w", err)
	}
	w, err := st.startWorker(st.client, "load", string(argument))
	if err != nil {
		return outcome{}, usage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout+2*(t.Warmup+t.Duration))
	defer cancel()
	if err := w.expect(ctx, "ready"); err != nil {
		return outcome{}, usage{}, err
	}
	before, err := st.usage()
	if err != nil {
		return outcome{}, usage{}, err
	}
	if _, err := io.WriteString(w.in, "\n"); err != nil {
		return outcome{}, usage{}, fmt.Errorf("start the load: %w", err)
	}
	line, err := w.line(ctx)
	if err != nil {
		return outcome{}, usage{}, err
	}
	after, err := st.usage()
	if err != nil {
		return outcome{}, usage{}, err
	}
	var found outcome
	if err := json.Unmarshal([]byte(line), &found); err != nil {
		return outcome{}, usage{}, fmt.Errorf("read the client's outcome %q: %w", line, err)
	}
	return found, after.minus(before), w.process.Wait(ctx)
}

// proxies are the processes that the path goes through: agents, or a yardstick's relays.
func (st *site) proxies() []*lab.Process {
	all := slices.Clone(st.relays)
	for _, n := range st.lab.Nodes() {
		if a := st.lab.Agent(n); a != nil {
			all = append(all, a.Process)
		}
	}
	return all
}

// usage is the machine's CPU time with the proxies' share.
func (st *site) usage() (usage, error) {
	u, err := machineUsage()
	if err != nil {
		return u, err
	}
	for _, p := range st.proxies() {
		own, err := p.Usage()
		if err != nil {
			return u, err
		}
		u.Proxies += own.User + own.System
	}
	return u, nil
}

// memory adds what the proxies have resident at the start, before any load, at rest, once they
// have settled, or at the end, after all the load. Of labs for UDP there are no such figures: they
// would be a second measurement of the same.
func (st *site) memory(found *report.Report, when string) error {
	if st.scenario.udp {
		return nil
	}
	rss, peak, err := st.resident()
	if err != nil || rss == 0 {
		return err
	}
	found.Add(st.scenario.Name, report.MemoryWorkload, "RSS "+when, "MiB", mebibytes(rss))
	if when == "at the end" {
		found.Add(st.scenario.Name, report.MemoryWorkload, "RSS at most", "MiB", mebibytes(peak))
	}
	return nil
}

func mebibytes(n uint64) float64 { return float64(n) / (1 << 20) }

// resident is what the larger of the proxies has in memory, and had at most.
func (st *site) resident() (rss, peak uint64, err error) {
	for _, p := range st.proxies() {
		u, err := p.Usage()
		if err != nil {
			return 0, 0, err
		}
		rss, peak = max(rss, u.RSS), max(peak, u.PeakRSS)
	}
	return rss, peak, nil
}
