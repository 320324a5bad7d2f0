package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// metricsServer serves /metrics to Prometheus and /readyz to the kubelet.
type metricsServer struct {
	listener net.Listener
	server   *http.Server
}

func listenMetrics(address string, registry *prometheus.Registry, ready func() error) (*metricsServer, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}))
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusOK)
	})
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       5 * time.Second,
		MaxHeaderBytes:    16 << 10,
	}
	return &metricsServer{listener: netutil.LimitListener(l, maxScrapers), server: server}, nil
}

// On Kubernetes every pod of the cluster reaches the server: what it can take of the agent's
// memory, files and CPU, which are for the data plane, is bounded.
const (
	maxScrapers = 64 // connections
	maxScrapes  = 4  // at one time; others are answered 503
)

// Run serves until ctx ends.
func (m *metricsServer) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.server.Close() })
	defer stop()
	if err := m.server.Serve(m.listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

// stop ends Run and frees the address.
func (m *metricsServer) stop() error { return errors.Join(m.server.Close(), m.Close()) }

// Close frees the address. It may be called again, also when Run never ran.
func (m *metricsServer) Close() error {
	if err := m.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// podStates, certificateExpiry and hookCounters are asked at every scrape. What belongs to the
// node is told by the agent that has it.
func (a *Agent) podStates() map[dataplane.CaptureState]int {
	states := map[dataplane.CaptureState]int{}
	if a.yielded.Load() {
		return states
	}
	for _, st := range a.reconciler.Status() {
		states[st.State]++
	}
	return states
}

func (a *Agent) certificateExpiry() []telemetry.Certificate {
	status := a.keeper.Status()
	list := make([]telemetry.Certificate, 0, len(status))
	for _, st := range status {
		list = append(list, telemetry.Certificate{Identity: st.Identity, NotAfter: st.NotAfter})
	}
	return list
}

func (a *Agent) hookCounters() ([]telemetry.Counter, error) {
	if a.unloaded.Load() || a.yielded.Load() {
		return nil, nil
	}
	counters, err := a.datapath.Counters()
	if err != nil {
		return nil, err
	}
	list := make([]telemetry.Counter, 0, len(counters))
	for _, c := range counters {
		list = append(list, telemetry.Counter(c))
	}
	return list, nil
}
