package kube

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// objectOf is a pointer to T that is an object.
type objectOf[T any] interface {
	*T
	runtime.Object
}

// objects are Objects by REST, as client-go's typed clients ask for them.
type objects[T, L any, PT objectOf[T], PL objectOf[L]] struct {
	client    *rest.RESTClient
	options   runtime.ParameterCodec
	resource  string
	namespace string // "" is all of them, or that the kind has none
}

// at is a request about the resource.
func (o *objects[T, L, PT, PL]) at(verb string, options runtime.Object) *rest.Request {
	return o.client.Verb(verb).NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource).VersionedParams(options, o.options)
}

func (o *objects[T, L, PT, PL]) object(ctx context.Context, r *rest.Request) (PT, error) {
	out := PT(new(T))
	if err := r.Do(ctx).Into(out); err != nil {
		return nil, err
	}
	return out, nil
}

func (o *objects[T, L, PT, PL]) Get(ctx context.Context, name string, options metav1.GetOptions) (PT, error) {
	return o.object(ctx, o.at("GET", &options).Name(name))
}

func (o *objects[T, L, PT, PL]) List(ctx context.Context, options metav1.ListOptions) (PL, error) {
	out := PL(new(L))
	if err := o.at("GET", &options).Timeout(timeout(options)).Do(ctx).Into(out); err != nil {
		return nil, err
	}
	return out, nil
}

func (o *objects[T, L, PT, PL]) Watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	options.Watch = true
	return o.at("GET", &options).Timeout(timeout(options)).Watch(ctx)
}

func timeout(options metav1.ListOptions) time.Duration {
	if options.TimeoutSeconds == nil {
		return 0
	}
	return time.Duration(*options.TimeoutSeconds) * time.Second
}

func (o *objects[T, L, PT, PL]) Create(ctx context.Context, object PT, options metav1.CreateOptions) (PT, error) {
	return o.object(ctx, o.at("POST", &options).Body(object))
}

func (o *objects[T, L, PT, PL]) Update(ctx context.Context, object PT, options metav1.UpdateOptions) (PT, error) {
	m, err := meta.Accessor(object)
	if err != nil {
		return nil, err
	}
	return o.object(ctx, o.at("PUT", &options).Name(m.GetName()).Body(object))
}

func (o *objects[T, L, PT, PL]) Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, options metav1.PatchOptions, subresources ...string) (PT, error) {
	r := o.client.Patch(kind).NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource)
	return o.object(ctx, r.Name(name).SubResource(subresources...).VersionedParams(&options, o.options).Body(patch))
}
