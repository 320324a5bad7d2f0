package object

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestPod(t *testing.T) {
	c := contents(t, `
apiVersion: v1
kind: Pod
metadata:
  name: web-7d4b9c6f5d-x2x9k
  namespace: shop
  uid: 0b8f1c0e-3a52-4a53-9d6a-0c5a2a3c1f10
  deletionTimestamp: "2026-11-02T10:00:00Z"
  labels: {app: web, pod-template-hash: 7d4b9c6f5d, topology.istio.io/network: net-2}
  annotations: {raceway.dev/netns: /run/netns/web}
  ownerReferences:
  - {apiVersion: apps/v1, kind: ReplicaSet, name: web-7d4b9c6f5d, uid: u, controller: true}
spec:
  serviceAccountName: web
  nodeName: n1
status:
  phase: Running
  conditions:
  - {type: PodScheduled, status: "True"}
  - {type: Ready, status: "True"}
  podIP: 10.244.1.5
  podIPs: [{ip: "::ffff:10.244.1.5"}, {ip: "fd00:1::5"}]
`)
	equal(t, "workload", c.Workloads, []dataplane.Workload{{
		UID:            "0b8f1c0e-3a52-4a53-9d6a-0c5a2a3c1f10",
		Name:           dataplane.Name{Namespace: "shop", Name: "web-7d4b9c6f5d-x2x9k"},
		ServiceAccount: "web",
		Node:           "n1",
		Addrs:          addrs("10.244.1.5", "fd00:1::5"),
		Labels:         map[string]string{"app": "web", "pod-template-hash": "7d4b9c6f5d", "topology.istio.io/network": "net-2"},
		Owner:          dataplane.Owner{Kind: "Deployment", Name: "web"},
		Phase:          dataplane.PodRunning,
		Ready:          true,
		Terminating:    true,
		Network:        "net-2",
		NetNS:          "/run/netns/web",
	}})
}

func TestPodDefaults(t *testing.T) {
	w := contents(t, `{apiVersion: v1, kind: Pod, metadata: {name: web}}`).Workloads[0]
	equal(t, "name", w.Name, dataplane.Name{Namespace: "default", Name: "web"})
	equal(t, "service account", w.ServiceAccount, "default")
	equal(t, "phase", w.Phase, dataplane.PodPending)
	equal(t, "owner", w.Owner, dataplane.Owner{Kind: "Pod", Name: "web"})
	equal(t, "ready", w.Ready, false)

	w = contents(t, `{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {serviceAccount: old, hostNetwork: true}}`).Workloads[0]
	equal(t, "service account by its old name", w.ServiceAccount, "old")
	equal(t, "host network", w.HostNetwork, true)
}

func TestPodIsReadyByItsConditionAlone(t *testing.T) {
	for conditions, want := range map[string]bool{
		`[]`:                                        false,
		`[{type: Ready, status: "True"}]`:           true,
		`[{type: Ready, status: "False"}]`:          false,
		`[{type: Ready, status: "Unknown"}]`:        false,
		`[{type: ContainersReady, status: "True"}]`: false,
	} {
		w := contents(t, `{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {phase: Running, conditions: `+conditions+`}}`).Workloads[0]
		if w.Ready != want {
			t.Errorf("%s: ready = %v, want %v", conditions, w.Ready, want)
		}
	}
}

func TestUIDIsDerivedFromTheNameAlone(t *testing.T) {
	uid := func(doc string) string { return contents(t, doc).Workloads[0].UID }
	a := uid(`{apiVersion: v1, kind: Pod, metadata: {name: a}}`)
	if got := uid(`{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: default}, spec: {nodeName: n2}}`); got != a {
		t.Errorf("UID = %s, then %s", a, got)
	}
	if got := uid(`{apiVersion: v1, kind: Pod, metadata: {name: b}}`); got == a {
		t.Error("two pods have one UID")
	}
	if err := validUID(a); err != nil || len(a) != 36 {
		t.Errorf("UID %s: %v", a, err)
	}
}

func TestCopiedUIDStaysWithTheFirstPod(t *testing.T) {
	c, conflicts := set(t,
		`{apiVersion: v1, kind: Pod, metadata: {name: b, uid: u1}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: a, uid: u1}}`).Contents(Mesh{})
	if len(conflicts) != 1 || conflicts[0].Key.Name.Name != "b" {
		t.Errorf("conflicts = %v, want one of b", conflicts)
	}
	if a, b := c.Workloads[0].UID, c.Workloads[1].UID; a != "u1" || b == "u1" || b == "" {
		t.Errorf("UIDs = %s, %s", a, b)
	}
}

func TestOwner(t *testing.T) {
	cases := []struct {
		name, labels, refs string
		want               dataplane.Owner
	}{
		{"deployment", `{pod-template-hash: abc12}`, `[{kind: ReplicaSet, name: web-abc12, controller: true}]`, dataplane.Owner{Kind: "Deployment", Name: "web"}},
		{"deployment with dashes", `{pod-template-hash: abc12}`, `[{kind: ReplicaSet, name: web-v2-abc12, controller: true}]`, dataplane.Owner{Kind: "Deployment", Name: "web-v2"}},
		{"replica set of its own", `{}`, `[{kind: ReplicaSet, name: web-abc12, controller: true}]`, dataplane.Owner{Kind: "ReplicaSet", Name: "web-abc12"}},
		{"another hash", `{pod-template-hash: zzz}`, `[{kind: ReplicaSet, name: web-abc12, controller: true}]`, dataplane.Owner{Kind: "ReplicaSet", Name: "web-abc12"}},
		{"nothing but the hash", `{pod-template-hash: abc12}`, `[{kind: ReplicaSet, name: -abc12, controller: true}]`, dataplane.Owner{Kind: "ReplicaSet", Name: "-abc12"}},
		{"cron job", `{}`, `[{kind: Job, name: backup-29384400, controller: true}]`, dataplane.Owner{Kind: "CronJob", Name: "backup"}},
		{"job", `{}`, `[{kind: Job, name: migrate-7, controller: true}]`, dataplane.Owner{Kind: "Job", Name: "migrate-7"}},
		{"stateful set", `{}`, `[{kind: StatefulSet, name: db, controller: true}]`, dataplane.Owner{Kind: "StatefulSet", Name: "db"}},
		{"daemon set", `{}`, `[{kind: DaemonSet, name: log, controller: true}]`, dataplane.Owner{Kind: "DaemonSet", Name: "log"}},
		{"the controller among owners", `{}`, `[{kind: Foo, name: x}, {kind: DaemonSet, name: log, controller: true}]`, dataplane.Owner{Kind: "DaemonSet", Name: "log"}},
		{"owned but not controlled", `{}`, `[{kind: Foo, name: x}]`, dataplane.Owner{Kind: "Pod", Name: "p"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := contents(t, `{apiVersion: v1, kind: Pod, metadata: {name: p, labels: `+c.labels+`, ownerReferences: `+c.refs+`}}`).Workloads[0]
			equal(t, "owner", w.Owner, c.want)
		})
	}
}

// Ports that UDP leaves alone, and of what cannot be read none. What is kept of a pod reads the
// same.
func TestUDPClearPorts(t *testing.T) {
	var eight []dataplane.PortRange
	for port := range uint16(8) {
		eight = append(eight, dataplane.PortRange{First: port + 1, Last: port + 1})
	}
	for text, want := range map[string][]dataplane.PortRange{
		"123":                    {{First: 123, Last: 123}},
		"123, 10000-20000":       {{First: 123, Last: 123}, {First: 10000, Last: 20000}},
		"1,2,3,4,5,6,7,8":        eight,
		"1,2,3,4,5,6,7,8,9":      nil,
		"":                       nil,
		"0":                      nil,
		"5-4":                    nil,
		"1-65536":                nil,
		"dns":                    nil,
		"123,":                   nil,
		"-":                      nil,
		"123-":                   nil,
		"65535-65535":            {{First: 65535, Last: 65535}},
		"99999999999999999999-1": nil,
	} {
		in := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", UID: "u", Annotations: map[string]string{dataplane.UDPClearAnnotation: text}}}
		o, err := FromPod(in)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "ports of "+text, o.value.(pod).UDPClear, want)
		again, err := FromPod(o.Encode().(*corev1.Pod))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "kept ports of "+text, again.value.(pod).UDPClear, want)
	}
}
