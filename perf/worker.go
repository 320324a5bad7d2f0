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
)

// serverPort is where the server listens in its pod.
const serverPort = 8080

// workers is how many connections the workloads but the bulk ones use at once.
const workers = 16

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

// Worker is the process inside a pod: `serve`, or `load TASK`. A client warms up, writes a
// line, waits for one on in, makes its load and writes the outcome: so its start-up is not
// in the measurement.
func Worker(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx, out)
	case len(args) == 2 && args[0] == "load":
		var t task
		if err := json.Unmarshal([]byte(args[1]), &t); err != nil {
			return fmt.Errorf("read the task: %w", err)
		}
		return load(ctx, t, in, out)
	}
	return fmt.Errorf("worker %q: want serve, or load and a task", args)
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
	switch t.Workload {
	case "bulk-1":
		return bulk(ctx, t.To, 1, d)
	case "bulk-8":
		return bulk(ctx, t.To, 8, d)
	case "exchange":
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: workers, Duration: d}))
	case "paced":
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: workers, Duration: d, Rate: t.Rate}))
	case "connect":
		return rated(traffic.Connect(ctx, t.To, workers, d))
	}
	return outcome{}, fmt.Errorf("there is no workload %q", t.Workload)
}

func bulk(ctx context.Context, to netip.AddrPort, streams int, d time.Duration) (outcome, error) {
	r, err := traffic.Bulk(ctx, to, streams, d)
	return outcome{Bytes: r.Bytes, Elapsed: r.Elapsed}, err
}

func rated(r traffic.RateResult, err error) (outcome, error) {
	return outcome{Elapsed: r.Elapsed, Latency: r.Latency}, err
}
