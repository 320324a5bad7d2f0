package kube

import (
	"path/filepath"
	"testing"

	"github.com/raceway-mesh/raceway/perf/report"
)

// TestTheCommandLineMeasuresTwoNodes has the benchmark's Jobs come, measure and go.
func TestTheCommandLineMeasuresTwoNodes(t *testing.T) {
	w := onMesh(t)
	dir := t.TempDir()
	w.says(t, 0, []string{"no mesh", "Raceway", "CPU total"}, "perf", "job", "--client-node", "node1", "--server-node", "node2",
		"--workloads", "bulk-1,exchange-1", "--rounds", "1", "--duration", "200ms", "--out", dir)
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("results are in %q, %v", files, err)
	}
	found, err := report.Read(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, scenario := range []string{"plain", "mesh"} {
		for workload, metric := range map[string]string{"bulk-1": "throughput", "exchange-1": "p50"} {
			if r := found.Find(scenario, workload, metric); r == nil || r.Median <= 0 {
				t.Errorf("%s, %s, %s: %+v", scenario, workload, metric, r)
			}
		}
	}
	w.says(t, 0, []string{"raceway-perf/raceway-perf-mesh-client", "HBONE"}, "flows", "-n", "raceway-perf", "--agent", "node1")
	w.kubectl(t, "wait", "--for=delete", "namespace/raceway-perf", "--timeout=60s")
	w.says(t, 2, []string{"--client-node"}, "perf", "job")
	w.says(t, 3, []string{"node9"}, "perf", "job", "--client-node", "node9", "--server-node", "node1")
}
