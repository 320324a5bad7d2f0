package perf

import (
	"context"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
	"github.com/raceway-mesh/raceway/perf/report"
)

// Workload is a kind of load.
type Workload struct {
	Name  string
	Title string
	// run makes the load for the task's duration.
	run func(context.Context, task) (outcome, error)
	// alone measures it, instead of run, in a lab in which nothing else ran. in says on which
	// scenarios; without it on all.
	alone func(*site, context.Context, *report.Report) error
	in    func(Scenario) bool
	udp   bool // on those scenarios that carry it; the others on those that carry TCP
}

func (w Workload) name() string { return w.Name }

// on reports whether it is measured on the scenario.
func (w Workload) on(s Scenario) bool {
	carried := !s.OnlyUDP
	if w.udp {
		carried = s.UDP
	}
	return carried && (w.in == nil || w.in(s))
}

// WorkloadNames are what Config.Workloads may name.
func WorkloadNames() []string { return names(Workloads()) }

// ShortWorkloads are those that show in little time whether everything works.
func ShortWorkloads() []string {
	return append(ShortLoads(), "datagrams-512")
}

// ShortLoads are those of them that RunPairs can measure.
func ShortLoads() []string {
	return []string{"bulk-1", "bulk-8", "download-8", "exchange-1", "exchange-32", "paced", "connect"}
}

// Workloads lists them all.
func Workloads() []Workload {
	return []Workload{
		{Name: "bulk-1", Title: "bulk, 1 stream", run: upload(1)},
		{Name: "bulk-8", Title: "bulk, 8 streams", run: upload(8)},
		{Name: "bulk-64", Title: "bulk, 64 streams", run: upload(64)},
		{Name: "download-1", Title: "bulk from the server, 1 stream", run: download(1)},
		{Name: "download-8", Title: "bulk from the server, 8 streams", run: download(8)},
		{Name: "download-64", Title: "bulk from the server, 64 streams", run: download(64)},
		{Name: "exchange-1", Title: "1 KiB request/response, 1 connection, saturated", run: exchange(1)},
		{Name: "exchange", Title: "1 KiB request/response, 16 connections, saturated", run: exchange(16)},
		{Name: "exchange-32", Title: "1 KiB request/response, 32 connections, saturated", run: exchange(32)},
		{Name: "exchange-1b", Title: "1 B request/response, 16 connections, saturated", run: messages(1, 16)},
		{Name: "exchange-64k", Title: "64 KiB request/response, 16 connections, saturated", run: messages(64<<10, 16)},
		{Name: "paced", Title: "1 KiB request/response, 16 connections, fixed rate", run: paced(traffic.MessageSize, 16)},
		{Name: "paced-1b", Title: "1 B request/response, 16 connections, fixed rate", run: paced(1, 16)},
		{Name: "paced-64k", Title: "64 KiB request/response, 16 connections, fixed rate", run: paced(64<<10, 16)},
		{Name: "connect", Title: "new connections, 16 at a time", run: connect(16)},
		{Name: "datagrams-64", Title: "datagrams of 64 B, 4 flows", run: datagrams(64), udp: true},
		{Name: "datagrams-512", Title: "datagrams of 512 B, 4 flows", run: datagrams(512), udp: true},
		{Name: "datagrams-1200", Title: "datagrams of 1,200 B, 4 flows", run: datagrams(1200), udp: true},
		{Name: "datagram-exchange", Title: "64 B datagram and response, 16 flows, fixed rate", run: datagramExchange(16), udp: true},
		{Name: report.IdleWorkload, Title: "idle connections", alone: (*site).idle, in: Scenario.proxied},
		{Name: report.FlowsWorkload, Title: "idle flows of UDP", alone: (*site).flows, in: Scenario.proxied, udp: true},
		{Name: report.PodsWorkload, Title: "pods that do nothing", alone: (*site).pods, in: Scenario.crossing},
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
	return messages(traffic.MessageSize, conns)
}

func messages(size, conns int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: conns, Size: size, Duration: t.Duration}))
	}
}

func paced(size, conns int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return rated(traffic.Exchange(ctx, t.To, traffic.ExchangeOptions{Conns: conns, Size: size, Duration: t.Duration, Rate: t.Rate}))
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
