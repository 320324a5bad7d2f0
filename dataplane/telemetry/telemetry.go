// Package telemetry is what operators see of the connections that the proxy carries:
// metrics under the names that Istio's dashboards know, an access log, flow records, and
// the list of live connections.
//
//	          ┌─ Open ──► Conn ──► Sent, Received … ──► Close ─┐
//	proxy ────┤                     │ every Interval           ├──► counters, access log, flows
//	          └─ Refuse ────────────┼──────────────────────────┘
//	                                └──► counters, flow update
//
// Nothing here makes the data path wait: a log line or a flow record that cannot be taken
// at once is dropped and counted.
//
// Bytes are counted as the source sees them, by both reporters: sent is source to
// destination, received is the way back.
package telemetry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Config is what New needs. All of it may be zero.
type Config struct {
	// Registerer takes the metrics; nil keeps them to ourselves.
	Registerer prometheus.Registerer
	// Store tells which workloads and policies exist, so that the series of those that
	// vanished can go. nil keeps every series.
	Store *dataplane.Store
	// Cluster is the cluster label of workloads that name none.
	Cluster string

	// AccessLog receives one line for each finished connection; nil writes none. A Write
	// that blocks or fails costs lines, never connections.
	AccessLog io.Writer
	// AccessLogJSON writes JSON in place of key=value.
	AccessLogJSON bool
	// AccessLogQueue bounds the lines that wait to be written. 0 means 8,192.
	AccessLogQueue int

	// Interval is how often live connections report. 0 means 10 seconds.
	Interval time.Duration
	// StaleAfter is how long the series of a vanished workload are kept. 0 means 15 minutes.
	StaleAfter time.Duration
	// MaxSeries bounds the sets of labels of connection metrics; connections beyond are
	// counted under labels that are all "unknown". 0 means 20,000.
	MaxSeries int
	// RecentFlows is how many flow records are kept for those who ask later. 0 means 1,000.
	RecentFlows int

	// Log receives what is wrong with telemetry itself. nil discards it.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.AccessLogQueue <= 0 {
		c.AccessLogQueue = 8192
	}
	if c.MaxSeries <= 0 {
		c.MaxSeries = 20_000
	}
	if c.RecentFlows <= 0 {
		c.RecentFlows = 1000
	}
	if c.Interval <= 0 {
		c.Interval = 10 * time.Second
	}
	if c.StaleAfter <= 0 {
		c.StaleAfter = 15 * time.Minute
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Telemetry is safe for concurrent use. Its methods work also while Run does not run; then
// live connections do not report and log lines pile up to their bound.
type Telemetry struct {
	cfg     Config
	metrics *metrics
	log     *accessLog
	flows   *flowHub

	roused    chan struct{} // there is something for reportLoop
	reporting atomic.Bool   // it has been told of live connections

	mu       sync.Mutex
	live     []*Conn
	carriers map[syscall.Conn]*carrier // of live connections
}

// New registers the metrics and starts nothing.
func New(cfg Config) (*Telemetry, error) {
	cfg = cfg.withDefaults()
	t := &Telemetry{
		cfg:      cfg,
		log:      newAccessLog(cfg),
		flows:    newFlowHub(cfg.RecentFlows),
		roused:   make(chan struct{}, 1),
		carriers: make(map[syscall.Conn]*carrier),
	}
	t.metrics = newMetrics(cfg, t.rouse)
	collectors := append(t.metrics.collectors(), t.log.collectors()...)
	collectors = append(collectors, t.flows.lost, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "raceway_connections_live", Help: "Connections that the proxy carries now.",
	}, func() float64 { return float64(t.Live()) }))
	var errs []error
	for _, c := range collectors {
		errs = append(errs, cfg.Registerer.Register(c))
	}
	return t, errors.Join(errs...)
}

// Run writes the access log, lets live connections report and removes stale series, until
// ctx ends; then it writes the lines that wait, for a second at most where the writer takes
// a deadline.
func (t *Telemetry) Run(ctx context.Context) error {
	var g errgroup.Group
	g.Go(func() error { t.log.run(ctx); return nil })
	g.Go(func() error { t.reportLoop(ctx); return nil })
	return g.Wait()
}
