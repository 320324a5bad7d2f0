package perf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
	"github.com/raceway-mesh/raceway/perf/report"
	"github.com/raceway-mesh/raceway/perf/yardstick"
)

// The test's binary is also the worker inside the pods.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		if err := Worker(context.Background(), os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func shortConfig(scenarios ...string) Config {
	return Config{Scenarios: scenarios, Rounds: 2, Duration: 100 * time.Millisecond, Settle: 100 * time.Millisecond, Worker: []string{os.Args[0], "worker"}}
}

func TestEveryWorkloadIsMeasuredWithoutMesh(t *testing.T) {
	netnstest.Require(t)
	for _, c := range []Config{shortConfig("plain-cross", "plain-same", "relay-plain", "relay-tls", "relay-quic"), {IPv6: true, Scenarios: []string{"plain-cross"}, Rounds: 1}} {
		c.Duration, c.Worker, c.IdleConns = 100*time.Millisecond, []string{os.Args[0], "worker"}, 20
		c.Warmup = c.Duration
		found, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range Scenarios() {
			if !slices.Contains(c.Scenarios, s.Name) {
				continue
			}
			for _, w := range Workloads() {
				if w.alone != nil {
					continue
				}
				if !w.on(s) {
					if found.Find(s.Name, w.Name, "CPU total") != nil {
						t.Errorf("%s was measured on %s", w.Name, s.Name)
					}
					continue
				}
				metrics := []string{"rate", "p50", "p99", "p99.9", "CPU total"}
				if w.udp {
					metrics = append(metrics, "p90", "lost")
				}
				if strings.HasPrefix(w.Name, "bulk") || strings.HasPrefix(w.Name, "download") {
					metrics = []string{"throughput", "CPU user", "CPU system", "CPU softirq"}
				}
				for _, metric := range metrics {
					r := found.Find(s.Name, w.Name, metric)
					if r == nil || len(r.Rounds) != c.Rounds || r.Min > r.Median || r.Median > r.Max {
						t.Errorf("%s, %s, %s: %+v", s.Name, w.Name, metric, r)
					}
				}
			}
		}
		if found.Machine.Kernel == "unknown" || found.Machine.Cores == 0 {
			t.Errorf("machine is %+v", found.Machine)
		}
	}
}

func TestIdleConnectionsAreHeldThroughRelays(t *testing.T) {
	netnstest.Require(t)
	c := shortConfig("relay-plain", "plain-cross")
	c.Workloads, c.IdleConns, c.Rounds = []string{report.IdleWorkload}, 50, 1
	found, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, metric := range []string{"connections", "RSS client", "RSS server"} {
		if found.Find("relay-plain", report.IdleWorkload, metric) == nil {
			t.Errorf("no %s was measured", metric)
		}
	}
	if found.Find("plain-cross", report.IdleWorkload, "connections") != nil {
		t.Error("without a proxy there is nothing to measure")
	}
}

func TestIdleFlowsAreHeldThroughRelays(t *testing.T) {
	netnstest.Require(t)
	c := shortConfig("relay-quic", "relay-tls", "plain-cross")
	c.Workloads, c.IdleFlows, c.Rounds = []string{report.FlowsWorkload, report.IdleWorkload}, 50, 1
	c.IdleConns = 20
	found, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, metric := range []string{"flows", "RSS client", "RSS server"} {
		if found.Find("relay-quic", report.FlowsWorkload, metric) == nil {
			t.Errorf("no %s was measured", metric)
		}
	}
	for scenario, workload := range map[string]string{
		"relay-quic": report.IdleWorkload, "relay-tls": report.FlowsWorkload, "plain-cross": report.FlowsWorkload,
	} {
		if found.Find(scenario, workload, "RSS client") != nil {
			t.Errorf("%s was measured on %s", workload, scenario)
		}
	}
}

func TestUDPIsMeasuredInTheMesh(t *testing.T) {
	netnstest.Require(t)
	c := shortConfig("hbone-cross")
	c.Workloads, c.IdleFlows, c.Rounds = []string{"datagrams-512", "datagram-exchange", report.FlowsWorkload}, 50, 1
	c.BinDir = labtest.Build(t, "raceway-agent", "raceway-ca")
	found, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for workload, metrics := range map[string][]string{
		"datagrams-512":      {"rate", "lost", "p50", "CPU total", "CPU proxies"},
		"datagram-exchange":  {"rate", "lost", "p50", "p90", "p99", "p99.9", "CPU proxies"},
		report.FlowsWorkload: {"flows", "RSS client", "Go memory client", "RSS server", "Go memory server"},
	} {
		for _, metric := range metrics {
			if found.Find("hbone-cross", workload, metric) == nil {
				t.Errorf("%s: no %s was measured", workload, metric)
			}
		}
	}
	if found.Find("hbone-cross", report.MemoryWorkload, "RSS at the start") != nil {
		t.Error("agents that carry UDP are taken for those that do not")
	}
}

func TestIdleConnectionsAndPodsAreMeasuredInTheMesh(t *testing.T) {
	netnstest.Require(t)
	c := shortConfig("hbone-cross")
	c.Workloads, c.IdleConns, c.Pods, c.Rounds = []string{report.IdleWorkload, report.PodsWorkload}, 50, 3, 1
	c.BinDir = labtest.Build(t, "raceway-agent", "raceway-ca")
	found, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, metric := range []string{"connections", "RSS client", "Go memory client", "RSS server", "Go memory server"} {
		if found.Find("hbone-cross", report.IdleWorkload, metric) == nil {
			t.Errorf("no %s was measured", metric)
		}
	}
	for _, metric := range []string{"pods", "rate", "CPU proxies", "RSS", "Go memory"} {
		if found.Find("hbone-cross", report.PodsWorkload, metric) == nil {
			t.Errorf("no %s of pods was measured", metric)
		}
	}
	c.Workloads = c.Workloads[:1]
	c.AgentArgs = []string{"--pod-connections", "20"}
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), `node1 says raceway_limit_reached_total{limit="pod_connections"}`) {
		t.Errorf("%v, want the limit that was reached", err)
	}
}

func TestPoliciesHaveTheirNumberOfRules(t *testing.T) {
	text := manyPolicies(250)
	if rules, policies := strings.Count(text, "principals:"), strings.Count(text, "kind:"); rules != 251 || policies != 4 {
		t.Errorf("%d rules in %d policies, want 251 in 4", rules, policies)
	}
}

func TestASoakTellsALeakFromBreathing(t *testing.T) {
	before := Vitals{Goroutines: 100, Descriptors: 60, RSS: 40 << 20}
	for name, test := range map[string]struct {
		after Vitals
		says  string
	}{
		"as before":   {before, ""},
		"breathing":   {Vitals{Goroutines: 120, Descriptors: 70, RSS: 80 << 20}, ""},
		"goroutines":  {Vitals{Goroutines: 400, Descriptors: 60, RSS: 40 << 20}, "leaks goroutines: 400"},
		"descriptors": {Vitals{Goroutines: 100, Descriptors: 400, RSS: 40 << 20}, "leaks descriptors: 400"},
		"memory":      {Vitals{Goroutines: 100, Descriptors: 60, RSS: 400 << 20}, "leaks memory: 400 MiB"},
	} {
		r := SoakReport{Before: map[string]Vitals{"node1": before}, After: map[string]Vitals{"node1": test.after}}
		err := r.leaks()
		if (err != nil) != (test.says != "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want %q", name, err, test.says)
		}
	}
}

func TestGaugeFindsTheMetricByItsWholeName(t *testing.T) {
	metrics := "# HELP a b\na_total 3\na 1.5e+06\n"
	if got := gauge(metrics, "a"); got != 1.5e6 {
		t.Errorf("got %v", got)
	}
	if got := gauge(metrics, "b"); got != 0 {
		t.Errorf("a metric that is not there is %v", got)
	}
}

// A scenario that is not what it says would make every comparison worthless.
func TestPlainTrafficIsNotTakenForMesh(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	st := &site{config: shortConfig("plain-same"), scenario: Scenario{Name: "plain-same", SameNode: true}, lab: l}
	if err := st.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := st.verify(t.Context()); err != nil {
		t.Errorf("as plain: %v", err)
	}
	st.scenario.udp = true
	if err := st.verify(t.Context()); err != nil {
		t.Errorf("UDP as plain: %v", err)
	}
	st.scenario.Mesh = true
	for _, udp := range []bool{false, true} {
		st.scenario.udp = udp
		if err := st.verify(t.Context()); err == nil {
			t.Errorf("plain traffic (UDP: %v) passed for HBONE", udp)
		}
	}
}

func TestAWorkerThatFailsIsShownWithItsReason(t *testing.T) {
	netnstest.Require(t)
	c := shortConfig("plain-same")
	c.Worker = []string{"/bin/sh", "-c", "echo out of paper >&2; exit 1"}
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "out of paper") {
		t.Errorf("%v, want the worker's own words", err)
	}
}

func TestConfigComplaintsNameTheChoices(t *testing.T) {
	err := Config{Scenarios: []string{"moon"}, Workloads: []string{"brick"}, Rounds: -1}.Validate()
	for _, want := range []string{"moon", "hbone-cross", "brick", "bulk-1", "negative", "worker"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not mention %q", err, want)
		}
	}
	missing := filepath.Join(t.TempDir(), "haproxy")
	err = Config{Scenarios: []string{"haproxy"}, HAProxy: missing, Worker: []string{"worker"}}.Validate()
	if err == nil || !strings.Contains(err.Error(), "apt-get install haproxy") || !errors.Is(err, yardstick.ErrNotInstalled) {
		t.Errorf("%v does not say how to get HAProxy", err)
	}
	if c := (Config{HAProxy: missing}).withDefaults(); slices.Contains(c.Scenarios, "haproxy") || !slices.Contains(c.Scenarios, "relay-tls") {
		t.Errorf("by default, without HAProxy, the scenarios are %v", c.Scenarios)
	}
	if (Config{Scenarios: []string{"plain-same"}}).NeedsMesh() || !(Config{}).NeedsMesh() {
		t.Error("NeedsMesh is wrong")
	}
}

func TestUsageIsTheWholeMachines(t *testing.T) {
	for _, test := range []struct {
		name, stat string
		want       usage
		wantErr    bool
	}{
		{
			"nice is user time and irq counts with softirq",
			"cpu  100 20 300 9999 50 4 60 7 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n",
			usage{User: 1200 * time.Millisecond, System: 3 * time.Second, Softirq: 640 * time.Millisecond},
			false,
		},
		{"empty", "", usage{}, true},
		{"short", "cpu 1 2 3\n", usage{}, true},
		{"not a number", "cpu 1 2 3 x 5 6 7 8\n", usage{}, true},
	} {
		got, err := parseUsage(test.stat)
		if got != test.want || (err != nil) != test.wantErr {
			t.Errorf("%s: %+v, %v, want %+v", test.name, got, err, test.want)
		}
	}
}

func TestCommandNamesNoPlace(t *testing.T) {
	if got := command([]string{"/somewhere/bench", "--short", "--out", "x"}); got != "bench --short --out x" {
		t.Errorf("command is %q", got)
	}
}
