package kube

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
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
	w.newcomers(t, ns, newcomers, 20, "5m", "get", fmt.Sprintf("http://%s:8080/%s", w.host(t, ns, "server2"), mark))
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("%d new pods: in clear %v, %d packets of tunnels", newcomers, clear, tunnels)
	}
	// The server's own agent has counted each of them, by who it proved to be: it may hear of
	// the pod itself only later.
	to := []string{`reporter="destination"`, `destination_workload="server2"`, `destination_workload_namespace="` + ns + `"`}
	all := w.opened(t, "node2", to...)
	mutual := w.opened(t, "node2", append(to, `connection_security_policy="mutual_tls"`,
		`source_principal="spiffe://cluster.local/ns/`+ns+`/sa/default"`)...)
	if mutual != newcomers || all != mutual {
		t.Errorf("%d new pods made %v connections, %v of them by mutual TLS", newcomers, all, mutual)
	}
}

// opened is how many connections with these labels the agent of a node has counted.
func (w *world) opened(t *testing.T, node string, labels ...string) (total float64) {
	t.Helper()
	text := w.kubectl(t, "get", "--raw", "/api/v1/namespaces/"+system+"/pods/"+w.podOf(t, "agent", node)+":15020/proxy/metrics")
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "istio_tcp_connections_opened_total{") {
			continue
		}
		if slices.ContainsFunc(labels, func(label string) bool { return !strings.Contains(line, label) }) {
			continue
		}
		fields := strings.Fields(line)
		n, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		total += n
	}
	return total
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

// newcomers runs so many pods on node1, some of them at a time, that do one thing as their first, and
// waits until all have done it.
func (w *world) newcomers(t *testing.T, ns string, pods, atOnce int, patience string, args ...string) {
	t.Helper()
	list, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	w.apply(t, fmt.Sprintf(`---
apiVersion: batch/v1
kind: Job
metadata: {name: newcomers, namespace: %[1]s}
spec:
  completions: %[2]d
  parallelism: %[3]d
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeName: node1
      terminationGracePeriodSeconds: 1
      containers:
      - {name: app, image: %[4]s, args: %[5]s}
`, ns, pods, atOnce, cluster.AppRef, list))
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "job/newcomers", "--timeout="+patience)
}
