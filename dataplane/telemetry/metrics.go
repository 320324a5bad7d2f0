package telemetry

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/dataplane"
)

// metrics holds every metric that is counted here; what others know is in Sources.
type metrics struct {
	cfg Config

	opened, closed, sent, received, failed *prometheus.CounterVec

	decisions   *prometheus.CounterVec
	handshakes  *prometheus.CounterVec
	limits      *prometheus.CounterVec
	rtt         *prometheus.HistogramVec
	retransmits *prometheus.CounterVec
	repairs     *prometheus.CounterVec

	mu        sync.Mutex
	series    map[labels]*series
	policies  map[policyKey]*policySeries
	overflown bool
}

// series is the children of the connection metrics for one set of labels.
type series struct {
	labels         labels
	sent, received prometheus.Counter

	// Guarded by metrics.mu.
	live  int                // open connections; never removed while there are any
	used  time.Time          // when the last one ended
	flags map[Flags]struct{} // with which there are children, for their removal
}

func newMetrics(cfg Config) *metrics {
	m := &metrics{cfg: cfg, series: make(map[labels]*series), policies: make(map[policyKey]*policySeries)}
	perConnection := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labelNames())
	}
	m.opened = perConnection("istio_tcp_connections_opened_total", "Connections opened.")
	m.closed = perConnection("istio_tcp_connections_closed_total", "Connections closed.")
	m.sent = perConnection("istio_tcp_sent_bytes_total", "Bytes from source to destination.")
	m.received = perConnection("istio_tcp_received_bytes_total", "Bytes from destination to source.")
	m.failed = perConnection("istio_tcp_connections_failed_total", "Connections that were refused or did not come up.")
	m.decisions = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_policy_decisions_total", Help: "Authorization decisions by the policy that made them; dry_run ones had no effect.",
	}, []string{"kind", "policy_namespace", "policy", "outcome", "dry_run"})
	m.handshakes = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_handshake_failures_total", Help: "TLS handshakes that failed, by direction of the tunnel and cause.",
	}, []string{"direction", "cause"})
	m.limits = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_limit_reached_total", Help: "How often a limit bit, by limit.",
	}, []string{"limit"})
	m.rtt = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "raceway_tcp_rtt_seconds", Help: "Smoothed round trip time of the sockets that carry long connections, sampled while they live.",
		Buckets: prometheus.ExponentialBuckets(0.00005, 2, 16),
	}, []string{"direction"})
	m.retransmits = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_tcp_retransmitted_segments_total", Help: "Segments retransmitted by the sockets that carry long connections.",
	}, []string{"direction"})
	m.repairs = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_capture_repairs_total", Help: "What somebody took from the capture and the agent put back, by its part.",
	}, []string{"part"})
	return m
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.opened, m.closed, m.sent, m.received, m.failed,
		m.decisions, m.handshakes, m.limits, m.rtt, m.retransmits, m.repairs,
	}
}

func (m *metrics) open(a *Attempt) *series {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.seriesLocked(m.labels(a))
	s.live++
	s.flags[FlagsNone] = struct{}{}
	m.opened.WithLabelValues(s.labels.values(FlagsNone)...).Inc()
	return s
}

func (m *metrics) close(s *series, flags Flags) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.live--
	s.used = time.Now()
	s.flags[flags] = struct{}{}
	m.closed.WithLabelValues(s.labels.values(flags)...).Inc()
}

func (m *metrics) refuse(a *Attempt, flags Flags) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.seriesLocked(m.labels(a))
	s.used = time.Now()
	s.flags[flags] = struct{}{}
	m.failed.WithLabelValues(s.labels.values(flags)...).Inc()
}

// seriesLocked finds or makes the series of l. Beyond the bound it is one for all: the
// totals stay right, and memory stays bounded whatever the cluster looks like.
func (m *metrics) seriesLocked(l labels) *series {
	if s := m.series[l]; s != nil {
		return s
	}
	if len(m.series) >= m.cfg.MaxSeries {
		if !m.overflown {
			m.cfg.Log.Error("too many label sets of connection metrics: new ones are counted as unknown", "limit", m.cfg.MaxSeries)
		}
		m.overflown = true
		m.limits.WithLabelValues("metric_series").Inc()
		l = labels{
			reporter: l.reporter, source: unknownPeer(), destination: unknownPeer(), service: unknown,
			serviceName: unknown, serviceNamespace: unknown, security: l.security,
		}
		if s := m.series[l]; s != nil {
			return s
		}
	}
	values := l.values(FlagsNone)
	s := &series{
		labels: l, flags: make(map[Flags]struct{}), used: time.Now(),
		sent: m.sent.WithLabelValues(values...), received: m.received.WithLabelValues(values...),
	}
	m.series[l] = s
	return s
}

func (m *metrics) socket(d Direction, facts tcpFacts, retransmits uint32) {
	m.rtt.WithLabelValues(string(d)).Observe(float64(facts.rttMicros) / 1e6)
	m.retransmits.WithLabelValues(string(d)).Add(float64(retransmits))
}

// sweep removes the series of workloads and policies that are gone for a while.
func (m *metrics) sweep(now time.Time) {
	if m.cfg.Store == nil {
		return
	}
	snapshot, _ := m.cfg.Store.Load()
	if snapshot == nil {
		return
	}
	workloads := existing(snapshot)
	m.mu.Lock()
	defer m.mu.Unlock()
	for l, s := range m.series {
		if s.live > 0 || now.Sub(s.used) < m.cfg.StaleAfter || l.exists(workloads) {
			continue
		}
		delete(m.series, l)
		m.sent.DeleteLabelValues(l.values(FlagsNone)...)
		m.received.DeleteLabelValues(l.values(FlagsNone)...)
		for flags := range s.flags {
			values := l.values(flags)
			m.opened.DeleteLabelValues(values...)
			m.closed.DeleteLabelValues(values...)
			m.failed.DeleteLabelValues(values...)
		}
	}
	m.overflown = m.overflown && len(m.series) >= m.cfg.MaxSeries
	m.sweepPoliciesLocked(now, snapshot)
}

// existing is the workloads of s under the names that labels use.
func existing(s *dataplane.Snapshot) map[dataplane.Name]bool {
	workloads := s.Workloads()
	names := make(map[dataplane.Name]bool, len(workloads))
	for i := range workloads {
		names[dataplane.Name{Namespace: workloads[i].Name.Namespace, Name: workloadName(&workloads[i])}] = true
	}
	return names
}

// exists reports whether both ends, as far as they are known, still do.
func (l *labels) exists(workloads map[dataplane.Name]bool) bool {
	for _, p := range []*peerLabels{&l.source, &l.destination} {
		if p.workload != unknown && !workloads[dataplane.Name{Namespace: p.namespace, Name: p.workload}] {
			return false
		}
	}
	return true
}
