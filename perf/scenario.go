package perf

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf/yardstick"
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

// runScenario builds the scenario, runs every workload on it and adds to the report.
func runScenario(ctx context.Context, c Config, s Scenario, report *Report) (err error) {
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
	if err := st.verify(ctx); err != nil {
		return err
	}
	for _, w := range Workloads() {
		if !slices.Contains(c.Workloads, w.Name) {
			continue
		}
		if err := st.measure(ctx, w, report); err != nil {
			return fmt.Errorf("workload %s: %w", w.Name, err)
		}
	}
	return st.memory(report)
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
	if err := st.lab.StartMesh(ctx, st.config.AgentArgs...); err != nil {
		return err
	}
	if err := st.lab.LabelNamespace(namespace, dataplane.ModeAmbient); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	return errors.Join(
		st.lab.WaitCapture(ctx, dataplane.CaptureInForce, st.client, st.server),
		st.lab.WaitProtocol(ctx, dataplane.ProtocolHBONE, st.client, st.server),
	)
}

// Ports of a yardstick: the link's is the mesh's, so that packets are told apart in one way.
const (
	entryPort = 15001
	linkPort  = dataplane.PortTunnel
)

// startRelays starts the scenario's pair, the server's side first.
func (st *site) startRelays(ctx context.Context) error {
	pair, err := st.config.pair(st.scenario.Name)
	if err != nil {
		return err
	}
	dir := filepath.Join(st.lab.Dir(), "yardstick")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for the relays: %w", err)
	}
	if err := yardstick.WriteCredentials(dir); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	for _, relay := range []struct {
		side   yardstick.Side
		pod    *lab.Pod
		listen netip.AddrPort
	}{
		{yardstick.ServerSide, st.server, st.path().Link},
		{yardstick.ClientSide, st.client, st.path().Entry},
	} {
		cmd, err := pair.Command(dir, relay.side, st.path())
		if err != nil {
			return err
		}
		p, err := relay.pod.Start(cmd)
		if err != nil {
			return err
		}
		st.relays = append(st.relays, p)
		if err := listening(ctx, p, relay.listen); err != nil {
			return fmt.Errorf("start the %s's relay: %w%s", relay.side, err, p.LogTail())
		}
	}
	return nil
}

// path is where a yardstick's relays listen.
func (st *site) path() yardstick.Path {
	loopback := netip.MustParseAddr("127.0.0.1")
	if st.config.IPv6 {
		loopback = netip.IPv6Loopback()
	}
	return yardstick.Path{
		Entry:       netip.AddrPortFrom(loopback, entryPort),
		Link:        st.server.AddrPort(linkPort),
		Application: netip.AddrPortFrom(loopback, serverPort),
	}
}

// listening waits until p accepts connections.
func listening(ctx context.Context, p *lab.Process, at netip.AddrPort) error {
	for {
		conn, err := p.Host.Dial(ctx, at)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %w", p.Wait(ctx))
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
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
	// The client's own link sees both kinds on one node and across nodes.
	c, err := st.client.Node.Capture(ctx, st.client.HostEnd())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, _, err := st.load(ctx, task{Workload: "paced", Duration: 100 * time.Millisecond, Rate: 160}); err != nil {
		return fmt.Errorf("probe the path: %w", err)
	}
	tunnel, err := c.CountPort(ctx, dataplane.PortTunnel)
	if err != nil {
		return err
	}
	plain, err := c.CountPort(ctx, serverPort)
	if err != nil {
		return err
	}
	tunnelled := st.scenario.Mesh || st.scenario.Yardstick
	if got := tunnel > 0 && plain == 0; got != tunnelled || tunnel+plain == 0 {
		return fmt.Errorf("the probe made %d packets in tunnels and %d in clear, which is not %q", tunnel, plain, st.scenario.Title)
	}
	return nil
}

func (st *site) measure(ctx context.Context, w Workload, report *Report) error {
	found, used, err := st.load(ctx, task{
		Workload: w.Name, Duration: st.config.Duration, Warmup: st.config.Warmup, Rate: st.config.Rate,
	})
	if err != nil {
		return err
	}
	add := func(metric, unit string, value float64) { report.add(st.scenario.Name, w.Name, metric, unit, value) }
	if found.Bytes > 0 {
		gb := float64(found.Bytes) / 1e9
		add("throughput", "Gbit/s", gb*8/found.Elapsed.Seconds())
		used.each(func(kind string, t time.Duration) { add("CPU "+kind, "s/GB", t.Seconds()/gb) })
		return nil
	}
	count := float64(found.Latency.Count)
	add("rate", "1/s", count/found.Elapsed.Seconds())
	add("p50", "µs", micros(found.Latency.P50))
	add("p99", "µs", micros(found.Latency.P99))
	add("p99.9", "µs", micros(found.Latency.P999))
	used.each(func(kind string, t time.Duration) { add("CPU "+kind, "µs each", micros(t)/count) })
	return nil
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// load runs one client to its end and returns what the machine used meanwhile.
func (st *site) load(ctx context.Context, t task) (outcome, usage, error) {
	t.To = st.server.AddrPort(serverPort)
	if st.scenario.Yardstick {
		t.To = st.path().Entry
	}
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
		u.proxies += own.User + own.System
	}
	return u, nil
}

// memory adds what the proxies have resident after all the load: the larger of them.
func (st *site) memory(report *Report) error {
	var rss, peak uint64
	for _, p := range st.proxies() {
		u, err := p.Usage()
		if err != nil {
			return err
		}
		rss, peak = max(rss, u.RSS), max(peak, u.PeakRSS)
	}
	if rss > 0 {
		report.add(st.scenario.Name, memoryWorkload, "RSS at the end", "MiB", float64(rss)/(1<<20))
		report.add(st.scenario.Name, memoryWorkload, "RSS at most", "MiB", float64(peak)/(1<<20))
	}
	return nil
}

// worker is a process in a pod that we talk to by lines.
type worker struct {
	process *lab.Process
	in      io.Writer
	lines   chan string // closed at the end of the process's output
}

func (st *site) startWorker(p *lab.Pod, args ...string) (*worker, error) {
	command := append(slices.Clone(st.config.Worker), args...)
	cmd := exec.Command(command[0], command[1:]...)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("connect to a worker: %w", err)
	}
	// The other end is closed when the process has been waited for, and so its output been
	// copied: by exec.Cmd, because this is no file.
	out, feed := io.Pipe()
	cmd.Stdout = feed
	w := &worker{in: in, lines: make(chan string, 4)}
	if w.process, err = p.Start(cmd); err != nil {
		return nil, errors.Join(err, in.Close())
	}
	go func() {
		<-w.process.Done()
		_ = feed.Close() // never fails
	}()
	go func() {
		defer close(w.lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			w.lines <- scanner.Text() // a worker writes at most three
		}
	}()
	return w, nil
}

// line is the next line of the worker's output.
func (w *worker) line(ctx context.Context) (string, error) {
	select {
	case line, ok := <-w.lines:
		if !ok {
			return "", fmt.Errorf("the worker ended: %w%s", w.process.Wait(ctx), w.process.LogTail())
		}
		return line, nil
	case <-ctx.Done():
		return "", errors.Join(fmt.Errorf("wait for the worker: %w", ctx.Err()), w.process.Kill())
	}
}

func (w *worker) expect(ctx context.Context, want string) error {
	line, err := w.line(ctx)
	if err == nil && line != want {
		err = fmt.Errorf("the worker says %q, not %q", line, want)
	}
	return err
}
