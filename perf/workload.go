package perf

import (
	"context"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

// Workload is a kind of load.
type Workload struct {
	Name  string
	Title string
	// run makes the load for the task's duration.
	run func(context.Context, task) (outcome, error)
}

func (w Workload) name() string { return w.Name }

// WorkloadNames are what Config.Workloads may name.
func WorkloadNames() []string { return names(Workloads()) }

// ShortWorkloads are those that show in little time whether everything works.
func ShortWorkloads() []string {
	return []string{"bulk-1", "bulk-8", "download-8", "exchange-1", "exchange-32", "paced", "connect"}
}

// Workloads lists them all.
func Workloads() []Workload {
	return []Workload{
		{"bulk-1", "bulk, 1 stream", upload(1)},
		{"bulk-8", "bulk, 8 streams", upload(8)},
		{"bulk-64", "bulk, 64 streams", upload(64)},
		{"download-1", "bulk from the server, 1 stream", download(1)},
		{"download-8", "bulk from the server, 8 streams", download(8)},
		{"download-64", "bulk from the server, 64 streams", download(64)},
		{"exchange-1", "1 KiB request/response, 1 connection, saturated", exchange(1)},
		{"exchange", "1 KiB request/response, 16 connections, saturated", exchange(16)},
		{"exchange-32", "1 KiB request/response, 32 connections, saturated", exchange(32)},
		{"paced", "1 KiB request/response, 16 connections, fixed rate", paced(16)},
		{"connect", "new connections, 16 at a time", connect(16)},
	}
}

func upload(streams int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return bulk(traffic.Bulk(ctx, t.To, streams, t.Duration))
	}
}

func download(streams int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return bulk(traffic.Download(ctx, t.To, streams, t.Duration))
	}
}

func bulk(r traffic.BulkResult, err error) (outcome, error) {
	return outcome{Bytes: r.Bytes, Elapsed: r.Elapsed}, err
}

func exchange(conns int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: conns, Duration: t.Duration}))
	}
}

func paced(conns int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: conns, Duration: t.Duration, Rate: t.Rate}))
	}
}

func connect(atOnce int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return rated(traffic.Connect(ctx, t.To, atOnce, t.Duration))
	}
}

func rated(r traffic.RateResult, err error) (outcome, error) {
	return outcome{Elapsed: r.Elapsed, Latency: r.Latency}, err
}
