package kube

import (
	"context"
	"fmt"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

// Client is what the agent asks an API server for, policies aside. client-go's clientset has
// all of it and everything else: every kind of every API group, with the schemas of all,
// would be half of the agent's program and a third of its memory on each node.
type Client interface {
	Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList]
	Nodes() Objects[*corev1.Node, *corev1.NodeList]
	Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList]
	Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList]
	ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList]
	EndpointSlices(namespace string) Objects[*discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList]
	Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList]
	Events(namespace string) Objects[*eventsv1.Event, *eventsv1.EventList]
	Kinds() Kinds
}

// Objects are those of one kind, in one namespace or in all. The typed clients of client-go
// have these methods.
type Objects[T, L runtime.Object] interface {
	Get(ctx context.Context, name string, options metav1.GetOptions) (T, error)
	List(ctx context.Context, options metav1.ListOptions) (L, error)
	Watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error)
	Create(ctx context.Context, object T, options metav1.CreateOptions) (T, error)
	Update(ctx context.Context, object T, options metav1.UpdateOptions) (T, error)
	Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, options metav1.PatchOptions, subresources ...string) (T, error)
}

// Kinds tells what kinds an API server has.
type Kinds interface {
	ServerGroupsWithContext(ctx context.Context) (*metav1.APIGroupList, error)
	ServerResourcesForGroupVersionWithContext(ctx context.Context, groupVersion string) (*metav1.APIResourceList, error)
}

// knownKinds are those that Client has; what is not registered cannot be decoded.
func knownKinds() *runtime.Scheme {
	scheme := runtime.NewScheme()
	for version, kinds := range map[schema.GroupVersion][]runtime.Object{
		corev1.SchemeGroupVersion: {
			new(corev1.Namespace), new(corev1.NamespaceList), new(corev1.Node), new(corev1.NodeList), new(corev1.Pod), new(corev1.PodList),
			new(corev1.Service), new(corev1.ServiceList), new(corev1.ConfigMap), new(corev1.ConfigMapList),
		},
		discoveryv1.SchemeGroupVersion:    {new(discoveryv1.EndpointSlice), new(discoveryv1.EndpointSliceList)},
		coordinationv1.SchemeGroupVersion: {new(coordinationv1.Lease), new(coordinationv1.LeaseList)},
		eventsv1.SchemeGroupVersion:       {new(eventsv1.Event), new(eventsv1.EventList)},
	} {
		scheme.AddKnownTypes(version, kinds...)
		metav1.AddToGroupVersion(scheme, version)
	}
	return scheme
}

func codecs(scheme *runtime.Scheme) runtime.NegotiatedSerializer {
	return serializer.NewCodecFactory(scheme).WithoutConversion()
}

// server is a Client by REST.
type server struct {
	core, discovery, coordination, events *rest.RESTClient
	options                               runtime.ParameterCodec
}

func newServer(config *rest.Config) (*server, error) {
	scheme := knownKinds()
	s := &server{options: runtime.NewParameterCodec(scheme)}
	// All kinds together ask so often at most.
	config = rest.CopyConfig(config)
	config.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(config.QPS, config.Burst)
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	for version, client := range map[schema.GroupVersion]**rest.RESTClient{
		corev1.SchemeGroupVersion: &s.core, discoveryv1.SchemeGroupVersion: &s.discovery,
		coordinationv1.SchemeGroupVersion: &s.coordination, eventsv1.SchemeGroupVersion: &s.events,
	} {
		of := rest.CopyConfig(config)
		of.APIPath, of.GroupVersion = "/apis", &version
		if version.Group == "" {
			of.APIPath = "/api"
		}
		of.NegotiatedSerializer = codecs(scheme)
		if *client, err = rest.RESTClientForConfigAndClient(of, transport); err != nil {
			return nil, fmt.Errorf("client for %s: %w", version, err)
		}
	}
	return s, nil
}

// Namespaces implements Client, as the other methods do.
func (s *server) Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList] {
	return &objects[corev1.Namespace, corev1.NamespaceList, *corev1.Namespace, *corev1.NamespaceList]{s.core, s.options, "namespaces", ""}
}

func (s *server) Nodes() Objects[*corev1.Node, *corev1.NodeList] {
	return &objects[corev1.Node, corev1.NodeList, *corev1.Node, *corev1.NodeList]{s.core, s.options, "nodes", ""}
}

func (s *server) Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList] {
	return &objects[corev1.Pod, corev1.PodList, *corev1.Pod, *corev1.PodList]{s.core, s.options, "pods", namespace}
}

func (s *server) Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList] {
	return &objects[corev1.Service, corev1.ServiceList, *corev1.Service, *corev1.ServiceList]{s.core, s.options, "services", namespace}
}

func (s *server) ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList] {
	return &objects[corev1.ConfigMap, corev1.ConfigMapList, *corev1.ConfigMap, *corev1.ConfigMapList]{s.core, s.options, "configmaps", namespace}
}

func (s *server) EndpointSlices(namespace string) Objects[*discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList] {
	return &objects[discoveryv1.EndpointSlice, discoveryv1.EndpointSliceList, *discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList]{
		s.discovery, s.options, "endpointslices", namespace,
	}
}

func (s *server) Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList] {
	return &objects[coordinationv1.Lease, coordinationv1.LeaseList, *coordinationv1.Lease, *coordinationv1.LeaseList]{
		s.coordination, s.options, "leases", namespace,
	}
}

func (s *server) Events(namespace string) Objects[*eventsv1.Event, *eventsv1.EventList] {
	return &objects[eventsv1.Event, eventsv1.EventList, *eventsv1.Event, *eventsv1.EventList]{s.events, s.options, "events", namespace}
}

func (s *server) Kinds() Kinds { return s }

func (s *server) ServerGroupsWithContext(ctx context.Context) (*metav1.APIGroupList, error) {
	groups := new(metav1.APIGroupList)
	return groups, s.core.Get().AbsPath("/apis").Do(ctx).Into(groups)
}

func (s *server) ServerResourcesForGroupVersionWithContext(ctx context.Context, groupVersion string) (*metav1.APIResourceList, error) {
	resources := new(metav1.APIResourceList)
	return resources, s.core.Get().AbsPath("/apis", groupVersion).Do(ctx).Into(resources)
}
