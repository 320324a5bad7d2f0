package kube

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// newcomers is how many pods start at once; 100 of them take two slow cores a minute.
const newcomers = 100

// TestNewPodsAreCapturedBeforeTheyRun starts pods that connect as the first thing they do, and
// searches the wire for what they said.
func TestNewPodsAreCapturedBeforeTheyRun(t *testing.T) {
	w := onMesh(t)
	const ns = "newcomers"
	w.namespace(t, ns)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.apply(t, fmt.Sprintf(serverService, ns))
	w.run(t, ns, server(2))
	w.captured(t, ns, true, "server2")
	wire := w.wire(t, 2)
	mark := needle()
	w.apply(t, fmt.Sprintf(`---
apiVersion: batch/v1
kind: Job
metadata: {name: newcomers, namespace: %[1]s}
spec:
  completions: %[2]d
  parallelism: 20
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeName: node1
      terminationGracePeriodSeconds: 1
      containers:
      - {name: app, image: %[3]s, args: [get, "http://%[4]s:8080/%[5]s"]}
`, ns, newcomers, cluster.AppRef, w.host(t, ns, "server2"), mark))
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "job/newcomers", "--timeout=5m")
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("%d new pods: in clear %v, %d packets of tunnels", newcomers, clear, tunnels)
	}
	// The server's own agent says from whom.
	out, err := w.cli(t.Context(), "flows", "-n", ns, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	mutual := make(map[string]bool)
	for line := range strings.Lines(out) {
		var flow struct {
			Direction   string
			Source      struct{ Workload, Identity string }
			Destination struct{ Workload string }
		}
		if err := json.Unmarshal([]byte(line), &flow); err != nil {
			t.Fatalf("raceway flows says %q: %v", line, err)
		}
		if flow.Direction == "inbound" && flow.Destination.Workload == "server2" && strings.HasPrefix(flow.Source.Workload, "newcomers-") {
			if flow.Source.Identity == "" {
				t.Errorf("%s came without an identity", flow.Source.Workload)
			}
			mutual[flow.Source.Workload] = true
		}
	}
	t.Logf("the server's agent still knows of %d of them", len(mutual))
	if len(mutual) == 0 {
		t.Error("the server's agent knows of none of them")
	}
}

func TestMariaDBThroughTheMesh(t *testing.T) {
	w := onMesh(t)
	if err := w.LoadMariaDB(t.Context()); err != nil {
		t.Fatal(err)
	}
	const ns = "databases"
	w.namespace(t, ns)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	for i, name := range []string{"client", "db"} {
		manifest := strings.Replace(cluster.MariaDBPod(name, nil), "spec:\n", fmt.Sprintf("spec:\n  nodeName: node%d\n", i+1), 1)
		manifest = strings.Replace(manifest, "metadata: {", "metadata: {namespace: "+ns+", ", 1)
		w.apply(t, manifest)
	}
	w.apply(t, "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: "+ns+"}\nspec: {selector: {app: db}, ports: [{port: 3306}]}\n")
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod/db", "pod/client", "--timeout=90s")
	w.captured(t, ns, true, "db", "client")
	wire := w.wire(t, 2)
	mark := needle()
	eventually(t, "the database answers", func() error {
		got, err := w.Kubectl(t.Context(), "-n", ns, "exec", "client", "--", "mariadb", "--no-defaults", "--host=db", "--skip-ssl", "--batch", "--skip-column-names",
			"--execute=SELECT '"+mark+"'")
		if err == nil && strings.TrimSpace(got) != mark {
			err = fmt.Errorf("got %q, want %q", got, mark)
		}
		return err
	})
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("in clear %v, %d packets of tunnels", clear, tunnels)
	}
}
