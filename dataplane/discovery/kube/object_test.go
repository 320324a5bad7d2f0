package kube

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// tainted is this node, with taints of these keys.
func tainted(keys ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", ResourceVersion: "7"}}
	for _, key := range keys {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule})
	}
	return n
}

// broken has an address that is none.
func broken(p *corev1.Pod) *corev1.Pod {
	p.Status.PodIPs = []corev1.PodIP{{IP: "none"}}
	return p
}

func TestFaultyObjectKeepsItsLastGoodState(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), broken(running("new", "node-2", "")))
	r.run()
	s := r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	if workload(s, "new").UID != "" {
		t.Error("a pod without a good state is there")
	}
	r.problem("Pod shop/new: ")
	r.updatePod(broken(r.pod("web")))
	r.problem("Pod shop/web: ")
	r.always("it stays", func() bool { return len(workload(r.snapshot(), "web").Addrs) == 1 })
	r.updatePod(running("web", "node-1", "10.0.0.7"))
	r.until("its new address", func(s *dataplane.Snapshot) bool { return workload(s, "web").Addrs[0].String() == "10.0.0.7" })
	r.eventually("no problem with it", func() bool { return !r.has("Pod shop/web: ") })

	// What was known of one pod is not the state of the next of its name.
	next := broken(running("web", "node-1", ""))
	next.UID = "uid-next"
	r.updatePod(next)
	r.until("the first is gone", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID == "" })
	r.problem("Pod shop/web: ")

	// It goes while nobody looks, and is no problem any more.
	r.away(true)
	r.problem("away since")
	r.deletePod("new")
	r.deletePod("web")
	r.away(false)
	r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 })
}

func TestPodsOfEveryKind(t *testing.T) {
	finished := running("finished", "node-1", "10.0.0.2")
	finished.Status.Phase = corev1.PodSucceeded
	host := withAnnotation(running("host", "node-1", "192.0.2.1"), false)
	host.Spec.HostNetwork = true
	dual := running("dual", "node-1", "10.0.0.3")
	dual.Status.PodIPs = append(dual.Status.PodIPs, corev1.PodIP{IP: "fd00::3"})
	r := newRig(t, shop(), finished, host, dual, pending("pending"))
	r.run()
	s := r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	for _, name := range []string{"finished", "host", "pending"} {
		if w := workload(s, name); w.UID == "" || w.Enrolled {
			t.Errorf("%s = %+v, want it there and not enrolled", name, w)
		}
	}
	if w := workload(s, "dual"); !w.Enrolled || len(w.Addrs) != 2 || s.WorkloadAt(w.Addrs[0]) != s.WorkloadAt(w.Addrs[1]) {
		t.Errorf("dual = %+v", w)
	}
}

// A list can be older than what was asked for.
func TestWhatWasAskedForOutlivesAnOlderList(t *testing.T) {
	r := newRig(t)
	source, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	for kind, o := range map[object.Kind]metav1.Object{object.KindNamespace: shop(), object.KindPod: pending("web")} {
		key := keyOf(kind, o)
		there := func() bool { _, there := source.set.Get(key); return there }
		if err := source.takeFetched(convert(kind, o)); err != nil {
			t.Fatal(err)
		}
		source.replace(kind, nil)
		if !there() {
			t.Errorf("%s was dropped", key)
		}
		source.take(convert(kind, o))
		source.replace(kind, nil)
		if there() {
			t.Errorf("%s is there after a newer list without it", key)
		}
		if err := source.takeFetched(convert(kind, o)); err != nil {
			t.Fatal(err)
		}
		source.drop(key, string(o.GetUID()))
		if there() {
			t.Errorf("%s is there after its deletion", key)
		}
	}
}

// This node's pods and policies do not wait for the crowd.
func TestUrgency(t *testing.T) {
	r := newRig(t)
	source, err := New(r.config)
	if err != nil {
		t.Fatal(err)
	}
	take := func(kind object.Kind, o any) urgency { return source.takeLocked(convert(kind, o)) }
	for _, tt := range []struct {
		name      string
		got, want urgency
	}{
		{"a namespace", take("Namespace", shop()), urgent},
		{"own pod", take("Pod", running("web", "node-1", "10.0.0.1")), urgent},
		{"another's pod", take("Pod", running("db", "node-2", "10.0.0.2")), soon},
		{"another's pod, moved", take("Pod", running("db", "node-2", "10.0.0.3")), whenever},
		{"another's pod, captured", take("Pod", withAnnotation(running("db", "node-2", "10.0.0.3"), true)), soon},
		{"nothing new", take("Pod", withAnnotation(running("db", "node-2", "10.0.0.3"), true)), never},
		{"a policy", take("AuthorizationPolicy", authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`)), urgent},
		{"a node", take("Node", tainted()), whenever},
		{"another's pod, gone", source.dropLocked(keyOf("Pod", running("db", "", ""))), whenever},
		{"own pod, gone", source.dropLocked(keyOf("Pod", running("web", "", ""))), urgent},
		{"what never was", source.dropLocked(keyOf("Pod", running("x", "", ""))), never},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: urgency %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}

func TestScheduleRestsAfterCostlySnapshots(t *testing.T) {
	p, start := defaultPace(), time.Unix(1000, 0)
	var d schedule
	if _, something := d.at(p); something {
		t.Error("there is something to publish")
	}
	d.published(start, start.Add(time.Second))
	end := start.Add(time.Second)
	d.add(whenever, end)
	d.add(whenever, end.Add(time.Minute)) // the first counts
	if at, _ := d.at(p); at != end.Add(10*time.Second) {
		t.Errorf("changes of the crowd wait %v", at.Sub(end))
	}
	d.add(urgent, end.Add(3*time.Second))
	if at, _ := d.at(p); at != end.Add(3*time.Second+20*time.Millisecond) {
		t.Errorf("a policy waits until %v", at.Sub(end))
	}
	d.done()
	if _, something := d.at(p); something {
		t.Error("there is something to publish")
	}
}
