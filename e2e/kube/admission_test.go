package kube

import (
	"fmt"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// as is a client of the API server with a token.
func (w *world) as(t *testing.T, token string) *kubernetes.Clientset {
	t.Helper()
	config := w.RESTConfig()
	config.BearerToken = token
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// redirection is a patch of a pod's annotation; a value is JSON.
func redirection(value string) string {
	return `{"metadata":{"annotations":{"raceway.dev/redirection":` + value + `}}}`
}

// TestAgentsAreHeldToTheirNode does with an agent's token what somebody would who has stolen it.
func TestAgentsAreHeldToTheirNode(t *testing.T) {
	w := onMesh(t)
	const ns = "held"
	w.namespace(t, ns)
	w.run(t, ns, pod{name: "here", node: 1, args: []string{"serve"}}, pod{name: "there", node: 2, args: []string{"serve"}})
	agent := w.as(t, w.token(t, system, "raceway-agent", "", w.podOf(t, "agent", "node1")))
	unbound := w.as(t, w.token(t, system, "raceway-agent", "", ""))
	pods := func(name, patch string, subresources ...string) error {
		_, err := agent.CoreV1().Pods(ns).Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, subresources...)
		return err
	}
	nodes := func(name, patch string) error {
		_, err := agent.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		return err
	}
	const harmless = `{"metadata":{"annotations":{"raceway.dev/test":"1"}}}`
	for _, test := range []struct {
		name    string
		do      func() error
		allowed bool
	}{
		{"annotates a pod of its node", func() error { return pods("here", harmless) }, true},
		{"annotates a pod of another node", func() error { return pods("there", harmless) }, false},
		{"annotates, with a token of no pod", func() error {
			_, err := unbound.CoreV1().Pods(ns).Patch(t.Context(), "here", types.MergePatchType, []byte(harmless), metav1.PatchOptions{})
			return err
		}, false},
		{"writes somebody else's annotation", func() error { return pods("here", `{"metadata":{"annotations":{"example.com/x":"1"}}}`) }, false},
		{"labels a pod", func() error { return pods("here", `{"metadata":{"labels":{"role":"server"}}}`) }, false},
		{"removes a label", func() error { return pods("here", `{"metadata":{"labels":{"app":null}}}`) }, false},
		{"gives a pod an owner", func() error {
			return pods("here", `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"x","uid":"x"}]}}`)
		}, false},
		{"ends a pod by its spec", func() error { return pods("here", `{"spec":{"activeDeadlineSeconds":1}}`) }, false},
		{"writes a pod's status", func() error { return pods("here", `{"status":{"phase":"Failed"}}`, "status") }, false},
		{"deletes a pod", func() error {
			return agent.CoreV1().Pods(ns).Delete(t.Context(), "here", metav1.DeleteOptions{})
		}, false},
		{"closes its node", func() error { return nodes("node1", `{"spec":{"unschedulable":true}}`) }, false},
		{"taints another node", func() error { return nodes("node2", `{"spec":{"taints":[]}}`) }, false},
		{"taints its node", func() error {
			return nodes("node1", `{"spec":{"taints":[{"key":"example.com/x","effect":"NoSchedule"}]}}`)
		}, false},
		{"labels its node", func() error { return nodes("node1", `{"metadata":{"labels":{"example.com/x":"1"}}}`) }, false},
		{"reads secrets", func() error {
			_, err := agent.CoreV1().Secrets(system).List(t.Context(), metav1.ListOptions{})
			return err
		}, false},
		{"reads the CA's key", func() error {
			_, err := agent.CoreV1().Secrets(system).Get(t.Context(), "raceway-ca", metav1.GetOptions{})
			return err
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.do()
			if test.allowed && err != nil || !test.allowed && !apierrors.IsForbidden(err) {
				t.Errorf("allowed: want %v, got error %v", test.allowed, err)
			}
		})
	}
}

// tenant is a client that may do in a namespace what its owner may.
func (w *world) tenant(t *testing.T, namespace string) *kubernetes.Clientset {
	t.Helper()
	w.kubectl(t, "-n", namespace, "create", "serviceaccount", "tenant")
	w.kubectl(t, "-n", namespace, "create", "rolebinding", "tenant", "--clusterrole=edit", "--serviceaccount="+namespace+":tenant")
	return w.as(t, w.token(t, namespace, "tenant", "", ""))
}

// optOut is a patch that takes a pod out of the mesh.
const optOut = `{"metadata":{"labels":{"raceway.dev/dataplane-mode":"none"}}}`

// TestTenantsCannotUndoACapture has the owner of a namespace edit what Raceway writes.
func TestTenantsCannotUndoACapture(t *testing.T) {
	w := onMesh(t)
	const ns = "tenants"
	w.home(t, ns)
	w.run(t, ns, pod{name: "apart", node: 2, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "none"}})
	tenant := w.tenant(t, ns)
	edit := func(pod, patch string, dryRun ...string) error {
		_, err := tenant.CoreV1().Pods(ns).Patch(t.Context(), pod, types.MergePatchType, []byte(patch), metav1.PatchOptions{DryRun: dryRun})
		return err
	}
	annotated := func(pod, want string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the annotation of %s is %q", pod, want), func() error {
			got := w.kubectl(t, "-n", ns, "get", "pod", pod, `-o=jsonpath={.metadata.annotations.raceway\.dev/redirection}`)
			if got != want {
				return fmt.Errorf("it is %q", got)
			}
			return nil
		})
	}

	wire := w.wire(t, 2)
	mark := needle()
	w.run(t, ns, pod{name: "loop", node: 1, args: []string{"loop", "http://" + w.host(t, ns, "server2") + ":8080/" + mark}})
	loop := w.unharmed(t, ns, "loop", count{})
	for _, value := range []string{"null", `"disabled"`, "null"} {
		if err := edit("server2", redirection(value)); err != nil {
			t.Fatal(err)
		}
		annotated("server2", "enabled")
	}
	loop = w.unharmed(t, ns, "loop", loop)
	if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
		t.Errorf("in clear %v, %d packets of tunnels", clear, tunnels)
	}
	if err := edit("apart", redirection(`"enabled"`)); err != nil {
		t.Fatal(err)
	}
	annotated("apart", "")
	w.served(t, ns, "client", "http://"+w.host(t, ns, "apart")+":8080/")

	w.install(t, "--set", "admission.protectRedirection=true,admission.forbidOptOut=true")
	defer func() {
		// Without a value helm takes those of before.
		w.install(t, "--set", "admission.protectRedirection=false,admission.forbidOptOut=false")
		eventually(t, "the policies are gone", func() error { return edit("server2", optOut, metav1.DryRunAll) })
	}()
	for pod, value := range map[string]string{"server2": "null", "apart": `"enabled"`} {
		refusedTo(t, "write the annotation of "+pod, func() error { return edit(pod, redirection(value), metav1.DryRunAll) })
	}
	refusedTo(t, "take a pod out of the mesh", func() error { return edit("server2", optOut, metav1.DryRunAll) })
	if err := edit("server2", `{"metadata":{"labels":{"team":"a"},"annotations":{"example.com/x":"1"}}}`); err != nil {
		t.Error("a tenant writes other annotations and labels:", err)
	}
	w.run(t, ns, pod{name: "late", node: 2, args: []string{"serve"}})
	w.captured(t, ns, true, "late", "server2")
	annotated("late", "enabled")
	w.unharmed(t, ns, "loop", loop)
}

// refusedTo waits until the API server refuses it: a policy takes a moment to be in force.
func refusedTo(t *testing.T, what string, try func() error) {
	t.Helper()
	eventually(t, "a tenant may not "+what, func() error {
		if err := try(); !apierrors.IsForbidden(err) {
			return fmt.Errorf("it was allowed, or failed otherwise: %w", err)
		}
		return nil
	})
}
