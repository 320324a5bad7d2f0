package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// certificates are those that the agents hold for the pods of a namespace, by node and
// service account.
func (w *world) certificates(t *testing.T, namespace string) (map[string]admin.Certificate, error) {
	t.Helper()
	found := make(map[string]admin.Certificate)
	for _, n := range w.Nodes() {
		out, err := w.cli(t.Context(), "certificates", "--agent", n.Name, "-n", namespace, "-o", "json")
		if err != nil {
			return nil, err
		}
		var rows []admin.Certificate
		if err := json.Unmarshal([]byte(out), &rows); err != nil {
			return nil, fmt.Errorf("raceway certificates says %q: %w", out, err)
		}
		for _, r := range rows {
			found[n.Name+"/"+r.Identity.ServiceAccount] = r
		}
	}
	return found, nil
}

// TestTrafficGoesOnWithoutTheCA stops it for longer than half the life of the certificates
// that it has signed.
func TestTrafficGoesOnWithoutTheCA(t *testing.T) {
	slow(t)
	w := onMesh(t)
	const ns = "noca"
	// The CA alone is rolled: certificates that others hold stay as they are.
	w.runHelm(t, "upgrade", "raceway", "daemonset/chart", "-n", system, "--reuse-values", "--set", "ca.maxTTL=3m", "--wait", "--timeout", "3m")
	defer func() {
		w.scaleCA(t, 2)
		w.runHelm(t, "rollback", "raceway", "-n", system, "--wait", "--timeout", "3m")
	}()
	w.busy(t, ns)
	w.run(t, ns, pod{name: "quiet", node: 1, args: []string{"serve"}})
	w.captured(t, ns, true, "quiet")
	held, err := w.certificates(t, ns)
	if err != nil {
		t.Fatal(err)
	}
	loop := w.unharmed(t, ns, "loop", count{})
	w.run(t, ns, pod{name: "lasting", node: 1, args: []string{"hold", w.host(t, ns, "server2") + ":9000"}})
	w.captured(t, ns, true, "lasting")
	lasting := w.unharmed(t, ns, "lasting", count{})

	w.scaleCA(t, 0)
	// A pair that has not spoken before.
	w.must(t, ns, "quiet", "get", "http://"+w.host(t, ns, "server2")+":8080/")
	// New pods of an identity that is held, and of one that is not.
	w.apply(t, pod{name: "stranger", node: 1, args: []string{"get", "http://" + w.host(t, ns, "server2") + ":8080/"}, spec: "  restartPolicy: Never\n"}.manifest(ns))
	twin := pod{name: "twin", node: 1, args: []string{"serve"}}.manifest(ns)
	w.apply(t, strings.Replace(twin, "serviceAccountName: twin", "serviceAccountName: quiet", 1))
	w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod/twin", "--timeout=60s")
	w.must(t, ns, "twin", "get", "http://"+w.host(t, ns, "server2")+":8080/")
	eventually(t, "an event says why stranger does not start", func() error {
		out, err := w.Kubectl(t.Context(), "-n", ns, "get", "events", "--field-selector=involvedObject.name=stranger", "-o", "jsonpath={.items[*].message}")
		if err == nil && (!strings.Contains(out, "the agent has not captured it") || !strings.Contains(out, "certificate")) {
			err = fmt.Errorf("events: %q", out)
		}
		return err
	})
	// The half of their life comes, and nobody renews them.
	due := held["node1/loop"].RefreshAt
	time.Sleep(time.Until(due))
	eventually(t, "a certificate is not renewed, and that is said", func() error {
		now, err := w.certificates(t, ns)
		if err == nil && now["node1/loop"].Error == "" {
			err = fmt.Errorf("%+v", now["node1/loop"])
		}
		return err
	})
	loop = w.unharmed(t, ns, "loop", loop)
	w.unharmed(t, ns, "lasting", lasting)

	// An agent without keys serves nothing new, and says so.
	w.killAgents(t, w.Node(2))
	eventually(t, "the next agent of node2 says what it lacks", func() error {
		out, err := w.cli(t.Context(), "check", "--agent", "node2")
		if err == nil {
			return errors.New("all is well: " + out)
		}
		if !strings.Contains(out, "certificate spiffe://cluster.local/ns/"+ns+"/sa/server2") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if out, err := w.exec(t.Context(), ns, "quiet", "get", "http://"+w.host(t, ns, "server2")+":8080/"); err == nil {
		t.Errorf("an agent without certificates serves: %s", out)
	}

	w.scaleCA(t, 2)
	eventually(t, "all certificates are new", func() error {
		now, err := w.certificates(t, ns)
		if err != nil {
			return err
		}
		for id, before := range held {
			if c := now[id]; c.State != "valid" || c.Error != "" || !c.NotAfter.After(before.NotAfter) {
				return fmt.Errorf("%s: %+v", id, c)
			}
		}
		return nil
	})
	w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/stranger", "--timeout=90s")
	w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=90s")
	w.must(t, ns, "quiet", "get", "http://"+w.host(t, ns, "server2")+":8080/")
	now, err := w.count(t.Context(), ns, "loop")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d requests failed from when an agent was killed in the outage to its end", now.Failed-loop.Failed, now.Done-loop.Done)
	w.unharmed(t, ns, "loop", now)
}

// scaleCA has so many replicas of the CA run.
func (w *world) scaleCA(t *testing.T, replicas int) {
	t.Helper()
	w.kubectl(t, "-n", system, "scale", "deployment/raceway-ca", fmt.Sprintf("--replicas=%d", replicas))
	if replicas > 0 {
		w.kubectl(t, "-n", system, "rollout", "status", "deployment/raceway-ca", "--timeout=90s")
		return
	}
	w.kubectl(t, "-n", system, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=ca", "--timeout=90s")
}
