package telemetry

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// Sources are what others know and metrics show. They are asked at every scrape, possibly
// concurrently; a nil one is left out.
type Sources struct {
	// Pods is how many pods of this node are in each state.
	Pods func() map[dataplane.CaptureState]int
	// Certificates lists the certificates that the node holds.
	Certificates func() []Certificate
	// Pool sums up the pools of tunnel connections.
	Pool func() Pool
	// Hooks reads the counters of the BPF programs.
	Hooks func() ([]Counter, error)
	// Staleness is for how long the source of the cluster's state has not answered; 0 while
	// it does.
	Staleness func() time.Duration
}

// Certificate is a workload's certificate; a zero NotAfter means that there is none yet.
type Certificate struct {
	Identity spiffe.ID
	NotAfter time.Time
}

// Pool is the state of the tunnel connections that this node's pods opened.
type Pool struct{ Sessions, Streams, Dialing, Waiting int }

// Counter is one counter of a BPF program.
type Counter struct {
	Hook, Reason string
	Value        uint64
}

// Attach registers metrics that ask s. It may be called once.
func (t *Telemetry) Attach(s Sources) error {
	gauge := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return t.cfg.Registerer.Register(&sourcesCollector{
		Sources:      s,
		log:          t.cfg.Log,
		pods:         gauge("raceway_enrolled_pods", "Pods of this node by state of their capture.", "state"),
		certificates: gauge("raceway_certificate_expiry_timestamp_seconds", "When the certificate of an identity expires, in Unix time; 0 when there is none.", "identity"),
		pool:         gauge("raceway_tunnel_pool", "Tunnel connections of this node's pods (sessions), the streams in them, dials under way and connections that wait for one.", "of"),
		hooks:        gauge("raceway_bpf_events_total", "What the BPF programs decided, by hook and reason.", "hook", "reason"),
		staleness:    gauge("raceway_discovery_staleness_seconds", "For how long the API server has not answered; 0 while it does."),
	})
}

type sourcesCollector struct {
	Sources
	log                                        *slog.Logger
	pods, certificates, pool, hooks, staleness *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (c *sourcesCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.pods, c.certificates, c.pool, c.hooks, c.staleness} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (c *sourcesCollector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	if c.Pods != nil {
		for state, n := range c.Pods() {
			gauge(c.pods, float64(n), state.String())
		}
	}
	if c.Certificates != nil {
		for _, certificate := range c.Certificates() {
			expiry := 0.0
			if !certificate.NotAfter.IsZero() {
				expiry = float64(certificate.NotAfter.Unix())
			}
			gauge(c.certificates, expiry, certificate.Identity.String())
		}
	}
	if c.Pool != nil {
		p := c.Pool()
		gauge(c.pool, float64(p.Sessions), "sessions")
		gauge(c.pool, float64(p.Streams), "streams")
		gauge(c.pool, float64(p.Dialing), "dialing")
		gauge(c.pool, float64(p.Waiting), "waiting")
	}
	if c.Staleness != nil {
		gauge(c.staleness, c.Staleness().Seconds())
	}
	c.collectHooks(out)
}

// collectHooks leaves the counters out when they cannot be read, and all else in.
func (c *sourcesCollector) collectHooks(out chan<- prometheus.Metric) {
	if c.Hooks == nil {
		return
	}
	counters, err := c.Hooks()
	if err != nil {
		c.log.Error("read BPF counters", "error", err)
		return
	}
	for _, counter := range counters {
		out <- prometheus.MustNewConstMetric(c.hooks, prometheus.CounterValue, float64(counter.Value), counter.Hook, counter.Reason)
	}
}
