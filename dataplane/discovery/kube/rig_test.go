package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	fakediscovery "k8s.io/client-go/discovery/fake"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// patience is how long a test waits for what must come, and calm how long it looks whether
// something comes that must not.
const (
	patience = 10 * time.Second
	calm     = 100 * time.Millisecond
)

// rig is a source and the API server that it believes to talk to.
type rig struct {
	t       testing.TB
	config  Config
	client  *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	kinds   kinds
	log     *logBuffer

	pace   pace
	source *Source
	store  *dataplane.Store
	stop   func()

	mu      sync.Mutex
	failure error // of every request
	answer  map[string]error
	watches []*watching
	expired map[string]bool // resources of which something went while nobody could watch
}

// watching can be cut, as by an API server that goes.
type watching struct {
	watch.Interface
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newRig(t testing.TB, objects ...runtime.Object) *rig {
	t.Helper()
	r := &rig{t: t, answer: make(map[string]error), expired: make(map[string]bool), log: new(logBuffer), stop: func() {}}
	r.pace = pace{
		saving: time.Millisecond, mending: time.Millisecond, campaign: time.Millisecond, term: 2 * time.Second,
		retry: time.Millisecond, retryMax: 10 * time.Millisecond, absent: 10 * time.Millisecond,
	}
	r.client = fake.NewClientset()
	scheme := runtime.NewScheme()
	r.dynamic = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(scheme, map[schema.GroupVersionResource]string{
		policyResource(object.KindAuthorizationPolicy): "AuthorizationPolicyList",
		policyResource(object.KindPeerAuthentication):  "PeerAuthenticationList",
	})
	r.kinds.FakeDiscovery = r.client.Discovery().(*fakediscovery.FakeDiscovery)
	r.install()
	r.intercept(&r.client.Fake, r.client.Tracker())
	r.intercept(&r.dynamic.Fake, r.dynamic.Tracker())
	for _, o := range objects {
		r.create(o)
	}
	r.config = Config{
		Client: withKinds{r.client, &r.kinds}, Dynamic: r.dynamic, Node: "node-1",
		SnapshotFile: filepath.Join(t.TempDir(), "snapshot.json.gz"),
		MeshConfig:   dataplane.Name{Namespace: "raceway-system", Name: "raceway"},
		Pod:          dataplane.Name{Namespace: "raceway-system", Name: "agent-1"},
		Log:          slog.New(slog.NewTextHandler(r.log, nil)),
	}
	t.Cleanup(func() { r.stop() })
	return r
}

// errTimeout is what client-go hides of watches.
var errTimeout = errors.New("TLS handshake timeout")

// intercept lets the rig fail requests and cut watches.
func (r *rig) intercept(f *ktesting.Fake, tracker ktesting.ObjectTracker) {
	f.PrependReactor("*", "*", func(action ktesting.Action) (bool, runtime.Object, error) {
		err := r.fails(action)
		return err != nil, nil, err
	})
	f.PrependWatchReactor("*", func(action ktesting.Action) (bool, watch.Interface, error) {
		if err := r.fails(action); errors.Is(err, errTimeout) {
			return true, watch.NewEmptyWatch(), nil
		} else if err != nil {
			return true, nil, err
		}
		if r.forgot(action.GetResource().Resource) {
			return true, nil, apierrors.NewResourceExpired("too old")
		}
		w, err := tracker.Watch(action.GetResource(), action.GetNamespace(), action.(ktesting.WatchActionImpl).ListOptions)
		if err != nil {
			return true, nil, err
		}
		cut := &watching{w}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.watches = append(r.watches, cut)
		return true, cut, nil
	})
}

func (r *rig) fails(action ktesting.Action) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failure != nil {
		return r.failure
	}
	for _, key := range []string{action.GetVerb() + " " + action.GetResource().Resource, action.GetResource().Resource} {
		if err := r.answer[key]; err != nil {
			return err
		}
	}
	return nil
}

// forgot reports, once, whether a watch cannot go on from where it was: the fake shows no
// deletions that are past.
func (r *rig) forgot(resource string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer delete(r.expired, resource)
	return r.expired[resource]
}

func (r *rig) gone(resource string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expired[resource] = r.failure != nil
}

// away takes the API server away, with all watches, and brings it back.
func (r *rig) away(away bool) {
	r.mu.Lock()
	r.failure = nil
	if away {
		r.failure = errors.Join(errors.New("dial tcp 10.96.0.1:443"), syscall.ECONNREFUSED)
	}
	watches := r.watches
	r.watches = nil
	r.mu.Unlock()
	for _, w := range watches {
		w.Stop()
	}
}

// answers has requests for a resource, or "verb resource", fail until err is nil.
func (r *rig) answers(what string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer[what] = err
}

// kinds is what the API server says that it has.
type kinds struct {
	*fakediscovery.FakeDiscovery
	mu sync.Mutex
}

func (k *kinds) set(list ...*metav1.APIResourceList) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Resources = append([]*metav1.APIResourceList{{GroupVersion: "discovery.k8s.io/v1"}}, list...)
}

func (k *kinds) ServerGroupsWithContext(ctx context.Context) (*metav1.APIGroupList, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.FakeDiscovery.ServerGroupsWithContext(ctx)
}

func (k *kinds) ServerResourcesForGroupVersionWithContext(ctx context.Context, version string) (*metav1.APIResourceList, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.FakeDiscovery.ServerResourcesForGroupVersionWithContext(ctx, version)
}

// withKinds is a client whose API server can be changed while it is asked.
type withKinds struct {
	*fake.Clientset
	kinds *kinds
}

var _ Client = withKinds{}

func (c withKinds) Kinds() Kinds { return c.kinds }

func (c withKinds) Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList] {
	return c.CoreV1().Namespaces()
}

func (c withKinds) Nodes() Objects[*corev1.Node, *corev1.NodeList] { return c.CoreV1().Nodes() }

func (c withKinds) Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList] {
	return c.CoreV1().Pods(namespace)
}

func (c withKinds) Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList] {
	return c.CoreV1().Services(namespace)
}

func (c withKinds) ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList] {
	return c.CoreV1().ConfigMaps(namespace)
}

func (c withKinds) EndpointSlices(namespace string) Objects[*discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList] {
	return c.DiscoveryV1().EndpointSlices(namespace)
}

func (c withKinds) Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList] {
	return c.CoordinationV1().Leases(namespace)
}

func (c withKinds) Events(namespace string) Objects[*eventsv1.Event, *eventsv1.EventList] {
	return c.EventsV1().Events(namespace)
}

func (r *rig) install() {
	r.kinds.set(&metav1.APIResourceList{
		GroupVersion: "security.istio.io/v1",
		APIResources: []metav1.APIResource{
			{Name: "authorizationpolicies", Kind: "AuthorizationPolicy"}, {Name: "peerauthentications", Kind: "PeerAuthentication"},
		},
	})
	r.answers("authorizationpolicies", nil)
	r.answers("peerauthentications", nil)
}

// uninstall takes the policies' kinds off the cluster.
func (r *rig) uninstall() {
	r.kinds.set()
	for _, resource := range []string{"authorizationpolicies", "peerauthentications"} {
		r.answers(resource, apierrors.NewGenericServerResponse(404, "get", schema.GroupResource{}, "", "", 0, true))
	}
}

// run starts a source; the one before, if any, is stopped.
func (r *rig) run() {
	r.t.Helper()
	r.stop()
	source, err := New(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	source.pace = r.pace
	r.source, r.store = source, new(dataplane.Store)
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := source.Run(ctx, r.store); err != nil {
			r.t.Error(err)
		}
	})
	parts.Go(func() {
		if err := source.Report(ctx); err != nil {
			r.t.Error(err)
		}
	})
	r.stop = func() {
		cancel()
		parts.Wait()
		r.stop = func() {}
	}
}

func (r *rig) snapshot() *dataplane.Snapshot {
	s, _ := r.store.Load()
	return s
}

// until waits for a snapshot of which ok is true.
func (r *rig) until(what string, ok func(*dataplane.Snapshot) bool) *dataplane.Snapshot {
	r.t.Helper()
	var found *dataplane.Snapshot
	r.eventually(what, func() bool {
		found = r.snapshot()
		return found != nil && ok(found)
	})
	return found
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: not within %v; problems: %v; log:\n%s", what, patience, r.source.Problems(), r.log)
		}
	}
}

// always looks for a while whether ok stays true.
func (r *rig) always(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(calm); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if !ok() {
			r.t.Fatalf("%s: not any more; problems: %v; log:\n%s", what, r.source.Problems(), r.log)
		}
	}
}

// problem waits for one that says so.
func (r *rig) problem(text string) {
	r.t.Helper()
	r.eventually("a problem of "+text, func() bool { return r.has(text) })
}

func (r *rig) has(text string) bool {
	for _, p := range r.source.Problems() {
		if strings.Contains(p.String(), text) {
			return true
		}
	}
	return false
}

func (r *rig) create(o runtime.Object) {
	r.t.Helper()
	if u, ok := o.(*unstructured.Unstructured); ok {
		kind := object.Kind(u.GetKind())
		if err := r.dynamic.Tracker().Create(policyResource(kind), u, u.GetNamespace()); err != nil {
			r.t.Fatal(err)
		}
		return
	}
	if err := r.client.Tracker().Add(o); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) updatePod(p *corev1.Pod) {
	r.t.Helper()
	if err := r.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("pods"), p, p.Namespace); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) deletePod(name string) {
	r.t.Helper()
	r.gone("pods")
	if err := r.client.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("pods"), "shop", name); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) deletePolicy(name string) {
	r.t.Helper()
	r.gone("authorizationpolicies")
	if err := r.dynamic.Tracker().Delete(policyResource(object.KindAuthorizationPolicy), "shop", name); err != nil {
		r.t.Fatal(err)
	}
}

// pod is the pod as the API server has it.
func (r *rig) pod(name string) *corev1.Pod {
	r.t.Helper()
	o, err := r.client.Tracker().Get(corev1.SchemeGroupVersion.WithResource("pods"), "shop", name)
	if err != nil {
		r.t.Fatal(err)
	}
	return o.(*corev1.Pod).DeepCopy()
}

// annotated reports whether the API server has the pod as captured.
func (r *rig) annotated(name string) bool {
	return r.pod(name).Annotations[dataplane.RedirectionAnnotation] == dataplane.RedirectionEnabled
}

func workload(s *dataplane.Snapshot, name string) dataplane.Workload {
	if w := s.WorkloadNamed(dataplane.Name{Namespace: "shop", Name: name}); w != nil {
		return *w
	}
	return dataplane.Workload{}
}

func captured(name string) func(*dataplane.Snapshot) bool {
	return func(s *dataplane.Snapshot) bool { return workload(s, name).Captured }
}

func policies(n int) func(*dataplane.Snapshot) bool {
	return func(s *dataplane.Snapshot) bool { return len(s.AuthorizationPolicies()) == n }
}

func shop() *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}}}
}

// running is a pod of namespace shop.
func running(name, node, addr string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID("uid-" + name),
			CreationTimestamp: metav1.Unix(1_800_000_000, 0),
		},
		Spec:   corev1.PodSpec{NodeName: node},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: addr}}},
	}
}

func withAnnotation(p *corev1.Pod, on bool) *corev1.Pod {
	delete(p.Annotations, dataplane.RedirectionAnnotation)
	if on {
		p.Annotations = map[string]string{dataplane.RedirectionAnnotation: dataplane.RedirectionEnabled}
	}
	return p
}

// authorization is a policy of namespace shop with that spec, which is JSON.
func authorization(t *testing.T, name, spec string) *unstructured.Unstructured {
	t.Helper()
	var in any
	if err := json.Unmarshal([]byte(spec), &in); err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": map[string]any{"namespace": "shop", "name": name, "uid": "uid-" + name, "generation": int64(1)},
		"spec":     in,
	}}
	return u
}

func meshConfig(released string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: "raceway-system", Name: "raceway"},
		Data:       map[string]string{"released": released},
	}
}
