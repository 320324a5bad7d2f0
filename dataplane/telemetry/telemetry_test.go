package telemetry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func workload(name string) *dataplane.Workload {
	return &dataplane.Workload{
		UID: name, Name: dataplane.Name{Namespace: "shop", Name: name + "-abc12"},
		Owner: dataplane.Owner{Kind: "Deployment", Name: name}, Labels: map[string]string{"app": name, "version": "v2"},
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Phase: dataplane.PodRunning,
	}
}

func attempt() Attempt {
	id := func(name string) spiffe.ID {
		return spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name}
	}
	return Attempt{
		Direction:   Outbound,
		Source:      Peer{Addr: netip.MustParseAddrPort("10.0.0.1:4000"), Workload: workload("web"), Identity: id("web")},
		Destination: Peer{Addr: netip.MustParseAddrPort("10.0.1.1:3306"), Workload: workload("db"), Identity: id("db")},
		Service:     &dataplane.Service{Name: dataplane.Name{Namespace: "shop", Name: "mysql"}, Host: "mysql.shop.svc.cluster.local"},
		Tunnel:      netip.MustParseAddrPort("10.0.1.1:15008"),
	}
}

func newTelemetry(t *testing.T, cfg Config) (*Telemetry, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	cfg.Registerer = registry
	tel, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tel, registry
}

func run(t testing.TB, tel *Telemetry) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tel.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// sum adds up the samples of a metric.
func sum(t *testing.T, g prometheus.Gatherer, name string) (total float64) {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return total
}

func TestMetricsHaveIstiosNamesAndLabels(t *testing.T) {
	tel, registry := newTelemetry(t, Config{Cluster: "Kubernetes"})
	c := tel.Open(attempt())
	c.Sent(10)
	c.Received(20)
	c.Close(FlagsNone, nil)
	tel.Refuse(attempt(), FlagsDeny, errors.New("no"))
	labels := func(flags string) string {
		return `{connection_security_policy="mutual_tls",destination_app="db",destination_canonical_revision="v2",destination_canonical_service="db",destination_cluster="Kubernetes",destination_principal="spiffe://cluster.local/ns/shop/sa/db",destination_service="mysql.shop.svc.cluster.local",destination_service_name="mysql",destination_service_namespace="shop",destination_version="v2",destination_workload="db",destination_workload_namespace="shop",reporter="source",request_protocol="tcp",response_flags="` + flags + `",source_app="web",source_canonical_revision="v2",source_canonical_service="web",source_cluster="Kubernetes",source_principal="spiffe://cluster.local/ns/shop/sa/web",source_version="v2",source_workload="web",source_workload_namespace="shop"}`
	}
	want := fmt.Sprintf(`# HELP istio_tcp_connections_closed_total Connections closed.
# TYPE istio_tcp_connections_closed_total counter
istio_tcp_connections_closed_total%[1]s 1
# HELP istio_tcp_connections_failed_total Connections that were refused or did not come up.
# TYPE istio_tcp_connections_failed_total counter
istio_tcp_connections_failed_total%[2]s 1
# HELP istio_tcp_connections_opened_total Connections opened.
# TYPE istio_tcp_connections_opened_total counter
istio_tcp_connections_opened_total%[1]s 1
# HELP istio_tcp_received_bytes_total Bytes from destination to source.
# TYPE istio_tcp_received_bytes_total counter
istio_tcp_received_bytes_total%[1]s 20
# HELP istio_tcp_sent_bytes_total Bytes from source to destination.
# TYPE istio_tcp_sent_bytes_total counter
istio_tcp_sent_bytes_total%[1]s 10
`, labels("-"), labels("DENY"))
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total",
		"istio_tcp_connections_failed_total", "istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"); err != nil {
		t.Error(err)
	}
}

func TestWhatIsNotKnownIsUnknown(t *testing.T) {
	tel, registry := newTelemetry(t, Config{})
	tel.Open(Attempt{Direction: Inbound}).Close(FlagsNone, nil)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "istio_tcp_connections_opened_total" {
			continue
		}
		for _, l := range f.GetMetric()[0].GetLabel() {
			switch l.GetName() {
			case "reporter", "request_protocol", "response_flags":
			default:
				if l.GetValue() != "unknown" {
					t.Errorf("%s is %q", l.GetName(), l.GetValue())
				}
			}
		}
	}
}

func TestOpenedLessClosedIsLiveAndBytesAreExactUnderLoad(t *testing.T) {
	tel, registry := newTelemetry(t, Config{Interval: time.Millisecond, RecentFlows: 100_000})
	stop := run(t, tel)
	defer stop()
	const workers, each = 8, 200
	var wg sync.WaitGroup
	var mu sync.Mutex
	var sent, received, closed int
	for range workers {
		wg.Go(func() {
			for i := range each {
				c := tel.Open(attempt())
				s, r := rand.IntN(5000), rand.IntN(5000)
				for range 10 {
					c.Sent(s)
					c.Received(r)
				}
				mu.Lock()
				sent, received = sent+10*s, received+10*r
				if i%3 > 0 {
					closed++
				}
				mu.Unlock()
				if i%3 > 0 {
					go c.Close(FlagsReset, errors.New("again")) // twice, at the same time
					c.Close(FlagsNone, nil)
				}
			}
		})
	}
	wg.Wait()
	tel.report(time.Now().Add(time.Second))
	stop()
	opened := workers * each
	for name, want := range map[string]int{
		"istio_tcp_connections_opened_total": opened, "istio_tcp_connections_closed_total": closed,
		"istio_tcp_sent_bytes_total": sent, "istio_tcp_received_bytes_total": received, "raceway_connections_live": opened - closed,
	} {
		if got := sum(t, registry, name); got != float64(want) {
			t.Errorf("%s is %v, want %d", name, got, want)
		}
	}
	if got := len(tel.Connections()); got != opened-closed {
		t.Errorf("%d connections are listed, want %d", got, opened-closed)
	}
	opens, closes := map[string]int{}, map[string]int{}
	if err := tel.Flows(t.Context(), false, func(f admin.Flow) error {
		switch f.Event {
		case admin.FlowOpen:
			opens[f.ID]++
		case admin.FlowClose:
			closes[f.ID]++
			if f.Cause == "" {
				t.Error("a close without a cause")
			}
		default:
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(opens) != opened || len(closes) != closed {
		t.Errorf("%d IDs opened and %d closed, want %d and %d", len(opens), len(closes), opened, closed)
	}
	for id, n := range closes {
		if n != 1 || opens[id] != 1 {
			t.Errorf("%s: %d opens, %d closes", id, opens[id], n)
		}
	}
}

func TestLongConnectionsReportWhileTheyLive(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tel, registry := newTelemetry(t, Config{Interval: 10 * time.Second})
	a := attempt()
	a.Socket = c.(*net.TCPConn)
	conn := tel.Open(a)
	_, s := tel.Subscribe(0)
	defer s.Close()
	conn.Sent(100)
	tel.report(time.Now())
	if got := sum(t, registry, "istio_tcp_sent_bytes_total"); got != 0 {
		t.Errorf("a young connection reported %v bytes", got)
	}
	tel.report(time.Now().Add(10 * time.Second))
	if got := sum(t, registry, "istio_tcp_sent_bytes_total"); got != 100 {
		t.Errorf("%v bytes reported, want 100", got)
	}
	f := <-s.C()
	if f.Event != admin.FlowUpdate || f.Sent != 100 || f.RTTMicros == 0 {
		t.Errorf("record %+v", f)
	}
	if n := testutil.CollectAndCount(tel.metrics.rtt); n != 1 {
		t.Errorf("%d round trip histograms, want 1", n)
	}
	tel.report(time.Now().Add(20 * time.Second))
	select {
	case f := <-s.C():
		t.Errorf("an idle connection reported %+v", f)
	default:
	}
	conn.Sent(1)
	conn.Close(FlagsNone, nil)
	if got := sum(t, registry, "istio_tcp_sent_bytes_total"); got != 101 {
		t.Errorf("%v bytes at the end, want 101", got)
	}
	tel.report(time.Now().Add(30 * time.Second))
	if len(tel.carriers) != 0 {
		t.Error("the socket of a connection that ended is remembered")
	}
}

func TestSlowSubscriberIsToldWhatItLost(t *testing.T) {
	tel, registry := newTelemetry(t, Config{})
	_, s := tel.Subscribe(2)
	for range 5 {
		tel.Refuse(attempt(), FlagsConnect, errors.New("refused"))
	}
	if n := len(s.C()); n != 2 {
		t.Errorf("%d records wait, want 2", n)
	}
	if n := s.Lost(); n != 3 {
		t.Errorf("lost %d, want 3", n)
	}
	if n := s.Lost(); n != 0 {
		t.Errorf("lost %d since, want 0", n)
	}
	if n := sum(t, registry, "raceway_flow_records_lost_total"); n != 3 {
		t.Errorf("metric %v, want 3", n)
	}
	s.Close()
	s.Close()
	if len(tel.flows.subscribers) != 0 {
		t.Error("it is still subscribed")
	}
}

func TestFlowsFollowsAndTellsOfLosses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tel, _ := newTelemetry(t, Config{RecentFlows: 3})
		for i := range 5 {
			tel.Refuse(Attempt{ID: ID(i + 1)}, FlagsConnect, nil)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var got []string
		done := make(chan error)
		proceed := make(chan struct{}, 10_000)
		go func() {
			done <- tel.Flows(ctx, true, func(f admin.Flow) error {
				got = append(got, f.ID)
				if f.Event == admin.FlowLost {
					got[len(got)-1] = f.Cause
				}
				<-proceed
				return nil
			})
		}()
		for range 3 {
			proceed <- struct{}{}
		}
		synctest.Wait()
		for i := range 1024 + 7 {
			tel.Refuse(Attempt{ID: ID(i + 1)}, FlagsConnect, nil)
		}
		for range 2000 {
			proceed <- struct{}{}
		}
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if want := []string{ID(3).String(), ID(4).String(), ID(5).String()}; !slices.Equal(got[:3], want) {
			t.Errorf("recent ones %v, want %v", got[:3], want)
		}
		// How many were lost depends on how many were read while they came.
		if last := got[len(got)-1]; last == "" || !strings.Contains(strings.Join(got, " "), "records lost") {
			t.Errorf("no word of a loss among %d records", len(got))
		}
	})
}

func TestSeriesOfVanishedWorkloadsGo(t *testing.T) {
	store := new(dataplane.Store)
	tel, registry := newTelemetry(t, Config{Store: store, StaleAfter: time.Minute})
	gone, stays := attempt(), attempt()
	gone.Destination.Workload = workload("gone")
	store.Publish(dataplane.NewSnapshot(dataplane.Contents{Workloads: []dataplane.Workload{*workload("web"), *workload("db")}}))
	ends, lives := tel.Open(gone), tel.Open(gone)
	tel.Open(stays).Close(FlagsNone, nil)
	tel.Refuse(gone, FlagsDeny, nil)
	ends.Close(FlagsReset, nil)
	policy := dataplane.Name{Namespace: "shop", Name: "gone"}
	tel.Decided(Decision{Kind: "AuthorizationPolicy", Policy: policy})
	count := func() int {
		n, err := testutil.GatherAndCount(registry, "istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total",
			"istio_tcp_connections_failed_total", "istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total", "raceway_policy_decisions_total")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	tel.metrics.sweep(time.Now())
	if n := count(); n != before {
		t.Errorf("%d series, had %d: too soon", n, before)
	}
	later := time.Now().Add(2 * time.Minute)
	tel.metrics.sweep(later)
	if n := count(); n != before-1 { // the policy's; a live connection holds the others
		t.Errorf("%d series, want %d while a connection lives", n, before-1)
	}
	lives.Close(FlagsNone, nil)
	tel.metrics.sweep(later.Add(2 * time.Minute))
	if n := count(); n != 4 {
		t.Errorf("%d series, want the 4 of the workload that exists", n)
	}
}

func TestSeriesAreBounded(t *testing.T) {
	tel, registry := newTelemetry(t, Config{MaxSeries: 10})
	for i := range 50 {
		a := attempt()
		a.Source.Workload = workload(fmt.Sprint(i))
		tel.Open(a).Close(FlagsNone, nil)
	}
	if n, err := testutil.GatherAndCount(registry, "istio_tcp_connections_opened_total"); n != 11 || err != nil {
		t.Errorf("%d series and %v, want 10 and one for all others", n, err)
	}
	if n := sum(t, registry, "istio_tcp_connections_opened_total"); n != 50 {
		t.Errorf("%v counted, want 50", n)
	}
}

func TestDecisionsAreCountedByPolicyAndDryRunApart(t *testing.T) {
	tel, registry := newTelemetry(t, Config{})
	policy := dataplane.Name{Namespace: "shop", Name: "p"}
	for _, d := range []Decision{
		{Kind: "AuthorizationPolicy", Policy: policy, Allowed: true},
		{Kind: "AuthorizationPolicy", Policy: policy},
		{Kind: "AuthorizationPolicy", Policy: policy, DryRun: true},
		{Allowed: true},
	} {
		tel.Decided(d)
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(`# HELP raceway_policy_decisions_total Authorization decisions by the policy that made them; dry_run ones had no effect.
# TYPE raceway_policy_decisions_total counter
raceway_policy_decisions_total{dry_run="false",kind="AuthorizationPolicy",outcome="allow",policy="p",policy_namespace="shop"} 1
raceway_policy_decisions_total{dry_run="false",kind="AuthorizationPolicy",outcome="deny",policy="p",policy_namespace="shop"} 1
raceway_policy_decisions_total{dry_run="true",kind="AuthorizationPolicy",outcome="deny",policy="p",policy_namespace="shop"} 1
raceway_policy_decisions_total{dry_run="false",kind="none",outcome="allow",policy="none",policy_namespace="none"} 1
`), "raceway_policy_decisions_total"); err != nil {
		t.Error(err)
	}
	if got := tel.PolicyCounts("AuthorizationPolicy", policy, false); got != (PolicyCount{Allowed: 1, Denied: 1}) {
		t.Errorf("counted %+v in force", got)
	}
	if got := tel.PolicyCounts("AuthorizationPolicy", policy, true); got != (PolicyCount{Denied: 1}) {
		t.Errorf("counted %+v in dry runs", got)
	}
}

func TestSourcesAreAskedAtEachScrape(t *testing.T) {
	tel, registry := newTelemetry(t, Config{})
	err := tel.Attach(Sources{
		Pods: func() map[dataplane.CaptureState]int {
			return map[dataplane.CaptureState]int{dataplane.CaptureInForce: 3}
		},
		Certificates: func() []Certificate {
			return []Certificate{{Identity: attempt().Source.Identity, NotAfter: time.Unix(1000, 0)}}
		},
		Pool:  func() Pool { return Pool{Sessions: 1, Streams: 2} },
		Hooks: func() ([]Counter, error) { return []Counter{{Hook: "guard", Reason: "plaintext", Value: 7}}, nil },

		Staleness: func() time.Duration { return time.Minute },
	})
	if err != nil {
		t.Fatal(err)
	}
	tel.HandshakeFailed(Inbound, "expired")
	tel.LimitReached("buffers")
	tel.Repaired("routing")
	if err := testutil.GatherAndCompare(registry, strings.NewReader(`# HELP raceway_bpf_events_total What the BPF programs decided, by hook and reason.
# TYPE raceway_bpf_events_total counter
raceway_bpf_events_total{hook="guard",reason="plaintext"} 7
# HELP raceway_capture_repairs_total What somebody took from the capture and the agent put back, by its part.
# TYPE raceway_capture_repairs_total counter
raceway_capture_repairs_total{part="routing"} 1
# HELP raceway_certificate_expiry_timestamp_seconds When the certificate of an identity expires, in Unix time; 0 when there is none.
# TYPE raceway_certificate_expiry_timestamp_seconds gauge
raceway_certificate_expiry_timestamp_seconds{identity="spiffe://cluster.local/ns/shop/sa/web"} 1000
# HELP raceway_discovery_staleness_seconds For how long the API server has not answered; 0 while it does.
# TYPE raceway_discovery_staleness_seconds gauge
raceway_discovery_staleness_seconds 60
# HELP raceway_enrolled_pods Pods of this node by state of their capture.
# TYPE raceway_enrolled_pods gauge
raceway_enrolled_pods{state="captured"} 3
# HELP raceway_handshake_failures_total TLS handshakes that failed, by direction of the tunnel and cause.
# TYPE raceway_handshake_failures_total counter
raceway_handshake_failures_total{cause="expired",direction="inbound"} 1
# HELP raceway_limit_reached_total How often a limit bit, by limit.
# TYPE raceway_limit_reached_total counter
raceway_limit_reached_total{limit="buffers"} 1
`), "raceway_bpf_events_total", "raceway_capture_repairs_total", "raceway_discovery_staleness_seconds", "raceway_certificate_expiry_timestamp_seconds", "raceway_enrolled_pods", "raceway_handshake_failures_total", "raceway_limit_reached_total"); err != nil {
		t.Error(err)
	}
	if got := sum(t, registry, "raceway_tunnel_pool"); got != 3 {
		t.Errorf("pool sums to %v", got)
	}
}
