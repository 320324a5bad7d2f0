package kube

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// kindMeshConfig is the one ConfigMap that is watched; it is in no Set.
const kindMeshConfig object.Kind = "ConfigMap"

// policyGroup is the API group of the policies.
const policyGroup = "security.istio.io"

// policyResource is where policies of that kind are.
func policyResource(kind object.Kind) schema.GroupVersionResource {
	resource := "authorizationpolicies"
	if kind == object.KindPeerAuthentication {
		resource = "peerauthentications"
	}
	return schema.GroupVersionResource{Group: policyGroup, Version: "v1", Resource: resource}
}

// resource is a kind that is watched.
type resource struct {
	kind   object.Kind
	client any // which knows whether it can stream lists
	list   func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch  func(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// lister is what every typed client has.
type lister[L runtime.Object] interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

func typed[L runtime.Object](kind object.Kind, client lister[L], among any) resource {
	return resource{
		kind: kind, client: among, watch: client.Watch,
		list: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			list, err := client.List(ctx, options)
			if err != nil {
				return nil, err // and no typed nil beside it
			}
			return list, nil
		},
	}
}

func (s *Source) resources() []resource {
	c := s.config.Client
	list := []resource{
		typed(object.KindNamespace, c.Namespaces(), c),
		typed(object.KindNode, c.Nodes(), c),
		typed(object.KindPod, c.Pods(metav1.NamespaceAll), c),
		typed(object.KindService, c.Services(metav1.NamespaceAll), c),
		typed(object.KindEndpointSlice, c.EndpointSlices(metav1.NamespaceAll), c),
		s.policies(object.KindAuthorizationPolicy),
		s.policies(object.KindPeerAuthentication),
	}
	if s.config.MeshConfig != (dataplane.Name{}) {
		list = append(list, s.meshConfig())
	}
	return list
}

// meshConfig watches that one object: the agent may read no other.
func (s *Source) meshConfig() resource {
	r := typed(kindMeshConfig, s.config.Client.ConfigMaps(s.config.MeshConfig.Namespace), s.config.Client)
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, s.config.MeshConfig.Name).String()
	list, watches := r.list, r.watch
	r.list = func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		options.FieldSelector = only
		return list(ctx, options)
	}
	r.watch = func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
		options.FieldSelector = only
		return watches(ctx, options)
	}
	return r
}

// policies watches a kind that the cluster may not have, or not yet: then there are none.
func (s *Source) policies(kind object.Kind) resource {
	client := s.config.Dynamic.Resource(policyResource(kind))
	r := typed[*unstructured.UnstructuredList](kind, anyPolicy{client}, s.config.Dynamic)
	list, watches := r.list, r.watch
	var absent atomic.Bool // as the last list showed
	r.list = func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		out, err := list(ctx, options)
		absent.Store(false)
		if apierrors.IsNotFound(err) {
			if err := s.proveAbsent(ctx, kind, err); err != nil {
				return nil, err
			}
			empty := new(unstructured.UnstructuredList)
			empty.SetAPIVersion(policyGroup + "/v1")
			empty.SetKind(string(kind) + "List")
			absent.Store(true)
			return empty, nil
		}
		return out, err
	}
	r.watch = func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
		if absent.CompareAndSwap(true, false) {
			return nothing(ctx, s.pace.absent), nil
		}
		return watches(ctx, options)
	}
	return r
}

// nothing is a watch that shows nothing and ends after a while.
func nothing(ctx context.Context, d time.Duration) watch.Interface {
	ctx, cancel := context.WithTimeout(ctx, d)
	w := idle{make(chan watch.Event), cancel}
	context.AfterFunc(ctx, func() { close(w.events) })
	return w
}

type idle struct {
	events chan watch.Event
	cancel context.CancelFunc
}

func (w idle) ResultChan() <-chan watch.Event { return w.events }

func (w idle) Stop() { w.cancel() }

// anyPolicy drops the subresources from the methods of a dynamic client.
type anyPolicy struct {
	client dynamic.ResourceInterface
}

func (a anyPolicy) List(ctx context.Context, options metav1.ListOptions) (*unstructured.UnstructuredList, error) {
	return a.client.List(ctx, options)
}

func (a anyPolicy) Watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	return a.client.Watch(ctx, options)
}

// proveAbsent asks a second witness before the policies of a kind are held for gone: an
// answer of 404 alone may come from whatever stands before the API server.
func (s *Source) proveAbsent(ctx context.Context, kind object.Kind, answer error) error {
	groups, err := s.config.Client.Kinds().ServerGroupsWithContext(ctx)
	if err != nil {
		return fmt.Errorf("%w; and the API server does not say which kinds it has: %w", answer, err)
	}
	for _, g := range groups.Groups {
		if g.Name != policyGroup {
			continue
		}
		for _, v := range g.Versions {
			if err := s.proveWithout(ctx, kind, v.GroupVersion); err != nil {
				return fmt.Errorf("%w, yet %w", answer, err)
			}
		}
	}
	for _, g := range groups.Groups {
		if g.Name == discoveryv1.GroupName {
			return nil
		}
	}
	return fmt.Errorf("%w from what does not look like an API server", answer)
}

// proveWithout looks for a kind of policies in one version of their group. Of policies that
// are there in another version than v1 alone, nothing would be known.
func (s *Source) proveWithout(ctx context.Context, kind object.Kind, version string) error {
	list, err := s.config.Client.Kinds().ServerResourcesForGroupVersionWithContext(ctx, version)
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("the API server does not say which kinds it has: %w", err)
	}
	for _, r := range list.APIResources {
		if r.Kind == string(kind) {
			return fmt.Errorf("the API server has that kind in %s", version)
		}
	}
	return nil
}

var errNoAnswer = errors.New("no answer in time, or half of one")

// errHidden hides what kind of error the stream of a list could not be started for: for one
// that it tries again after, a reflector waits deaf to the end of its context.
type errHidden struct{ message string }

func (e errHidden) Error() string { return e.message }

// errResume is taken by a reflector for a refused connection: it goes on from where it was,
// when it can, and does not have all nodes list the whole cluster because the API server was
// started anew.
type errResume struct{ error }

func (e errResume) Unwrap() error { return syscall.ECONNREFUSED }

func isAnswer(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status)
}

// startAnswer reports whether an API server that is starting has that answer for everybody.
func startAnswer(err error) bool {
	return apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err) || apierrors.IsInternalError(err) || apierrors.IsServiceUnavailable(err)
}

// listWatch reports how each request goes to health.
func (s *Source) listWatch(r resource) cache.ListerWatcher {
	var refused time.Time // since when watches are; zero: they are not
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			out, err := r.list(ctx, options)
			s.heard(ctx, r.kind, err)
			return out, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			w, err := r.watch(ctx, options)
			if err == nil && reflect.TypeOf(w) == reflect.TypeOf(watch.NewEmptyWatch()) {
				err = errNoAnswer // client-go makes that of timeouts
			}
			streams := options.SendInitialEvents != nil
			if !isAnswer(err) || !streams && !(r.kind.IsPolicy() && apierrors.IsNotFound(err)) {
				s.heard(ctx, r.kind, err)
			} // else the list that follows tells what it means
			switch {
			case err == nil:
				refused = time.Time{}
				return w, nil
			case streams && (!isAnswer(err) || apierrors.IsTooManyRequests(err)):
				return nil, errHidden{err.Error()}
			case streams:
				return nil, err
			case !isAnswer(err):
				return nil, errResume{err}
			case startAnswer(err):
				if refused.IsZero() {
					refused = time.Now()
				}
				if time.Since(refused) < s.pace.starting {
					return nil, errResume{err}
				}
			}
			return nil, err
		},
	}, r.client)
}

// reflect keeps the source up to date with one kind until ctx ends.
func (s *Source) reflect(ctx context.Context, r resource) {
	cache.NewReflectorWithOptions(s.listWatch(r), nil, &feed{source: s, kind: r.kind}, cache.ReflectorOptions{
		Name: "raceway " + string(r.kind), TypeDescription: string(r.kind),
		Backoff: &wait.Backoff{Duration: s.pace.retry, Cap: s.pace.retryMax, Steps: 10, Factor: 2, Jitter: 1},
	}).RunWithContext(ctx)
}

// feed takes in what a reflector has of one kind.
type feed struct {
	source *Source
	kind   object.Kind
}

var _ cache.TransformingStore = (*feed)(nil)

// Transformer converts objects as they come, so that a long list is never held as a whole.
func (f *feed) Transformer() cache.TransformFunc {
	return func(in any) (any, error) { return f.convert(in), nil }
}

func (f *feed) convert(in any) *item {
	if it, done := in.(*item); done {
		return it
	}
	return convert(f.kind, in)
}

// Add takes in one object.
func (f *feed) Add(in any) error {
	f.source.take(f.convert(in))
	return nil
}

// Update takes in one object.
func (f *feed) Update(in any) error { return f.Add(in) }

// Delete forgets one object.
func (f *feed) Delete(in any) error {
	m, err := meta.Accessor(in)
	if err != nil {
		return err
	}
	f.source.drop(keyOf(f.kind, m), string(m.GetUID()))
	return nil
}

// Replace takes in all objects of the kind.
func (f *feed) Replace(list []any, _ string) error {
	items := make([]*item, 0, len(list))
	for _, in := range list {
		items = append(items, f.convert(in))
	}
	f.source.replace(f.kind, items)
	return nil
}

// Resync has nothing to do.
func (f *feed) Resync() error { return nil }

// item is one object as it came in.
type item struct {
	key       object.Key
	object    object.Object
	fault     string // why there is no object
	uid       string
	created   time.Time
	annotated mark // what a pod is published as
	running   bool // a container of a pod has started
	policy    *policy
	released  bool // the mesh config says so
}

// GetObjectMeta lets a reflector keep items in a store.
func (i *item) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: i.key.Name.Namespace, Name: i.key.Name.Name}
}

func keyOf(kind object.Kind, m metav1.Object) object.Key {
	return object.Key{Kind: kind, Name: dataplane.Name{Namespace: m.GetNamespace(), Name: m.GetName()}}
}

func convert(kind object.Kind, in any) *item {
	m, err := meta.Accessor(in)
	if err != nil {
		return &item{key: object.Key{Kind: kind}, fault: err.Error()}
	}
	out := &item{key: keyOf(kind, m), uid: string(m.GetUID()), created: m.GetCreationTimestamp().Time}
	switch in := in.(type) {
	case *corev1.Namespace:
		out.object, err = object.FromNamespace(in)
	case *corev1.Node:
		out.object, err = object.FromNode(in)
	case *corev1.Pod:
		err = out.pod(in)
	case *corev1.Service:
		out.object, err = object.FromService(in)
	case *discoveryv1.EndpointSlice:
		out.object, err = object.FromEndpointSlice(in)
	case *unstructured.Unstructured:
		err = out.readPolicy(in)
	case *corev1.ConfigMap:
		out.released = strings.TrimSpace(in.Data[releasedKey]) == "true"
	default:
		err = fmt.Errorf("a %T came among objects of kind %s", in, kind)
	}
	if err != nil {
		out.fault = err.Error()
	}
	return out
}

// pod reads a pod. Whoever may annotate one does not get to say where its network is.
func (i *item) pod(in *corev1.Pod) (err error) {
	trimmed := *in
	trimmed.Annotations = nil
	if clear, ok := in.Annotations[dataplane.UDPClearAnnotation]; ok {
		trimmed.Annotations = map[string]string{dataplane.UDPClearAnnotation: clear}
	}
	if in.Annotations[corev1.MirrorPodAnnotationKey] != "" {
		trimmed.Annotations = make(map[string]string, len(in.Annotations))
		for k, v := range in.Annotations {
			if k != dataplane.NetNSAnnotation {
				trimmed.Annotations[k] = v
			}
		}
	}
	i.object, err = object.FromPod(&trimmed)
	i.annotated = markOf(in.Annotations)
	for _, list := range [][]corev1.ContainerStatus{in.Status.InitContainerStatuses, in.Status.ContainerStatuses} {
		for j := range list {
			i.running = i.running || list[j].State.Running != nil
		}
	}
	return err
}
