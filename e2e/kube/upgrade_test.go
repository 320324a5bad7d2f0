package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// otherVersion is the tag of an image whose agent has maps of another layout.
const otherVersion = "other"

// buildOther gives the nodes an image of another version: what `make image` makes of other
// sources.
func (w *world) buildOther(t *testing.T) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(root, "bpf/include/maps.h")
	text, err := os.ReadFile(layout)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	changed, overlay := filepath.Join(dir, "maps.h"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(changed, append(text, "\n/* another version */\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{layout: changed}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, replace, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "make", "image", "BIN="+dir, "VERSION="+otherVersion,
		"IMAGE=ghcr.io/raceway-mesh/raceway:"+otherVersion)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOFLAGS=-overlay="+overlay)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build another version: %v\n%s", err, out)
	}
	if err := w.LoadImage(t.Context(), filepath.Join(dir, "raceway-image.tar")); err != nil {
		t.Fatal(err)
	}
}

// agents are the names of the agents' pods.
func (w *world) agents(t *testing.T) []string {
	t.Helper()
	return strings.Fields(w.kubectl(t, "-n", system, "get", "pods", "-l", "app.kubernetes.io/component=agent", "-o", "jsonpath={.items[*].metadata.name}"))
}

// told is when the first of some pods was told to end.
func (w *world) told(t *testing.T, pods []string) time.Time {
	t.Helper()
	var first time.Time
	for _, p := range pods {
		events, err := w.client.CoreV1().Events(system).List(t.Context(), metav1.ListOptions{
			FieldSelector: "reason=Killing,involvedObject.name=" + p,
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(events.Items) == 0 {
			t.Fatalf("%s was not told to end", p)
		}
		if at := events.Items[0].FirstTimestamp.Time; first.IsZero() || at.Before(first) {
			first = at
		}
	}
	return first
}

// TestAnUpgradeAndItsRollbackFailNoRequest goes to another version, with other maps and other
// values, and back, as docs/operations.md tells users to, with clients that ask all the time.
func TestAnUpgradeAndItsRollbackFailNoRequest(t *testing.T) {
	w := onMesh(t)
	const ns = "upgrade"
	w.buildOther(t)
	w.busy(t, ns)
	lives := w.lives(t, ns)
	loop := w.unharmed(t, ns, "loop", count{})
	// roll replaces the agents, of which those before give their connections some time.
	roll := func(name string, drain time.Duration, version string, helm ...string) {
		w.run(t, ns, pod{
			name: name, node: 1, spec: "  restartPolicy: Never\n",
			args: []string{"hold", w.host(t, ns, "server2") + ":9000"},
		})
		w.captured(t, ns, true, name)
		before := w.agents(t)
		w.runHelm(t, append(helm, "-n", system, "--wait", "--timeout", "5m")...)
		loop = w.unharmed(t, ns, "loop", loop)
		out, err := w.cli(t.Context(), "version")
		if err != nil {
			t.Fatal(err)
		}
		if is := strings.Count(out, " "+otherVersion+" ") == len(w.Nodes()); is != (version == otherVersion) {
			t.Errorf("the agents after %v:\n%s", helm, out)
		}
		w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.phase}="+string(corev1.PodFailed), "pod/"+name, "--timeout=90s")
		end := w.lastCount(t, ns, name)
		at, err := time.Parse(time.RFC3339Nano, end.At)
		if err != nil {
			t.Fatal(err)
		}
		told := w.told(t, before)
		t.Logf("%s: an open connection lived %v from when the first agent was told to end", name, at.Sub(told).Round(time.Second))
		if at.Sub(told) < drain-time.Second { // an event's time is in seconds
			t.Errorf("%s: it ended %v after the first agent was told to, which was to drain for %v: %s", name, at.Sub(told), drain, end.Error)
		}
		loop = w.unharmed(t, ns, "loop", loop)
	}
	const short = 8 * time.Second
	roll("forth", 30*time.Second, otherVersion, "upgrade", "raceway", "daemonset/chart", "--reuse-values", "--set", "image.tag="+otherVersion,
		"--set", "agent.logLevel=debug", "--set", fmt.Sprintf("agent.drainTimeoutSeconds=%d", int(short.Seconds())))
	roll("back", short, "", "rollback", "raceway")
	w.captured(t, ns, true, "server1", "server2", "loop")
	t.Logf("%d requests, the slowest took %s", loop.Done, loop.Slowest)
	now := w.lives(t, ns)
	for _, name := range []string{"server1", "server2", "loop"} {
		if now[name] != lives[name] {
			t.Errorf("%s has changed: %s, now %s", name, lives[name], now[name])
		}
	}
}

// lastCount is the last count in the output of a client that ended with an error.
func (w *world) lastCount(t *testing.T, namespace, pod string) count {
	t.Helper()
	var c count
	for line := range strings.Lines(w.kubectl(t, "-n", namespace, "logs", pod, "--tail=5")) {
		_ = json.Unmarshal([]byte(line), &c) // the last line says in words why it ended
	}
	return c
}

// TestADrainedNodeFailsNoRequest drains a node of one of two replicas, and gives it back.
func TestADrainedNodeFailsNoRequest(t *testing.T) {
	w := onMesh(t)
	const ns = "drained"
	w.namespace(t, ns)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.apply(t, fmt.Sprintf(serverService, ns)+fmt.Sprintf(`---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: %s}
spec:
  replicas: 2
  selector: {matchLabels: {role: server}}
  template:
    metadata: {labels: {role: server}}
    spec:
      terminationGracePeriodSeconds: 10
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {role: server}}}
      containers:
      - {name: app, image: %s, args: [serve], readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`, ns, cluster.AppRef))
	settled := func() {
		t.Helper()
		w.kubectl(t, "-n", ns, "rollout", "status", "deployment/server", "--timeout=90s")
	}
	settled()
	// By address: the cluster has one DNS server, and it may be on that node.
	target := inURL(w.kubectl(t, "-n", ns, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"))
	w.run(t, ns, pod{name: "loop", node: 1, args: []string{"loop", "http://" + target + "/"}})
	w.captured(t, ns, true, "loop")
	loop := w.unharmed(t, ns, "loop", count{})
	defer w.kubectl(t, "uncordon", "node2")
	onNode2 := func() []string {
		return strings.Fields(w.kubectl(t, "-n", ns, "get", "pods", "-l", "role=server", "--field-selector=spec.nodeName=node2,status.phase=Running", "-o", "jsonpath={.items[*].metadata.name}"))
	}
	if len(onNode2()) == 0 {
		t.Fatal("there is no replica to drain")
	}
	w.kubectl(t, "drain", "node2", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=2m")
	if left := onNode2(); len(left) > 0 {
		t.Errorf("on the drained node: %s", left)
	}
	settled()
	loop = w.unharmed(t, ns, "loop", loop)
	w.kubectl(t, "uncordon", "node2")
	w.kubectl(t, "-n", ns, "rollout", "restart", "deployment/server")
	settled()
	back := onNode2()
	if len(back) == 0 {
		t.Error("no replica is on the node that was drained")
	}
	w.captured(t, ns, true, back...)
	loop = w.unharmed(t, ns, "loop", loop)
	t.Logf("%d requests, the slowest took %s", loop.Done, loop.Slowest)
	w.kubectl(t, "-n", system, "rollout", "status", "deployment/raceway-ca", "--timeout=90s")
	w.kubectl(t, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=90s")
}
