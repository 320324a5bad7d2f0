package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/cmd/raceway-ca/internal/kube"
)

// metrics counts what the certificate API answers, and what the API server is asked for that.
type metrics struct {
	registry *prometheus.Registry
	signed   prometheus.Counter
	refused  *prometheus.CounterVec
	reviews  *prometheus.CounterVec
	waited   prometheus.Histogram
	bundles  *prometheus.CounterVec
}

func newMetrics() (*metrics, error) {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		signed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "raceway_ca_certificates_signed_total",
			Help: "Workload certificates signed.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "raceway_ca_requests_refused_total",
			Help: "Certificate requests refused, by cause.",
		}, []string{"cause"}),
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "raceway_ca_token_reviews_total",
			Help: "Tokens of callers judged, by outcome.",
		}, []string{"outcome"}),
		waited: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "raceway_ca_token_review_duration_seconds",
			Help:    "How long the API server took to review a token.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14), // to 8 s; a review is given up after 5
		}),
		bundles: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "raceway_ca_bundle_checks_total",
			Help: "Checks that the published roots are the authority's, and repairs, by outcome.",
		}, []string{"outcome"}),
	}
	for _, cause := range istio.Refusals() {
		m.refused.WithLabelValues(string(cause)) // a counter that is there before it counts
	}
	for _, outcome := range kube.Reviews() {
		m.reviews.WithLabelValues(string(outcome))
	}
	for _, outcome := range []string{succeeded, failed} {
		m.bundles.WithLabelValues(outcome)
	}
	for _, c := range []prometheus.Collector{
		m.signed, m.refused, m.reviews, m.waited, m.bundles,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metric: %w", err)
		}
	}
	return m, nil
}

// watch adds what is known once there is an authority.
func (m *metrics) watch(authority *ca.Authority) error {
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "raceway_ca_signing_certificate_expiry_timestamp_seconds",
		Help: "When the signing certificate, or the first one above it, expires.",
	}, func() float64 { return float64(authority.Expires().Unix()) })
	if err := m.registry.Register(expiry); err != nil {
		return fmt.Errorf("register metric: %w", err)
	}
	return nil
}

// Outcomes of a check of the bundle.
const (
	succeeded = "succeeded"
	failed    = "failed"
)

func (m *metrics) bundle(err error) {
	outcome := succeeded
	if err != nil {
		outcome = failed
	}
	m.bundles.WithLabelValues(outcome).Inc()
}

func (m *metrics) review(outcome kube.Review, took time.Duration) {
	m.reviews.WithLabelValues(string(outcome)).Inc()
	if took > 0 { // the API server was asked
		m.waited.Observe(took.Seconds())
	}
}

func (m *metrics) count(r istio.Result) {
	if r.Outcome == istio.Signed {
		m.signed.Inc()
		return
	}
	m.refused.WithLabelValues(string(r.Outcome)).Inc()
}

// handler serves /metrics; /healthz, which says that the process lives; and /readyz, which
// fails while nothing can be signed.
func (m *metrics) handler(ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", answer(func() error { return nil }))
	mux.HandleFunc("GET /readyz", answer(ready))
	return mux
}

func answer(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := check(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		// Nothing can be done about a prober that does not read its answer.
		_, _ = fmt.Fprintln(w, "ok")
	}
}

// serveHTTP serves handler on l, which it closes, until ctx ends.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() {
		_ = server.Close() // reported by Serve, as http.ErrServerClosed
	})
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
