package telemetry

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// series is the connection metrics of one set of labels. They are counted here and not in
// prometheus.CounterVecs, because 23 labels take two kilobytes: here the five metrics share
// them, and a connection finds its counters without hashing them.
type series struct {
	labels  labels
	none    *outcome // what all connections share that have no flags yet
	created *timestamppb.Timestamp

	opened, sent, received atomic.Uint64

	live atomic.Int64 // open connections; never removed while there are any
	used atomic.Int64 // when the last one ended, in Unix nanoseconds

	mu             sync.Mutex
	closed, failed []*outcome
}

// outcome counts connections that ended with the same flags.
type outcome struct {
	flags  Flags
	labels []*dto.LabelPair // by name
	count  atomic.Uint64
}

func (s *series) open() {
	s.live.Add(1)
	s.opened.Add(1)
}

func (s *series) close(flags Flags, now time.Time) {
	s.used.Store(now.UnixNano())
	s.outcome(&s.closed, flags).count.Add(1)
	s.live.Add(-1) // last: until then it is not removed
}

func (s *series) handOver(now time.Time) {
	s.used.Store(now.UnixNano())
	s.live.Add(-1) // last: until then it is not removed
}

func (s *series) refuse(flags Flags, now time.Time) {
	s.used.Store(now.UnixNano())
	s.outcome(&s.failed, flags).count.Add(1)
}

func (s *series) outcome(list *[]*outcome, flags Flags) *outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range *list {
		if o.flags == flags {
			return o
		}
	}
	o := &outcome{flags: flags, labels: s.labelsWith(flags)}
	*list = append(*list, o)
	return o
}

// labelsWith shares all but one label with none's.
func (s *series) labelsWith(flags Flags) []*dto.LabelPair {
	if flags == FlagsNone {
		return s.none.labels
	}
	pairs := make([]*dto.LabelPair, len(s.none.labels))
	for i, p := range s.none.labels {
		pairs[i] = p
		if p.GetName() == labelFlags {
			value := string(flags)
			pairs[i] = &dto.LabelPair{Name: p.Name, Value: &value}
		}
	}
	return pairs
}

// connectionCollector shows every series; the names and labels are Istio's.
type connectionCollector struct {
	metrics                                *metrics
	opened, closed, sent, received, failed *prometheus.Desc
}

func newConnectionCollector(m *metrics) *connectionCollector {
	desc := func(name, help string) *prometheus.Desc { return prometheus.NewDesc(name, help, labelNames(), nil) }
	return &connectionCollector{
		metrics:  m,
		opened:   desc("istio_tcp_connections_opened_total", "Connections opened."),
		closed:   desc("istio_tcp_connections_closed_total", "Connections closed."),
		sent:     desc("istio_tcp_sent_bytes_total", "Bytes from source to destination."),
		received: desc("istio_tcp_received_bytes_total", "Bytes from destination to source."),
		failed:   desc("istio_tcp_connections_failed_total", "Connections that were refused or did not come up."),
	}
}

// Describe implements prometheus.Collector.
func (c *connectionCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.opened, c.closed, c.sent, c.received, c.failed} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (c *connectionCollector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c.metrics.allSeries() {
		counter := func(desc *prometheus.Desc, labels []*dto.LabelPair, value uint64) {
			out <- &sample{desc: desc, labels: labels, value: float64(value), created: s.created}
		}
		if n := s.opened.Load(); n > 0 { // a series may have refusals alone
			counter(c.opened, s.none.labels, n)
		}
		counter(c.sent, s.none.labels, s.sent.Load())
		counter(c.received, s.none.labels, s.received.Load())
		closed, failed := s.outcomes()
		for _, o := range closed {
			counter(c.closed, o.labels, o.count.Load())
		}
		for _, o := range failed {
			counter(c.failed, o.labels, o.count.Load())
		}
	}
}

// outcomes are those so far.
func (s *series) outcomes() (closed, failed []*outcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed[:len(s.closed):len(s.closed)], s.failed[:len(s.failed):len(s.failed)]
}

// sample is a counter at one moment.
type sample struct {
	desc    *prometheus.Desc
	labels  []*dto.LabelPair
	value   float64
	created *timestamppb.Timestamp
}

// Desc implements prometheus.Metric.
func (s *sample) Desc() *prometheus.Desc { return s.desc }

// Write implements prometheus.Metric.
func (s *sample) Write(out *dto.Metric) error {
	out.Label = s.labels
	out.Counter = &dto.Counter{Value: &s.value, CreatedTimestamp: s.created}
	return nil
}
