package admin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

var (
	webID = spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	noon  = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
)

func connection() admin.Connection {
	return admin.Connection{
		ID: "c1", Direction: "outbound", Protocol: dataplane.ProtocolHBONE, Opened: noon, Sent: 1, Received: 2,
		Source:      admin.Peer{Addr: netip.MustParseAddrPort("10.1.1.2:40000"), Workload: "web", Namespace: "shop", Identity: webID},
		Destination: admin.Peer{Addr: netip.MustParseAddrPort("[fd00::3]:3306")},
		Tunnel:      netip.MustParseAddrPort("[fd00::3]:15008"),
	}
}

// start serves b and returns its client.
func start(t *testing.T, b admin.Backend) *admin.Client {
	t.Helper()
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", b)
	client := admin.NewClient(filepath.Join(dir, "n1.sock"))
	t.Cleanup(client.Close)
	return client
}

func TestClientGetsWhatTheBackendAnswers(t *testing.T) {
	b := &admintest.Backend{
		WorkloadRows: []admin.Workload{
			{Namespace: "shop", Name: "web", Addrs: []netip.Addr{netip.MustParseAddr("10.1.1.2")}, Identity: webID, Protocol: dataplane.ProtocolHBONE, Capture: dataplane.CaptureInForce, Since: noon},
			{Namespace: "shop", Name: "db", Capture: dataplane.CaptureFailed, Reason: "attach: no such device"},
		},
		ServiceRows:     []admin.Service{{Namespace: "shop", Name: "db", Ports: []uint16{3306}, Ready: 1}},
		PolicyRows:      []admin.Policy{{Kind: "AuthorizationPolicy", Name: "p", DryRun: true, Issues: []string{"an issue"}}},
		CertificateRows: []admin.Certificate{{Identity: webID, State: "valid", NotAfter: noon}},
		ConnectionRows:  []admin.Connection{connection()},
		Findings:        []admin.Finding{{Subject: "agent", Check: "socket", OK: true}},
		Running:         admin.Version{Version: "v1", Node: "n1"},
		Answer: func(q admin.WhyQuery) (admin.Why, error) {
			return admin.Why{Source: q.Source, Destination: q.Destination, Next: "from " + q.From, SourceID: webID}, nil
		},
	}
	c := start(t, b)
	ctx := t.Context()
	check := func(what string, want any, got any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s = %+v, %v; want %+v", what, got, err, want)
		}
	}
	workloads, err := c.Workloads(ctx)
	check("Workloads", b.WorkloadRows, workloads, err)
	services, err := c.Services(ctx)
	check("Services", b.ServiceRows, services, err)
	policies, err := c.Policies(ctx)
	check("Policies", b.PolicyRows, policies, err)
	certificates, err := c.Certificates(ctx)
	check("Certificates", b.CertificateRows, certificates, err)
	connections, err := c.Connections(ctx)
	check("Connections", b.ConnectionRows, connections, err)
	findings, err := c.Check(ctx)
	check("Check", b.Findings, findings, err)
	version, err := c.Version(ctx)
	check("Version", b.Running, version, err)
	why, err := c.Why(ctx, admin.WhyQuery{Source: "a b&c", Destination: "[fd00::1]:80", From: "shop"})
	check("Why", admin.Why{Source: "a b&c", Destination: "[fd00::1]:80", Next: "from shop", SourceID: webID}, why, err)
}

func TestEmptyListIsNotNull(t *testing.T) {
	c := start(t, &admintest.Backend{})
	status, body := request(t, c.Address(), http.MethodGet, "/v1/workloads", "")
	if status != http.StatusOK || body != "[]\n" {
		t.Errorf("GET /v1/workloads = %d %q, want 200 []", status, body)
	}
}

func TestLogLevelChanges(t *testing.T) {
	c := start(t, &admintest.Backend{})
	if level, err := c.LogLevel(t.Context()); err != nil || level != slog.LevelInfo {
		t.Fatalf("LogLevel = %v, %v", level, err)
	}
	if err := c.SetLogLevel(t.Context(), slog.LevelDebug); err != nil {
		t.Fatal(err)
	}
	if level, err := c.LogLevel(t.Context()); err != nil || level != slog.LevelDebug {
		t.Errorf("LogLevel after the change = %v, %v", level, err)
	}
}

// request speaks plain HTTP to a socket.
func request(t *testing.T, socket, method, path, body string) (int, string) {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://agent"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	text, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func TestBadRequestsAreAnsweredWithAReason(t *testing.T) {
	c := start(t, &admintest.Backend{})
	for _, test := range []struct {
		name, method, path, body string
		status                   int
		says                     string
	}{
		{"unknown path", "GET", "/v1/pods", "", 404, "there is no /v1/pods"},
		{"wrong method", "POST", "/v1/workloads", "", 405, "takes GET, not POST"},
		{"wrong method of flows", "DELETE", "/v1/flows", "", 405, "takes GET, not DELETE"},
		{"wrong method of the level", "POST", "/v1/log-level", "", 405, "takes GET, PUT"},
		{"unknown parameter", "GET", "/v1/workloads?namespce=x", "", 400, `no parameter \"namespce\"`},
		{"repeated parameter", "GET", "/v1/why?source=a&source=b&destination=c", "", 400, "source is given 2 times"},
		{"overlong parameter", "GET", "/v1/why?destination=c&source=" + strings.Repeat("a", 2000), "", 400, "longer than 1024"},
		{"bad escape", "GET", "/v1/why?source=%zz", "", 400, "invalid URL escape"},
		{"missing source", "GET", "/v1/why?destination=c", "", 400, "source is missing"},
		{"missing destination", "GET", "/v1/why?source=c", "", 400, "destination is missing"},
		{"bad follow", "GET", "/v1/flows?follow=perhaps", "", 400, "true or false"},
		{"bad level", "PUT", "/v1/log-level", `{"level":"LOUD"}`, 400, "LOUD"},
		{"no level", "PUT", "/v1/log-level", `{}`, 400, "names no level"},
		{"no JSON", "PUT", "/v1/log-level", `debug`, 400, "read the level"},
		{"large body", "PUT", "/v1/log-level", strings.Repeat("x", 5000), 413, "larger than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, body := request(t, c.Address(), test.method, test.path, test.body)
			if status != test.status || !strings.HasPrefix(body, `{"error":"`) || !strings.Contains(body, test.says) {
				t.Errorf("%s %s = %d %s, want %d with %q", test.method, test.path, status, body, test.status, test.says)
			}
		})
	}
}

func TestErrorKeepsItsStatusAndCandidates(t *testing.T) {
	for _, test := range []struct {
		name   string
		err    error
		status int
		says   string
	}{
		{"not found", &admin.Error{Status: 404, Message: "no pod x", Candidates: []string{"shop/y", "shop/z"}}, 404, "no pod x: did you mean shop/y, shop/z?"},
		{"not ready", admin.NotReady("not yet"), 503, "not yet"},
		{"internal", errors.New("map is full"), 500, "map is full"},
		{"too slow", context.DeadlineExceeded, 504, "deadline"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, &admintest.Backend{Answer: func(admin.WhyQuery) (admin.Why, error) { return admin.Why{}, test.err }})
			_, err := c.Why(t.Context(), admin.WhyQuery{Source: "x", Destination: "y:1"})
			var answer *admin.Error
			if !errors.As(err, &answer) || answer.Status != test.status || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Why = %#v, want status %d with %q", err, test.status, test.says)
			}
		})
	}
}

func TestPprofAnswers(t *testing.T) {
	c := start(t, &admintest.Backend{})
	if status, body := request(t, c.Address(), "GET", "/debug/pprof/goroutine?debug=1", ""); status != 200 || !strings.Contains(body, "goroutine profile") {
		t.Errorf("GET /debug/pprof/goroutine = %d %.80s", status, body)
	}
}
