package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster"
	"github.com/raceway-mesh/raceway/e2e/cluster/node"
)

// busy is a shop that is enrolled and captured.
func (w *world) busy(t *testing.T, namespace string) {
	t.Helper()
	w.shop(t, namespace)
	w.kubectl(t, "label", "namespace", namespace, enrolled)
	w.captured(t, namespace, true, "server1", "server2", "loop")
}

// killAgents kills the agents of a node as a crash would. The kubelet starts them again.
func (w *world) killAgents(t *testing.T, n *cluster.Node) {
	t.Helper()
	pids, err := n.Exec(t.Context(), "pgrep", "-x", "raceway-agent")
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range strings.Fields(string(pids)) {
		if _, err := n.Exec(t.Context(), "kill", "-KILL", pid); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAnAgentThatIsKilledComesBack prints what it costs: new connections have to wait for the
// next agent, and some are too impatient.
func TestAnAgentThatIsKilledComesBack(t *testing.T) {
	w := onMesh(t)
	const ns = "killed"
	w.busy(t, ns)
	before := w.unharmed(t, ns, "loop", count{})
	start := time.Now()
	w.killAgents(t, w.Node(1))
	wire := w.wire(t, 2)
	mark := needle()
	eventually(t, "requests are answered again", func() error {
		_, err := w.exec(t.Context(), ns, "loop", "get", "-timeout", "2s", "http://"+w.host(t, ns, "server2")+":8080/"+mark)
		return err
	})
	took := time.Since(start)
	if clear, _ := seen(t, wire, mark); clear {
		t.Error("a request went out in clear")
	}
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout="+patience.String())
	after, err := w.count(t.Context(), ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("an agent was killed: %d of %d requests failed, the next was answered after %v", after.Failed-before.Failed, after.Done-before.Done, took)
	w.unharmed(t, ns, "loop", after)
}

// container is the id of a pod's first container, by which containerd knows it.
func (w *world) container(t *testing.T, namespace, pod string) string {
	t.Helper()
	id := w.kubectl(t, "-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].containerID}")
	return strings.TrimPrefix(id, "containerd://")
}

// tasks runs containerd's client on a node, for when kubectl has nobody to ask.
func tasks(t *testing.T, n *cluster.Node, args ...string) {
	t.Helper()
	ctr := filepath.Join(node.PartsDir, "debian/usr/bin/ctr")
	if _, err := n.Exec(t.Context(), ctr, append([]string{"--namespace", "k8s.io", "tasks"}, args...)...); err != nil {
		t.Error(err)
	}
}

// countOnNode is what a client's last line of output says after its container was restarted
// once, read from the node's disk.
func countOnNode(n *cluster.Node, namespace, pod string) (count, error) {
	var c count
	files, err := filepath.Glob(n.Path("/var/log/pods/" + namespace + "_" + pod + "_*/app/1.log"))
	if err != nil {
		return c, err
	}
	if len(files) != 1 {
		return c, fmt.Errorf("%s has %d logs of a restarted container", pod, len(files))
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		return c, err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	_, line, _ := strings.Cut(lines[len(lines)-1], " F ") // a time and a stream stand before it
	return c, json.Unmarshal([]byte(line), &c)
}

// TestTrafficGoesOnWithoutTheAPIServer stops it with requests going on. New peers find each
// other meanwhile, a container is restarted, and an agent.
func TestTrafficGoesOnWithoutTheAPIServer(t *testing.T) {
	w := onMesh(t)
	const ns = "noapi"
	w.busy(t, ns)
	target := "http://" + w.host(t, ns, "server2") + ":8080/"
	w.run(t, ns,
		pod{name: "quiet", node: 1, args: []string{"serve"}},
		pod{name: "restarted", node: 1, args: []string{"loop", "-every", "1s", target}})
	w.captured(t, ns, true, "quiet", "restarted")
	quiet, restarted := w.container(t, ns, "quiet"), w.container(t, ns, "restarted")
	loop := w.unharmed(t, ns, "loop", count{})
	wire := w.wire(t, 2)
	mark := needle()
	if err := w.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	tasks(t, w.Node(1), "kill", "--signal", "SIGKILL", restarted)
	tasks(t, w.Node(1), "exec", "--exec-id", "first-words", quiet, "/bin/app", "get", target+mark)
	eventually(t, "a container that was restarted goes on", func() error {
		c, err := countOnNode(w.Node(1), ns, "restarted")
		if err == nil && c.Done < 3 {
			err = fmt.Errorf("%+v", c)
		}
		return err
	})
	again, err := countOnNode(w.Node(1), ns, "restarted")
	if err != nil || again.Failed > 0 {
		t.Errorf("the restarted container: %+v, %v", again, err)
	}
	time.Sleep(time.Until(stopped.Add(10 * time.Second))) // an outage has to last
	killed := time.Now()
	w.killAgents(t, w.Node(2)) // and the agent that comes back knows what the last one knew
	time.Sleep(10 * time.Second)
	if err := w.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout="+patience.String())
	// A kubelet that is slow to find the API server again has its pods taken out of services, the
	// cluster's DNS among them: that is Kubernetes, with or without the mesh.
	for _, namespace := range []string{ns, "kube-system"} {
		w.kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout="+patience.String())
	}
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("in clear %v, %d packets of tunnels", clear, tunnels)
	}
	first, err := w.firstFailure(t, ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	if !first.IsZero() && first.Before(killed) {
		t.Errorf("a request failed %v before an agent was killed", killed.Sub(first))
	}
	now, err := w.count(t.Context(), ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d requests failed in the outage, an agent killed in the middle of it", now.Failed-loop.Failed, now.Done-loop.Done)
	w.unharmed(t, ns, "loop", now)
	w.captured(t, ns, true, "server1", "server2", "loop")
}

// firstFailure is when a client failed for the first time; zero if it never did.
func (w *world) firstFailure(t *testing.T, namespace, pod string) (time.Time, error) {
	t.Helper()
	for line := range strings.Lines(w.kubectl(t, "-n", namespace, "logs", pod)) {
		var c count
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			return time.Time{}, err
		}
		if c.Failed > 0 {
			return time.Parse(time.RFC3339Nano, c.At)
		}
	}
	return time.Time{}, nil
}

// TestANodeThatRebootsCapturesItsPods wants no pod to speak in clear while its node boots.
func TestANodeThatRebootsCapturesItsPods(t *testing.T) {
	w := onMesh(t)
	const ns = "reboot"
	w.busy(t, ns)
	// It asks from its first moment, and again and again until somebody listens.
	mark := needle()
	target := w.host(t, ns, "server1")
	w.run(t, ns, pod{name: "eager", node: 2, args: []string{"loop", "http://" + target + ":8080/" + mark}})
	w.captured(t, ns, true, "eager")
	n := w.Node(2)
	if err := w.StopNode(n); err != nil {
		t.Fatal(err)
	}
	if err := w.StartNode(n); err != nil {
		t.Fatal(err)
	}
	wire := w.wire(t, 2)
	w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "pod/eager", "--timeout="+patience.String())
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout="+patience.String())
	w.captured(t, ns, true, "eager", "server2")
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod", "--all", "--timeout="+patience.String())
	eventually(t, "eager is answered", func() error {
		c, err := w.count(t.Context(), ns, "eager")
		if err == nil && c.Done == c.Failed {
			err = fmt.Errorf("%+v", c)
		}
		return err
	})
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("in clear %v, %d packets of tunnels", clear, tunnels)
	}
}
