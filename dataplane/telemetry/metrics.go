package telemetry

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/raceway-mesh/raceway/dataplane"
)

// metrics holds every metric that is counted here; what others know is in Sources.
type metrics struct {
	cfg Config
	// grown is called when there is something new to sweep away one day.
	grown func()

	connections *connectionCollector

	decisions   *prometheus.CounterVec
	handshakes  *prometheus.CounterVec
	limits      *prometheus.CounterVec
	rtt         *prometheus.HistogramVec
	retransmits *prometheus.CounterVec
	repairs     *prometheus.CounterVec
	datagrams   *prometheus.CounterVec
	moved       map[Direction]prometheus.Counter // of datagrams
	dropped     *prometheus.CounterVec

	mu        sync.RWMutex
	series    map[labels]*series
	parties   map[partiesKey]*parties
	overflown bool

	policyMu sync.Mutex
	policies map[policyKey]*policySeries
}

func newMetrics(cfg Config, grown func()) *metrics {
	m := &metrics{
		cfg: cfg, grown: grown,
		series: make(map[labels]*series), parties: make(map[partiesKey]*parties), policies: make(map[policyKey]*policySeries),
	}
	m.connections = newConnectionCollector(m)
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
	m.datagrams = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_udp_datagrams_total", Help: "UDP datagrams that tunnels carried, by direction of their flow.",
	}, []string{"direction"})
	m.moved = map[Direction]prometheus.Counter{
		Inbound: m.datagrams.WithLabelValues(string(Inbound)), Outbound: m.datagrams.WithLabelValues(string(Outbound)),
	}
	m.dropped = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_udp_dropped_datagrams_total", Help: "UDP datagrams that were captured and dropped, by direction of their flow and cause.",
	}, []string{"direction", "cause"})
	return m
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.connections, m.decisions, m.handshakes, m.limits, m.rtt, m.retransmits, m.repairs, m.datagrams, m.dropped,
	}
}

func (m *metrics) open(a *Attempt) *parties { return m.with(a, (*series).open) }

func (m *metrics) refuse(a *Attempt, flags Flags, now time.Time) *parties {
	return m.with(a, func(s *series) { s.refuse(flags, now) })
}

func (m *metrics) allSeries() []*series {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Collect(maps.Values(m.series))
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
			serviceName: unknown, serviceNamespace: unknown, protocol: l.protocol, security: l.security,
		}
		if s := m.series[l]; s != nil {
			return s
		}
	}
	s := &series{labels: l, created: timestamppb.Now()}
	s.none = &outcome{flags: FlagsNone, labels: prometheus.MakeLabelPairs(m.connections.opened, l.values(FlagsNone))}
	s.used.Store(time.Now().UnixNano())
	m.series[l] = s
	m.grown()
	return s
}

func (m *metrics) socket(d Direction, facts tcpFacts, retransmits uint32) {
	m.rtt.WithLabelValues(string(d)).Observe(float64(facts.rttMicros) / 1e6)
	m.retransmits.WithLabelValues(string(d)).Add(float64(retransmits))
}

// sweepable reports whether there is anything that sweep may have to remove one day.
func (m *metrics) sweepable() bool {
	m.mu.RLock()
	series := len(m.series)
	m.mu.RUnlock()
	m.policyMu.Lock()
	defer m.policyMu.Unlock()
	return m.cfg.Store != nil && series+len(m.policies) > 0
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
	m.sweepSeries(now, existing(snapshot))
	m.sweepPolicies(now, snapshot)
}

func (m *metrics) sweepSeries(now time.Time, workloads map[dataplane.Name]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for l, s := range m.series {
		if s.live.Load() > 0 || now.Sub(time.Unix(0, s.used.Load())) < m.cfg.StaleAfter || l.exists(workloads) {
			continue
		}
		delete(m.series, l)
		clear(m.parties) // some may count in it
	}
	m.overflown = m.overflown && len(m.series) >= m.cfg.MaxSeries
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
