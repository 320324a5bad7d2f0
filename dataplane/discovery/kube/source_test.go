package kube

import (
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/raceway-mesh/raceway/dataplane"
)

func forbidden(resource string) error {
	return apierrors.NewForbidden(schema.GroupResource{Resource: resource}, "", errors.New("no RBAC rule"))
}

func TestSnapshotHoldsWhatTheClusterHas(t *testing.T) {
	name, port := "http", int32(8080)
	web := running("web", "node-1", "10.0.0.1")
	web.Annotations = map[string]string{dataplane.NetNSAnnotation: "/proc/1/ns/net"}
	r := newRig(t, shop(), web, running("db", "node-2", "10.0.0.2"),
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-2", Labels: map[string]string{corev1.LabelTopologyZone: "b"}}},
		&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"},
			Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Name: name, Port: 80}}},
		},
		&discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-1", Labels: map[string]string{discoveryv1.LabelServiceName: "db"}},
			Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{
				Addresses: []string{"10.0.0.2"}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "db", UID: "uid-db"},
			}},
		},
		authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`),
		authorization(t, "typo", `{"action": "DENY", "rule": [{}]}`),
	)
	r.run()
	s := r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	w := workload(s, "web")
	if !w.Enrolled || w.Captured || w.Starting {
		t.Errorf("web = %+v, want it enrolled and no more", w)
	}
	if w.NetNS != "" {
		t.Errorf("the pod's author says that its network is %s, and is believed", w.NetNS)
	}
	svc := s.Service(dataplane.Name{Namespace: "shop", Name: "db"})
	if len(svc.Endpoints) != 1 || svc.Endpoints[0].WorkloadUID != "uid-db" || svc.Endpoints[0].Zone != "b" {
		t.Errorf("endpoints = %+v", svc.Endpoints)
	}
	if n := len(s.AuthorizationPolicies()); n != 2 {
		t.Errorf("%d policies, want 2", n)
	}
	r.problem(`unknown field "rule"`)
}

// While a kind may hold policies that are not known, nothing is decided.
func TestNothingIsPublishedBeforeEveryKindIsKnown(t *testing.T) {
	for _, resource := range []string{
		"namespaces", "nodes", "pods", "services", "endpointslices", "authorizationpolicies", "peerauthentications", "configmaps",
	} {
		t.Run(resource, func(t *testing.T) {
			r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
			r.answers(resource, forbidden(resource))
			r.run()
			r.problem("no RBAC rule")
			r.always("nothing is published", func() bool { return r.snapshot() == nil })
			r.answers(resource, nil)
			r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
			r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 })
		})
	}
}

func TestChangesArePublished(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
	r.run()
	r.until("a snapshot", policies(0))
	r.create(authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`))
	r.until("the policy", policies(1))
	r.deletePolicy("deny")
	r.until("no policy", policies(0))
	r.create(running("db", "node-2", "10.0.0.2"))
	r.until("the pod", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID != "" })
	r.deletePod("db")
	r.until("no pod", func(s *dataplane.Snapshot) bool { return workload(s, "db").UID == "" })
}

func TestOutageKeepsEverythingInForce(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), withAnnotation(running("db", "node-2", "10.0.0.2"), true),
		authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`))
	r.run()
	r.until("the policy", policies(1))
	r.away(true)
	r.problem("away since")
	if r.source.Staleness() <= 0 {
		t.Error("the source holds itself for up to date")
	}
	if strings.Contains(r.log.String(), "level=DEBUG") {
		t.Errorf("client-go is not quiet:\n%s", r.log)
	}
	r.always("all is in force", func() bool {
		s := r.snapshot()
		return policies(1)(s) && captured("db")(s) && workload(s, "web").Enrolled
	})
	start := time.Now()
	if err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil); err == nil || time.Since(start) > time.Second {
		t.Errorf("published with %v after %v, want an error at once", err, time.Since(start))
	}
	r.deletePolicy("deny") // while nobody looks
	r.away(false)
	r.until("the policy is gone", policies(0))
	r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 && r.source.Staleness() == 0 })
	if err := r.source.PublishCaptured(t.Context(), []string{"uid-web"}, nil); err != nil {
		t.Error(err)
	}
}

// Policies whose kind is gone are gone; those that cannot be read are not.
func TestPoliciesGoWithTheirKindAlone(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`))
	r.run()
	r.until("the policy", policies(1))

	relist := func() {
		r.away(true)
		r.problem("away since")
		r.away(false)
		r.eventually("the API server is back", func() bool { return !r.has("away since") })
	}
	r.answers("authorizationpolicies", forbidden("authorizationpolicies"))
	relist()
	r.problem("no RBAC rule")
	r.always("a policy that cannot be read is in force", func() bool { return policies(1)(r.snapshot()) })

	// A 404 while the API server says that it has the kind is somebody else's.
	r.answers("authorizationpolicies", apierrors.NewGenericServerResponse(404, "get", schema.GroupResource{}, "", "", 0, true))
	r.problem("yet the API server has that kind")
	r.always("a policy that somebody denies is in force", func() bool { return policies(1)(r.snapshot()) })

	r.uninstall()
	r.until("policies are gone", policies(0))
	r.eventually("no problem", func() bool { return len(r.source.Problems()) == 0 })

	r.install()
	r.until("policies are back", policies(1))
	r.deletePolicy("deny")
	r.until("they are watched", policies(0))
}

func TestClusterWithoutPolicies(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"))
	r.uninstall()
	r.run()
	r.until("a snapshot", policies(0))
	if p := r.source.Problems(); len(p) > 0 {
		t.Errorf("problems = %v", p)
	}
	r.install()
	r.create(authorization(t, "deny", `{"action": "DENY", "rules": [{}]}`))
	r.until("a policy of a kind that came later", policies(1))
}

func TestReleaseIsLatched(t *testing.T) {
	r := newRig(t, shop(), running("web", "node-1", "10.0.0.1"), meshConfig("false"))
	r.run()
	s := r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	if s.Released() {
		t.Fatal("the mesh is released")
	}
	update := func(value string) {
		if err := r.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("configmaps"), meshConfig(value), "raceway-system"); err != nil {
			t.Fatal(err)
		}
	}
	update("true")
	s = r.until("the release", (*dataplane.Snapshot).Released)
	if workload(s, "web").Enrolled {
		t.Error("a pod is enrolled in a mesh that is being taken off")
	}
	<-r.source.Released()
	update("false")
	r.always("it stays released", func() bool { return r.snapshot().Released() })
	// The file of a mesh that went is not the state of one that is installed anew.
	r.eventually("no file", func() bool { return !r.wrote("") })
	r.away(true)
	r.run()
	r.problem("away since")
	r.always("nothing is published", func() bool { return r.snapshot() == nil })
	r.away(false)
	s = r.until("a snapshot", func(*dataplane.Snapshot) bool { return true })
	if s.Released() {
		t.Error("a mesh that is installed anew is released")
	}
}

func TestMarkReleased(t *testing.T) {
	own := running("agent-1", "node-1", "10.0.0.9")
	own.Namespace = "raceway-system"
	r := newRig(t, own)
	r.run()
	if err := r.source.MarkReleased(t.Context()); err != nil {
		t.Fatal(err)
	}
	o, err := r.client.CoreV1().Pods("raceway-system").Get(t.Context(), "agent-1", metav1.GetOptions{})
	if err != nil || o.Annotations[ReleasedAnnotation] != "true" {
		t.Errorf("annotations = %v, %v", o.Annotations, err)
	}
}

func TestStartupTaint(t *testing.T) {
	taints := []corev1.Taint{
		{Key: "keep", Effect: corev1.TaintEffectNoSchedule},
		{Key: "raceway.dev/not-ready", Effect: corev1.TaintEffectNoSchedule},
		{Key: "raceway.dev/not-ready", Effect: corev1.TaintEffectNoExecute},
	}
	r := newRig(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", ResourceVersion: "7"}, Spec: corev1.NodeSpec{Taints: taints}})
	r.config.StartupTaint = "raceway.dev/not-ready"
	r.run()
	for range 2 {
		if err := r.source.RemoveTaint(t.Context()); err != nil {
			t.Fatal(err)
		}
		node, err := r.client.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{})
		if err != nil || len(node.Spec.Taints) != 1 || node.Spec.Taints[0].Key != "keep" {
			t.Errorf("taints = %v, %v", node.Spec.Taints, err)
		}
	}
}

func TestConfigNamesEveryComplaint(t *testing.T) {
	r := newRig(t)
	err := Config{Client: r.config.Client, Pod: dataplane.Name{Name: "p"}}.Validate()
	for _, want := range []string{"the node is not set", "one of the two clients", "/p", "no logger"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}
