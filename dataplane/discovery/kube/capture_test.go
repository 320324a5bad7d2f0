package kube

import (
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestCapturedPodsAreAnnotated(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), running("job", "node-1", "10.0.0.2"), running("db", "node-2", "10.0.0.3"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	publish := func(uids ...string) {
		t.Helper()
		if err := r.source.PublishCaptured(t.Context(), uids, nil); err != nil {
			t.Fatal(err)
		}
	}
	// One is gone, one is another node's: its own agent speaks for it.
	publish("uid-web", "uid-gone", "uid-db")
	if !r.annotated("web") || r.annotated("job") || r.annotated("db") {
		t.Errorf("annotated: web %v, job %v, db %v", r.annotated("web"), r.annotated("job"), r.annotated("db"))
	}
	r.until("the capture", captured("web"))
	publish("uid-job")
	if r.annotated("web") || !r.annotated("job") {
		t.Errorf("annotated: web %v, job %v", r.annotated("web"), r.annotated("job"))
	}
	// Nothing is left to do, and nothing is done.
	r.client.ClearActions()
	publish("uid-job")
	for _, action := range r.client.Actions() {
		if action.GetVerb() == "patch" {
			t.Errorf("patched again: %v", action)
		}
	}
}

// Who takes UDP as well is annotated so, and only while it takes tunnels at all.
func TestPodsThatTakeUDPAreAnnotated(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), running("job", "node-1", "10.0.0.2"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	for _, c := range []struct{ captured, udp []string }{
		{[]string{"uid-web", "uid-job"}, []string{"uid-web"}},
		{[]string{"uid-web", "uid-job"}, nil},
		{[]string{"uid-job"}, []string{"uid-web"}},
		{[]string{"uid-web"}, []string{"uid-web"}},
	} {
		if err := r.source.PublishCaptured(t.Context(), c.captured, c.udp); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"web", "job"} {
			captured := slices.Contains(c.captured, "uid-"+name)
			udp := captured && slices.Contains(c.udp, "uid-"+name)
			if got := r.pod(name).Annotations[dataplane.UDPAnnotation] == dataplane.UDPEnabled; got != udp {
				t.Errorf("%+v: %s is annotated as taking UDP: %v", c, name, got)
			}
			r.until("what is published", func(s *dataplane.Snapshot) bool {
				w := workload(s, name)
				return w.Captured == captured && w.UDP == udp
			})
		}
	}
}

func TestPodThatCannotBeAnnotatedIsNamed(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	r.answers("patch pods", forbidden("pods"))
	err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil)
	if err == nil || !strings.Contains(err.Error(), "shop/web") || !strings.Contains(err.Error(), "no RBAC rule") {
		t.Errorf("error = %v", err)
	}
	// A pod that goes meanwhile, or whose name has another, needs no annotation.
	for _, gone := range []error{
		apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "web"),
		apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "web", nil),
	} {
		r.answers("patch pods", gone)
		if apierrors.IsInvalid(gone) {
			p := r.pod("web")
			p.UID = "uid-other"
			r.answers("watch pods", nil)
			r.client.ClearActions()
			r.answers("get pods", apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "web"))
		}
		if err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil); err != nil {
			t.Errorf("a pod that is gone: %v", err)
		}
	}
}

// A tenant may edit the pod, and must not win: peers go on, and its agent repairs it.
func TestEditedAnnotationIsRepaired(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), running("job", "node-1", "10.0.0.2"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	if err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil); err != nil {
		t.Fatal(err)
	}
	r.updatePod(withAnnotation(r.pod("web"), false))
	r.eventually("it is back", func() bool { return r.annotated("web") })
	r.updatePod(withAnnotation(r.pod("job"), true))
	r.eventually("one that is not captured says so no longer", func() bool { return !r.annotated("job") })
	r.until("it is not captured", func(s *dataplane.Snapshot) bool { return !workload(s, "job").Captured })
}

func TestCaptureSticksWhileThePodIsWanted(t *testing.T) {
	r := newRig(t, shop(), withAnnotation(running("db", "node-2", "10.0.0.2"), true))
	r.run()
	r.until("the capture", captured("db"))
	edited := withAnnotation(r.pod("db"), false)
	edited.Labels = map[string]string{"seen": "yes"}
	r.updatePod(edited)
	s := r.until("the edit", func(s *dataplane.Snapshot) bool { return workload(s, "db").Labels["seen"] == "yes" })
	if !captured("db")(s) {
		t.Fatal("an edit of another node's pod took it back to plaintext")
	}
	r.always("it stays captured", func() bool { return captured("db")(r.snapshot()) })

	// Also over a restart.
	r.eventually("the file", func() bool { return r.wrote(`"captured":["uid-db"]`) })
	r.run()
	r.until("the capture", captured("db"))
	r.eventually("all is known", func() bool { return len(r.source.Problems()) == 0 })
	r.always("it stays captured", func() bool { return captured("db")(r.snapshot()) })

	out := r.pod("db")
	out.Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeNone}
	r.updatePod(out)
	r.until("it goes with its label", func(s *dataplane.Snapshot) bool { return !workload(s, "db").Captured })
}

// A pod that is being released takes tunnels until its agent says that it does not.
func TestCaptureEndsWithTheAnnotation(t *testing.T) {
	p := withAnnotation(running("db", "node-2", "10.0.0.2"), true)
	p.Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeNone}
	r := newRig(t, shop(), p)
	r.run()
	s := r.until("the capture", captured("db"))
	if workload(s, "db").Enrolled {
		t.Error("a pod that opted out is enrolled")
	}
	r.updatePod(withAnnotation(r.pod("db"), false))
	r.until("its end", func(s *dataplane.Snapshot) bool { return !workload(s, "db").Captured })
}
