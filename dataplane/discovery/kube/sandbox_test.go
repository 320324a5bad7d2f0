package kube

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

var started = discovery.Sandbox{
	Pod: dataplane.Name{Namespace: "shop", Name: "web"}, UID: "uid-web", NetNS: "/run/netns/web",
	Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
}

// pending is a pod without a status.
func pending(name string) *corev1.Pod {
	p := running(name, "node-1", "")
	p.Status = corev1.PodStatus{Phase: corev1.PodPending}
	return p
}

func (r *rig) start(s discovery.Sandbox) dataplane.Workload {
	r.t.Helper()
	w, err := r.source.Started(r.t.Context(), s)
	if err != nil {
		r.t.Fatal(err)
	}
	return w
}

func TestPodThatStartsHasItsAddressesBeforeTheClusterHas(t *testing.T) {
	r := newRig(t, shop(), pending("web"))
	r.run()
	r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID != "" && !workload(s, "web").Enrolled })
	w := r.start(started)
	if !w.Enrolled || !w.Starting || w.NetNS != started.NetNS || len(w.Addrs) != 2 || w.Captured ||
		w.Identity.String() != "spiffe://cluster.local/ns/shop/sa/default" {
		t.Errorf("started as %+v", w)
	}
	s := r.until("it starts", func(s *dataplane.Snapshot) bool { return workload(s, "web").Starting })
	if got := workload(s, "web"); !got.Enrolled || got.NetNS != started.NetNS || len(got.Addrs) != 2 || got.Identity != w.Identity {
		t.Errorf("published as %+v", got)
	}
	if s.WorkloadAt(started.Addrs[1]) == nil {
		t.Error("its address is nobody's")
	}
	// Its agent takes tunnels for it, and peers on this node may use them.
	if err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil); err != nil {
		t.Fatal(err)
	}
	r.until("the capture", captured("web"))

	p := r.pod("web")
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}}
	r.updatePod(p)
	s = r.until("it runs", func(s *dataplane.Snapshot) bool { return !workload(s, "web").Starting })
	if got := workload(s, "web"); len(got.Addrs) != 1 || got.NetNS != started.NetNS || !got.Enrolled {
		t.Errorf("running as %+v", got)
	}
	r.source.Stopped(started.Pod, "uid-other")
	r.always("it is there", func() bool { return workload(r.snapshot(), "web").NetNS != "" })
	r.source.Stopped(started.Pod, "")
	r.until("its sandbox is gone", func(s *dataplane.Snapshot) bool { return workload(s, "web").NetNS == "" })
}

func TestPodThatNoWatchHasShownIsAskedFor(t *testing.T) {
	r := newRig(t, running("db", "node-2", "10.0.0.2"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	r.answers("watch pods", forbidden("pods"))
	r.answers("list pods", forbidden("pods"))
	r.answers("watch namespaces", forbidden("namespaces"))
	r.answers("list namespaces", forbidden("namespaces"))
	r.away(true)
	r.problem("away since")
	r.away(false)
	r.create(shop())
	r.create(pending("web"))
	r.eventually("the API server is back", func() bool { return !r.has("away since") })
	if w := r.start(started); !w.Enrolled || !w.Starting {
		t.Errorf("started as %+v", w)
	}
	r.until("it starts", func(s *dataplane.Snapshot) bool { return workload(s, "web").Starting })

	for cause, s := range map[string]discovery.Sandbox{
		"it was replaced": {Pod: started.Pod, UID: "uid-before"},
		"not found":       {Pod: dataplane.Name{Namespace: "shop", Name: "none"}},
	} {
		if _, err := r.source.Started(t.Context(), s); err == nil || !strings.Contains(err.Error(), cause) {
			t.Errorf("%+v: %v, want it to say %q", s, err, cause)
		}
	}
	// It went before any watch saw it.
	r.source.Stopped(started.Pod, "uid-web")
	r.until("it is gone", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID == "" })
}

// A StatefulSet's next pod has the name of the one before, and can start before the watch
// shows the end of that.
func TestSuccessorOfTheSameName(t *testing.T) {
	old := running("web", "node-1", "10.0.0.9")
	r := newRig(t, shop(), old)
	r.run()
	r.until("the first", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID == "uid-web" })
	next := pending("web")
	next.UID, next.CreationTimestamp = "uid-next", metav1.Unix(1_800_000_100, 0)
	key := keyOf("Pod", next)
	if err := r.source.takeFetched(convert("Pod", next)); err != nil {
		t.Fatal(err)
	}
	sandbox := started
	sandbox.UID = "uid-next"
	r.start(sandbox)
	// The watch catches up.
	last := old.DeepCopy()
	last.Labels = map[string]string{"late": "yes"}
	r.source.take(convert("Pod", last))
	r.source.drop(key, "uid-web")
	r.always("the next one starts", func() bool {
		s := r.snapshot()
		w := workload(s, "web")
		return w.UID == "uid-web" || w.UID == "uid-next" && w.Starting && w.NetNS == sandbox.NetNS
	})
	r.until("the next one", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID == "uid-next" })
	r.source.take(convert("Pod", next))
	r.source.drop(key, "uid-next")
	r.until("it is gone", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID == "" })
}

// The sandbox of a pod that runs can die: its status is then of the one before.
func TestSecondSandboxOfAPod(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.9"))
	r.run()
	r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "web").UID != "" })
	if w := r.start(started); !w.Starting || w.Addrs[0] != started.Addrs[0] {
		t.Errorf("started as %+v", w)
	}
	r.until("it starts", func(s *dataplane.Snapshot) bool { return workload(s, "web").Starting })
	p := r.pod("web")
	p.Labels = map[string]string{"seen": "yes"}
	r.updatePod(p)
	s := r.until("an older status", func(s *dataplane.Snapshot) bool { return workload(s, "web").Labels["seen"] == "yes" })
	if w := workload(s, "web"); !w.Starting || w.Addrs[0] != started.Addrs[0] {
		t.Errorf("the first sandbox's addresses count: %+v", w)
	}
	p = r.pod("web")
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Running: new(corev1.ContainerStateRunning)}}}
	r.updatePod(p)
	r.until("it runs", func(s *dataplane.Snapshot) bool { return !workload(s, "web").Starting })
}
