package perf

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
	"github.com/raceway-mesh/raceway/perf/report"
	"github.com/raceway-mesh/raceway/perf/yardstick"
)

// serverPort is where the server listens in its pod.
const serverPort = 8080

// task is what a client is to do: its only argument, as JSON.
type task struct {
	Workload string         `json:"workload"`
	To       netip.AddrPort `json:"to"`
	Duration time.Duration  `json:"duration"`
	Warmup   time.Duration  `json:"warmup"`
	Rate     float64        `json:"rate"`
	Conns    int            `json:"conns,omitempty"` // to hold
}

// outcome is what a client found, as one line of JSON on its output. Bytes is of bulk
// workloads, Sent and Arrived are of datagrams, and Latency is of all but bulk.
type outcome struct {
	Bytes   uint64          `json:"bytes,omitempty"`
	Sent    uint64          `json:"sent,omitempty"`
	Arrived uint64          `json:"arrived,omitempty"`
	Elapsed time.Duration   `json:"elapsed"`
	Latency traffic.Latency `json:"latency,omitzero"`
}

// Worker is the process inside a pod: `serve`, `load TASK`, `hold TASK`, `mix TASK`, or `relay`
// with the arguments of yardstick.Relay. A client warms up, writes a line, waits for one on in,
// makes its load and writes the outcome: so its start-up is not in the measurement. `meter` and
// `machine` tell of the machine that the pod is on, the former once for each line on in.
func Worker(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx, out)
	case len(args) == 1 && args[0] == "meter":
		return meter(in, out)
	case len(args) == 1 && args[0] == "machine":
		return json.NewEncoder(out).Encode(ThisMachine())
	case len(args) > 0 && args[0] == "relay":
		return yardstick.Relay(ctx, args[1:])
	case len(args) == 2 && (args[0] == "load" || args[0] == "hold" || args[0] == "mix"):
		var t task
		if err := json.Unmarshal([]byte(args[1]), &t); err != nil {
			return fmt.Errorf("read the task: %w", err)
		}
		switch args[0] {
		case "hold":
			return hold(ctx, t, in, out)
		case "mix":
			return mixWorker(ctx, t, out)
		}
		return load(ctx, t, in, out)
	}
	return fmt.Errorf("worker %q: want serve, meter, machine, relay, or load, hold or mix and a task", args)
}

func serve(ctx context.Context, out io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return err
	}
	packets, err := new(net.ListenConfig).ListenPacket(ctx, "udp", fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return errors.Join(err, l.Close())
	}
	if _, err := fmt.Fprintln(out, "listening"); err != nil {
		return errors.Join(err, l.Close(), packets.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return traffic.Serve(ctx, l) })
	group.Go(func() error { return traffic.ServeDatagrams(ctx, packets.(*net.UDPConn)) })
	return group.Wait()
}

// meter writes the machine's CPU time for each line that it is sent.
func meter(in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		u, err := machineUsage()
		if err != nil {
			return err
		}
		if err := json.NewEncoder(out).Encode(u); err != nil {
			return err
		}
	}
	return lines.Err()
}

func load(ctx context.Context, t task, in io.Reader, out io.Writer) error {
	if t.Warmup > 0 {
		if _, err := t.run(ctx, t.Warmup); err != nil {
			return fmt.Errorf("warm up: %w", err)
		}
	}
	if err := awaitWord(in, out); err != nil {
		return err
	}
	found, err := t.run(ctx, t.Duration)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(found)
}

// hold opens the task's connections, or flows, has them idle until it is told, and asks each of them.
func hold(ctx context.Context, t task, in io.Reader, out io.Writer) (err error) {
	open := traffic.Hold
	if t.Workload == report.FlowsWorkload {
		open = traffic.HoldDatagrams
	}
	held, err := open(ctx, t.To, t.Conns)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if err := awaitWord(in, out); err != nil {
		return err
	}
	if err := held.Check(); err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(outcome{Latency: traffic.Latency{Count: int64(t.Conns)}})
}

// awaitWord says that all is ready, and waits for the word to go on.
func awaitWord(in io.Reader, out io.Writer) error {
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	if _, err := bufio.NewReader(in).ReadString('\n'); err != nil {
		return fmt.Errorf("wait for the word to go on: %w", err)
	}
	return nil
}

func (t task) run(ctx context.Context, d time.Duration) (outcome, error) {
	for _, w := range Workloads() {
		if w.Name == t.Workload && w.run != nil {
			t.Duration = d
			return w.run(ctx, t)
		}
	}
	return outcome{}, fmt.Errorf("there is no workload %q", t.Workload)
}
