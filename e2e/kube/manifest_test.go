package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// manifest is what users apply who have no helm.
func (w *world) manifest(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../daemonset/raceway.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(w.Node(1).Path("/sys/fs/cgroup/unified")); err != nil {
		return string(text)
	}
	// As on any host with both versions of cgroups.
	const flag = "--cgroup-root=/host/sys/fs/cgroup"
	return strings.Replace(string(text), flag, flag+"/unified", 1)
}

// TestTheManifestInstallsAndTheCommandUninstalls does it all without helm, and looks at the
// cluster before and after.
func TestTheManifestInstallsAndTheCommandUninstalls(t *testing.T) {
	slow(t)
	w := onCluster(t)
	if w.installed {
		w.uninstall(t)
	}
	w.says(t, 0, []string{"not installed in namespace " + system, "node node1"}, "check")
	w.says(t, 0, []string{"Kubernetes v1.", "kernel "}, "check", "-o", "wide")
	w.says(t, 3, []string{"is Raceway installed there?"}, "workloads").oneLine(t)
	w.says(t, 3, []string{"not installed"}, "uninstall").oneLine(t)
	const ns = "manifest"
	w.shop(t, ns)
	w.says(t, 0, []string{ns + "/loop", "yes"}, "check", "--preview", "-n", ns)

	file := filepath.Join(t.TempDir(), "raceway.yaml")
	if err := os.WriteFile(file, []byte(w.manifest(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "apply", "--server-side", "-f", file)
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=2m")
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.captured(t, ns, true, "server1", "server2", "loop")
	w.says(t, 0, []string{"node1", "node2"}, "check")
	loop := w.unharmed(t, ns, "loop", count{})
	lives := w.lives(t, ns)

	w.says(t, 0, []string{"2 of 2 agents have released their pods", "deleted daemonsets/raceway-agent"}, "uninstall")
	for _, n := range w.Nodes() {
		w.clean(t, n)
	}
	w.unharmed(t, ns, "loop", loop)
	if now := w.lives(t, ns); fmt.Sprint(now) != fmt.Sprint(lives) {
		t.Errorf("pods have changed: %v, now %v", lives, now)
	}
	eventually(t, "nothing is left in the cluster", func() error { return w.objectsLeft(t) })
	w.says(t, 0, []string{"not installed in namespace " + system}, "check")
	w.run(t, ns, pod{name: "late", node: 2, args: []string{"serve"}, probes: true})
}

// objectsLeft looks for what the installation consists of. The CA's key stays, and so do the
// kinds of policies.
func (w *world) objectsLeft(t *testing.T) error {
	t.Helper()
	left := w.kubectl(t, "get", "-A", "-o", "name", "-l", "app.kubernetes.io/part-of=raceway",
		"pods,daemonsets,deployments,jobs,services,configmaps,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,"+
			"poddisruptionbudgets,networkpolicies,leases,validatingadmissionpolicies,validatingadmissionpolicybindings")
	unlabelled := w.kubectl(t, "get", "-n", system, "-o", "name", "pods,serviceaccounts,configmaps,leases,roles,rolebindings")
	for name := range strings.Lines(unlabelled) {
		if name = strings.TrimSpace(name); name != "configmap/kube-root-ca.crt" && name != "serviceaccount/default" {
			left += "\n" + name
		}
	}
	if left = strings.TrimSpace(left); left != "" {
		return errors.New(left)
	}
	return nil
}

// TestANodeIsReleasedByHand is for a node whose agent has gone for good, while nobody answers
// for the cluster either.
func TestANodeIsReleasedByHand(t *testing.T) {
	slow(t)
	w := onMesh(t)
	const ns = "byhand"
	w.busy(t, ns)
	n := w.Node(2)
	cli := w.cliOn(t, n)
	release := []string{"node", "release", "--force"}
	if out, err := n.Exec(t.Context(), cli, release...); err == nil || !strings.Contains(string(out), "agent") {
		t.Fatalf("it does not refuse while the agent runs: %v\n%s", err, out)
	}
	w.captured(t, ns, true, "server2")

	w.kubectl(t, "label", "node", n.Name, "e2e-agent=none")
	const elsewhere = `{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"e2e-agent","operator":"DoesNotExist"}]}]}}}}}}}`
	w.kubectl(t, "-n", system, "patch", "daemonset", "raceway-agent", "-p", elsewhere)
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=2m")
	eventually(t, "the node has no agent", func() error {
		if out, err := n.Exec(t.Context(), "pgrep", "-x", "raceway-agent"); err == nil {
			return fmt.Errorf("there is still %s", out)
		}
		return nil
	})
	if err := w.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	out, err := n.Exec(t.Context(), cli, release...)
	t.Logf("raceway node release --force:\n%s", out)
	if startErr := w.StartAPIServer(t.Context()); startErr != nil {
		t.Fatal(startErr)
	}
	if err != nil || !strings.Contains(string(out), "removed ") {
		t.Fatal(err)
	}
	if err := errors.Join(w.filesLeft(n), w.programsLeft(t, n), filtersLeft(n)); err != nil {
		t.Error(err)
	}
	if out, err := n.Exec(t.Context(), cli, release...); err != nil || !strings.Contains(string(out), "nothing to remove") {
		t.Errorf("once more: %v\n%s", err, out)
	}
	if err := w.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.run(t, ns, pod{name: "late", node: 2, args: []string{"serve"}, probes: true})
	w.served(t, ns, "late", "http://"+w.podIP(t, ns, "server2")+":8080/") // both in clear

	w.kubectl(t, "label", "node", n.Name, "e2e-agent-")
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=2m")
	w.captured(t, ns, true, "server1", "server2", "loop", "late")
	w.served(t, ns, "loop", "http://"+w.podIP(t, ns, "late")+":8080/")
	eventually(t, "all is in order", func() error {
		if said := w.tell(t, w.Kubeconfig(), "check"); said.code != 0 {
			return errors.New(said.out + said.complaint)
		}
		return nil
	})
	w.kubectl(t, "-n", system, "rollout", "undo", "daemonset/raceway-agent")
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=2m")
}
