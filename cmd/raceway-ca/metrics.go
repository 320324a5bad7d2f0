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
	"github.com/raceway-mesh/raceway/dataplane"
)

// metrics counts what the certificate API answers.
type metrics struct {
	registry *prometheus.Registry
	signed   prometheus.Counter
	refused  *prometheus.CounterVec
}

func newMetrics(authority *ca.Authority) (*metrics, error) {
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
	}
	for _, cause := range istio.Refusals() {
		m.refused.WithLabelValues(string(cause)) // a counter that is there before it counts
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "raceway_ca_signing_certificate_expiry_timestamp_seconds",
		Help: "When the signing certificate, or the first one above it, expires.",
	}, func() float64 { return float64(authority.Expires().Unix()) })
	for _, c := range []prometheus.Collector{
		m.signed, m.refused, expiry, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metric: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) count(r istio.Result) {
	if r.Outcome == istio.Signed {
		m.signed.Inc()
		return
	}
	m.refused.WithLabelValues(string(r.Outcome)).Inc()
}

// handler serves /metrics and /healthz; the latter fails while nothing can be signed.
func (m *metrics) handler(authority *ca.Authority, store *dataplane.Store) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := healthy(authority, store); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		// Nothing can be done about a prober that does not read its answer.
		_, _ = fmt.Fprintln(w, "ok")
	})
	return mux
}

func healthy(authority *ca.Authority, store *dataplane.Store) error {
	if snapshot, _ := store.Load(); snapshot == nil {
		return errNoSnapshot
	}
	if expires := authority.Expires(); !time.Now().Before(expires) {
		return fmt.Errorf("%w at %s", ca.ErrExpired, expires.UTC().Format(time.RFC3339))
	}
	return nil
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
