package kube

import (
	"errors"
	"net/url"
	"strings"
	"syscall"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// asked counts the requests of a verb for a resource.
func (r *rig) asked(verb, resource string) int {
	n := 0
	for _, action := range r.client.Actions() {
		if action.Matches(verb, resource) {
			n++
		}
	}
	return n
}

// An API server that comes back is not asked for the whole cluster by every node of it.
func TestWatchesGoOnAfterAnOutage(t *testing.T) {
	for name, starting := range map[string]error{
		"refused": nil,
		// RBAC comes up after the port does.
		"and starting": forbidden("pods"),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
			r.pace.starting = patience
			r.run()
			r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
			// A watch that has shown nothing and was short is not gone on with.
			r.create(running("db", "node-2", "10.0.0.2"))
			r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID != "" })
			r.client.ClearActions()
			r.away(true)
			r.problem("away since")
			r.answers("pods", starting)
			r.away(false)
			if starting != nil {
				r.problem("no RBAC rule")
				r.answers("pods", nil)
			}
			r.create(running("late", "node-2", "10.0.0.3"))
			r.until("what came meanwhile", func(s *dataplane.Snapshot) bool { return workload(s, "late").UID != "" })
			r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 })
			if n := r.asked("list", "pods"); n > 0 {
				t.Errorf("pods were listed %d times", n)
			}
		})
	}
}

// Where watches alone stay refused, lists tell.
func TestRefusedWatchesAreReplacedByLists(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
	r.answers("watch pods", forbidden("pods"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	r.create(running("db", "node-2", "10.0.0.2"))
	r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID != "" })
}

func TestAnswersOfAnAPIServer(t *testing.T) {
	for name, tt := range map[string]struct {
		answer  error
		problem string
	}{
		"403": {forbidden("pods"), "no RBAC rule"},
		"410": {apierrors.NewResourceExpired("too old"), ""},
		"429": {apierrors.NewTooManyRequests("not so fast", 0), ""},
		"500": {apierrors.NewInternalError(errors.New("etcd")), "etcd"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
			r.answers("pods", tt.answer)
			r.run()
			r.eventually("a try", func() bool { return r.asked("list", "pods") > 2 })
			if tt.problem != "" {
				r.problem(tt.problem)
			} else if p := r.source.Problems(); len(p) > 0 {
				t.Errorf("problems = %v of what passes", p)
			}
			r.always("nothing is published", func() bool { return r.snapshot() == nil && r.source.Staleness() == 0 })
			r.answers("pods", nil)
			r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
			r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 })
		})
	}
}

// An API server that hangs takes connections and says nothing.
func TestTimeoutIsAnOutage(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
	r.run()
	r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	r.away(true)
	r.mu.Lock()
	r.failure = errTimeout
	r.mu.Unlock()
	r.problem("away since")
	r.always("it is away", func() bool { return r.source.Staleness() > 0 })
	r.away(false)
	r.eventually("it is back", func() bool { return r.source.Staleness() == 0 && len(r.source.Problems()) == 0 })
}

// A cause names what is wrong, and not all of the request.
func TestOutageIsToldShortly(t *testing.T) {
	r := newRig(t, shop())
	r.answers("pods", &url.Error{Op: "Get", URL: "https://10.96.0.1/api/v1/pods?resourceVersion=7", Err: syscall.ECONNREFUSED})
	r.run()
	r.eventually("a line", func() bool { return strings.Contains(r.log.String(), "API server is away") })
	if strings.Contains(r.log.String(), "resourceVersion") || !strings.Contains(r.log.String(), "connection refused") {
		t.Errorf("log:\n%s", r.log)
	}
}

// Policies of a version that is not asked for are not no policies.
func TestPoliciesOfAnotherVersionAreNotAbsent(t *testing.T) {
	r := newRig(t, shop())
	r.uninstall()
	r.kinds.set(&metav1.APIResourceList{
		GroupVersion: "security.istio.io/v1beta1",
		APIResources: []metav1.APIResource{{Name: "authorizationpolicies", Kind: string(object.KindAuthorizationPolicy)}},
	})
	r.run()
	r.problem("yet the API server has that kind in security.istio.io/v1beta1")
	r.always("nothing is published", func() bool { return r.snapshot() == nil })
}

func TestNotFoundFromSomethingElse(t *testing.T) {
	r := newRig(t, shop())
	r.uninstall()
	r.kinds.mu.Lock()
	r.kinds.Resources = nil
	r.kinds.mu.Unlock()
	r.run()
	r.problem("from what does not look like an API server")
	r.always("nothing is published", func() bool { return r.snapshot() == nil })
}

// With a node's taints and an API server that answers as real ones do.
func TestStartupTaintIsInsistedOn(t *testing.T) {
	r := newRig(t)
	r.config.StartupTaint = "raceway.dev/not-ready"
	r.run()
	if err := r.source.RemoveTaint(t.Context()); !apierrors.IsNotFound(err) {
		t.Errorf("of a node that is not there: %v", err)
	}
	for name, answer := range map[string]error{
		"changed meanwhile": apierrors.NewGenericServerResponse(422, "patch", schema.GroupResource{}, "", "", 0, false),
		"conflict":          apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "node-1", nil),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, tainted("raceway.dev/not-ready"))
			r.config.StartupTaint = "raceway.dev/not-ready"
			r.run()
			r.answers("patch nodes", answer)
			done := make(chan error, 1)
			go func() { done <- r.source.RemoveTaint(t.Context()) }()
			r.eventually("tries", func() bool { return r.asked("patch", "nodes") > 2 })
			r.answers("patch nodes", nil)
			if err := <-done; err != nil {
				t.Error(err)
			}
			node, err := r.client.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{})
			if err != nil || len(node.Spec.Taints) > 0 {
				t.Errorf("taints = %v, %v", node.Spec.Taints, err)
			}
		})
	}
}
