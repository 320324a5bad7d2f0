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

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
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
}

// outcome is what a client found, as one line of JSON on its output. Bytes is of bulk
// workloads, the rest of the others.
type outcome struct {
	Bytes   uint64          `json:"bytes,omitempty"`
	Elapsed time.Duration   `json:"elapsed"`
	Latency traffic.Latency `json:"latency,omitzero"`
}

// Worker is the process inside a pod: `serve`, `load TASK`, or `relay` with the arguments of
// yardstick.Relay. A client warms up, writes a
// line, waits for one on in, makes its load and writes the outcome: so its start-up is not
// in the measurement.
func Worker(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx, out)
	case len(args) > 0 && args[0] == "relay":
		return yardstick.Relay(ctx, args[1:])
	case len(args) == 2 && args[0] == "load":
		var t task
		if err := json.Unmarshal([]byte(args[1]), &t); err != nil {
			return fmt.Errorf("read the task: %w", err)
		}
		return load(ctx, t, in, out)
	}
	return fmt.Errorf("worker %q: want serve, relay, or load and a task", args)
}

func serve(ctx context.Context, out io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, "listening"); err != nil {
		return errors.Join(err, l.Close())
	}
	return traffic.Serve(ctx, l)
}

func load(ctx context.Context, t task, in io.Reader, out io.Writer) error {
	if t.Warmup > 0 {
		if _, err := t.run(ctx, t.Warmup); err != nil {
			return fmt.Errorf("warm up: %w", err)
		}
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	if _, err := bufio.NewReader(in).ReadString('\n'); err != nil {
		return fmt.Errorf("wait for the word to start: %w", err)
	}
	found, err := t.run(ctx, t.Duration)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(found)
}

func (t task) run(ctx context.Context, d time.Duration) (outcome, error) {
	for _, w := range Workloads() {
		if w.Name == t.Workload {
			t.Duration = d
			return w.run(ctx, t)
		}
	}
	return outcome{}, fmt.Errorf("there is no workload %q", t.Workload)
}
