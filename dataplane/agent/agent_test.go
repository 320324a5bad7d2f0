package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func valid() Config {
	return Config{Node: "n1", ClusterDir: "/cluster", CAAddress: "ca:15012", CARootFile: "/root.pem", CATokenFile: "/token"}
}

func TestConfigValidation(t *testing.T) {
	if err := valid().Validate(); err != nil {
		t.Errorf("the least that is needed: %v", err)
	}
	for _, tt := range []struct {
		name string
		edit func(*Config)
		text string
	}{
		{"no node", func(c *Config) { c.Node = "" }, "node is not set"},
		{"node that is a path", func(c *Config) { c.Node = "../n1" }, "is not a name"},
		{"a kubeconfig for a directory", func(c *Config) { c.Kubeconfig = "/kubeconfig" }, "kubeconfig goes with an API server, and the cluster is directory /cluster"},
		{"a snapshot file for a directory", func(c *Config) { c.SnapshotFile = "/snapshot" }, "snapshot file goes with an API server"},
		{"a taint in a directory", func(c *Config) { c.StartupTaint = "x" }, "startup taint goes with an API server"},
		{"labels in a directory", func(c *Config) { c.EnrollLabels = []string{"x"} }, "enrolment label goes with an API server"},
		{"CNI with a directory", func(c *Config) { c.CNI = CNIConfig{ConfDir: "/conf", BinDir: "/bin"} }, "CNI plugin goes with an API server"},
		{"status files without a directory", func(c *Config) { c.ClusterDir, c.StatusDir = "", "/status" }, "status directory goes with a cluster directory, and there is none"},
		{"kubelet's cgroup", func(c *Config) { c.KubeletCgroup = "kubelet.service" }, "none of auto, none and a directory"},
		{"half of the CNI directories", func(c *Config) { c.ClusterDir, c.CNI.BinDir = "", "/bin" }, "one is set and the other is not"},
		{"a token for nobody", func(c *Config) { c.ClusterDir, c.CNI.TokenFile = "", "/token" }, "the CNI plugin has a token, and no API server"},
		{"no CA", func(c *Config) { c.CAAddress = "" }, "CA address is not set"},
		{"no roots", func(c *Config) { c.CARootFile = "" }, "CA root file is not set"},
		{"no token", func(c *Config) { c.CATokenFile = "" }, "CA token file is not set"},
		{"trust domain", func(c *Config) { c.TrustDomain = "Cluster Local" }, "trust domain"},
		{"settle", func(c *Config) { c.Settle = -1 }, "settle of -1ns is negative"},
		{"grace", func(c *Config) { c.Grace = -1 }, "grace"},
		{"drain", func(c *Config) { c.DrainTimeout = -1 }, "drain timeout"},
		{"flows", func(c *Config) { c.FlowInterval = -1 }, "flow interval"},
		{"lifetime", func(c *Config) { c.CertTTL = -1 }, "certificate lifetime"},
		{"bound on a pod", func(c *Config) { c.Limits = proxy.Limits{PodConnections: -1} }, "pod's connections"},
		{"bound on the node", func(c *Config) { c.Limits = proxy.Limits{NodeConnections: -1} }, "node's connections"},
	} {
		c := valid()
		tt.edit(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.text)
		}
	}
	if err := (Config{Settle: -1}).Validate(); err == nil || strings.Count(err.Error(), "\n") != 4 {
		t.Errorf("not every complaint: %v", err)
	}
}

func TestPathsFollowTheNodesName(t *testing.T) {
	c := valid().withDefaults()
	for _, path := range []struct{ got, want string }{
		{c.StatusDir, "/cluster/.raceway"},
		{c.Socket, "/run/raceway/n1.sock"},
		{c.StateDir, "/run/raceway/n1"},
		{c.BPFDir, "/sys/fs/bpf/raceway/n1"},
		{c.TrustDomain, "cluster.local"},
		{c.HostNetNS, ""},
	} {
		if path.got != path.want {
			t.Errorf("%s, want %s", path.got, path.want)
		}
	}
	kube := valid()
	kube.ClusterDir, kube.HostProc = "", "/host/proc"
	if kube = kube.withDefaults(); kube.StatusDir != "" || kube.HostNetNS != "/host/proc/1/ns/net" {
		t.Errorf("with an API server: status directory %q, host's namespace %q", kube.StatusDir, kube.HostNetNS)
	}
	set := valid()
	set.Socket, set.DrainTimeout = "/other.sock", time.Minute
	if c := set.withDefaults(); c.Socket != "/other.sock" || c.DrainTimeout != time.Minute {
		t.Errorf("what is set was not kept: %s, %v", c.Socket, c.DrainTimeout)
	}
}

// TestScrapersAreBounded: whoever reaches the metrics must not have the data plane's files and memory.
func TestScrapersAreBounded(t *testing.T) {
	m, err := listenMetrics("127.0.0.1:0", prometheus.NewRegistry(), func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	// Connections are accepted in the order in which they are made.
	var all []net.Conn
	for range maxScrapers + 1 {
		conn, err := net.Dial("tcp", m.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		all = append(all, conn)
	}
	last := all[maxScrapers]
	if _, err := last.Write([]byte("GET /readyz HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	answer := func(patience time.Duration) (int, error) {
		if err := last.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return last.Read(make([]byte, 1))
	}
	if _, err := answer(100 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one too many was served: %v", err)
	}
	if err := all[0].Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := answer(3 * time.Second); err != nil {
		t.Errorf("nobody is served when there is room: %v", err)
	}
}

func TestMetricsAndReadiness(t *testing.T) {
	registry, ready := prometheus.NewRegistry(), new(readiness)
	ready.set(errNoView)
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "raceway_test"}, func() float64 { return 7 }))
	m, err := listenMetrics("127.0.0.1:0", registry, ready.get)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenMetrics(m.listener.Addr().String(), registry, ready.get); err == nil || !strings.Contains(err.Error(), "serve metrics") {
		t.Errorf("address in use: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		t.Helper()
		reply, err := client.Get("http://" + m.listener.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = reply.Body.Close() }()
		text, err := io.ReadAll(reply.Body)
		if err != nil {
			t.Fatal(err)
		}
		return reply.StatusCode, string(text)
	}
	if code, text := get("/metrics"); code != http.StatusOK || !strings.Contains(text, "raceway_test 7") {
		t.Errorf("metrics: %d %s", code, text)
	}
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "no complete view") {
		t.Errorf("not ready: %d %s", code, text)
	}
	ready.set(nil)
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("ready: %d", code)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

func TestMisspeltNodeIsNoticed(t *testing.T) {
	s := dataplane.NewSnapshot(dataplane.Contents{
		Nodes:     []dataplane.Node{{Name: "n1"}},
		Workloads: []dataplane.Workload{{UID: "web", Node: "n2"}},
	})
	for node, known := range map[string]bool{"n1": true, "n2": true, "N1": false} {
		if err := knowsNode(s, node); known != (err == nil) || err != nil && !strings.Contains(err.Error(), node) {
			t.Errorf("%s: %v", node, err)
		}
	}
}

type fakeRepair struct {
	mended []string
	err    error
}

func (f *fakeRepair) Repair() ([]string, error) { return f.mended, f.err }

func TestRepairsAreTold(t *testing.T) {
	var log bytes.Buffer
	counted := map[string]int{}
	r := repairs{log: slog.New(slog.NewTextHandler(&log, nil)), count: func(part string) { counted[part]++ }}
	web := new(fakeRepair)
	for _, step := range []struct {
		name   string
		mended []string
		err    error
		text   string // in the log; "" for an empty log
	}{
		{"in order", nil, nil, ""},
		{"mended", []string{"routing: no rule", "sysctls: 0"}, nil, "routing: no rule; sysctls: 0"},
		{"mended again", []string{"routing: no rule"}, nil, "routing: no rule"},
		{"broken", nil, errors.New("no veth"), "no veth"},
		{"still broken", nil, errors.New("no veth"), ""},
		{"in another way", nil, errors.New("no rule"), "no rule"},
		{"in order again", nil, nil, ""},
		{"broken as before", nil, errors.New("no rule"), "no rule"},
		{"being released", nil, net.ErrClosed, ""},
	} {
		web.mended, web.err = step.mended, step.err
		log.Reset()
		r.round(map[string]repairable{"web": web})
		if got := log.String(); step.text == "" && got != "" || !strings.Contains(got, step.text) {
			t.Errorf("%s: log %q, want %q", step.name, got, step.text)
		}
	}
	if counted["routing"] != 2 || counted["sysctls"] != 1 || len(counted) != 2 {
		t.Errorf("counted %v", counted)
	}
}
