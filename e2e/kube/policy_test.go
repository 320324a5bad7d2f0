package kube

import (
	"fmt"
	"maps"
	"testing"
	"time"
)

// strict lets nobody in without a tunnel.
const strict = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: %s}
spec: {mtls: {mode: STRICT}}
`

// refused wants requests from a pod to be refused, soon.
func (w *world) refused(t *testing.T, namespace, pod, url string) {
	t.Helper()
	eventually(t, pod+" is refused", func() error {
		if out, err := w.exec(t.Context(), namespace, pod, "get", "-timeout", "3s", url); err == nil {
			return fmt.Errorf("it got %q", out)
		}
		return nil
	})
}

// served wants requests from a pod to be answered, soon.
func (w *world) served(t *testing.T, namespace, pod, url string) {
	t.Helper()
	eventually(t, pod+" is served", func() error {
		_, err := w.exec(t.Context(), namespace, pod, "get", "-timeout", "3s", url)
		return err
	})
}

// TestStrictServersPassTheirProbes wants all four kinds of probes to go on in a namespace
// that takes no plain connection.
func TestStrictServersPassTheirProbes(t *testing.T) {
	w := onMesh(t)
	const ns, outside = "strict", "outside"
	w.shop(t, ns)
	w.namespace(t, outside)
	w.run(t, outside, pod{name: "stranger", node: 1, args: []string{"serve"}})
	url := "http://" + w.host(t, ns, "server2") + ":8080/"
	w.served(t, outside, "stranger", url)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.captured(t, ns, true, "server1", "server2", "loop")
	w.served(t, outside, "stranger", url)

	w.apply(t, fmt.Sprintf(strict, ns))
	w.refused(t, outside, "stranger", url)
	w.refused(t, outside, "stranger", "http://"+w.host(t, ns, "server1")+":8080/") // on its own node
	w.served(t, ns, "loop", url)
	lives := w.lives(t, ns)
	// A pod that starts now has everything before it: the startup probe too.
	w.run(t, ns, pod{name: "late", node: 1, args: []string{"serve"}, probes: true})
	time.Sleep(6 * time.Second) // longer than it takes each probe to fail as often as it may
	delete(lives, "late")
	now := w.lives(t, ns)
	delete(now, "late")
	if !maps.Equal(now, lives) {
		t.Errorf("pods have changed: %v, now %v", lives, now)
	}
	for _, p := range []string{"server1", "server2", "late"} {
		if !w.ready(t, ns, p) {
			t.Errorf("%s is not ready", p)
		}
	}
}

// TestPoliciesDecideByServiceAccount goes through ALLOW, DENY and dry run.
func TestPoliciesDecideByServiceAccount(t *testing.T) {
	w := onMesh(t)
	const ns = "policies"
	w.namespace(t, ns)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.apply(t, fmt.Sprintf(serverService, ns))
	w.run(t, ns, server(2),
		pod{name: "friend", node: 1, args: []string{"serve"}}, pod{name: "foe", node: 1, args: []string{"serve"}})
	w.captured(t, ns, true, "server2", "friend", "foe")
	const url = "http://server/"
	w.served(t, ns, "foe", url)

	policy := func(name, action, who, dryRun string) string {
		return fmt.Sprintf(`---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %s, namespace: %s, annotations: {istio.io/dry-run: %q}}
spec:
  selector: {matchLabels: {role: server}}
  action: %s
  rules: [{from: [{source: {principals: ["cluster.local/ns/%s/sa/%s"]}}]}]
`, name, ns, dryRun, action, ns, who)
	}
	w.apply(t, policy("allow", "ALLOW", "friend", "true"))
	w.served(t, ns, "foe", url)
	w.apply(t, policy("allow", "ALLOW", "friend", "false"))
	w.refused(t, ns, "foe", url)
	w.served(t, ns, "friend", url)
	w.apply(t, policy("deny", "DENY", "friend", "false"))
	w.refused(t, ns, "friend", url)
	w.kubectl(t, "-n", ns, "delete", "authorizationpolicy", "allow", "deny")
	w.served(t, ns, "foe", url)
	w.served(t, ns, "friend", url)
	if !w.ready(t, ns, "server2") {
		t.Error("the policies have stopped the kubelet's probes")
	}
}
