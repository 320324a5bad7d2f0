package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster"
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
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=90s")
	after, err := w.count(t.Context(), ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("an agent was killed: %d of %d requests failed, the next was answered after %v", after.Failed-before.Failed, after.Done-before.Done, took)
	w.unharmed(t, ns, "loop", after)
}

// TestARolloutFailsNoRequest rolls the agents forward and back under load.
func TestARolloutFailsNoRequest(t *testing.T) {
	w := onMesh(t)
	const ns = "rollout"
	w.busy(t, ns)
	loop := w.unharmed(t, ns, "loop", count{})
	roll := func(args ...string) {
		w.kubectl(t, append([]string{"-n", system, "rollout"}, append(args, "daemonset/raceway-agent")...)...)
		w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=3m")
		loop = w.unharmed(t, ns, "loop", loop)
	}
	roll("restart")
	roll("undo")
	t.Logf("%d requests, the slowest took %s", loop.Done, loop.Slowest)
}

// TestTrafficGoesOnWithoutTheAPIServer stops it with requests going on, and wants new peers to
// find each other meanwhile.
func TestTrafficGoesOnWithoutTheAPIServer(t *testing.T) {
	w := onMesh(t)
	const ns = "noapi"
	w.busy(t, ns)
	w.run(t, ns, pod{name: "quiet", node: 1, args: []string{"loop", "-every", "1s", "http://" + w.host(t, ns, "server2") + ":8080/"}})
	loop := w.unharmed(t, ns, "loop", count{})
	quiet := w.unharmed(t, ns, "quiet", count{})
	if err := w.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Second) // an outage has to last
	w.killAgents(t, w.Node(2))   // and the agent that comes back knows what the last one knew
	time.Sleep(10 * time.Second)
	if err := w.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=90s")
	now, err := w.count(t.Context(), ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d requests failed in the outage, an agent killed in the middle of it", now.Failed-loop.Failed, now.Done-loop.Done)
	w.unharmed(t, ns, "loop", now)
	if now, err = w.count(t.Context(), ns, "quiet"); err != nil {
		t.Fatal(err)
	}
	w.unharmed(t, ns, "quiet", now)
	if now.Done <= quiet.Done+10 {
		t.Errorf("quiet has made %d requests in the outage", now.Done-quiet.Done)
	}
	w.captured(t, ns, true, "server1", "server2", "loop")
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
	w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "pod/eager", "--timeout=3m")
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=3m")
	w.captured(t, ns, true, "eager", "server2")
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=90s")
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
