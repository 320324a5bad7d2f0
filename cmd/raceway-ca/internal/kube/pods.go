package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// pod is what is kept of one: some hundred bytes instead of kilobytes.
type pod struct {
	metav1.ObjectMeta // name, namespace, UID and version only

	node    string
	account string
}

// slim makes a pod of the API's. One that has finished, or is on no node, is kept without a
// node, under which nothing finds it.
func slim(object any) (any, error) {
	p, ok := object.(*corev1.Pod)
	if !ok { // a tombstone, or what went through here before
		return object, nil
	}
	kept := &pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, UID: p.UID, ResourceVersion: p.ResourceVersion},
		account:    p.Spec.ServiceAccountName,
	}
	if live(p) {
		kept.node = p.Spec.NodeName
	}
	return kept, nil
}

// live says that the pod runs or will. One that is being deleted still has connections.
func live(p *corev1.Pod) bool {
	return p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// byPlace and byUID index the pods.
const (
	byPlace = "node and service account"
	byUID   = "UID"
)

func place(node string, account Name) string { return node + " " + account.String() }

func indexers() cache.Indexers {
	return cache.Indexers{
		byPlace: func(object any) ([]string, error) {
			p, ok := object.(*pod)
			if !ok || p.node == "" || p.account == "" {
				return nil, nil
			}
			return []string{place(p.node, Name{p.Namespace, p.account})}, nil
		},
		byUID: func(object any) ([]string, error) {
			p, ok := object.(*pod)
			if !ok {
				return nil, nil
			}
			return []string{string(p.UID)}, nil
		},
	}
}

// pods knows which service accounts have pods on which node: from a watch, and where that
// lags behind from the API server itself.
type pods struct {
	client   kubernetes.Interface
	informer cache.SharedIndexInformer

	mu      sync.Mutex
	lookups map[string]*rate.Limiter // by node: as many as reviewed callers have named
}

func newPods(client kubernetes.Interface, log *slog.Logger) (*pods, error) {
	factory := informers.NewSharedInformerFactory(client, 0)
	p := &pods{client: client, informer: factory.Core().V1().Pods().Informer(), lookups: map[string]*rate.Limiter{}}
	return p, errors.Join(
		p.informer.SetTransform(slim),
		p.informer.AddIndexers(indexers()),
		p.informer.SetWatchErrorHandlerWithContext(logWatch(log, "pods")),
	)
}

// logWatch says what goes wrong with a watch; the informer tries again by itself.
func logWatch(log *slog.Logger, what string) cache.WatchErrorHandlerWithContext {
	return func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
			log.Warn("watch ended, trying again", "what", what, "error", err)
		}
	}
}

func (p *pods) run(ctx context.Context) { p.informer.RunWithContext(ctx) }

var errNotSynced = errors.New("the cluster's pods have not been read yet")

func (p *pods) ready() error {
	if !p.informer.HasSynced() {
		return errNotSynced
	}
	return nil
}

// has reports whether a live pod of the account is on the node.
func (p *pods) has(ctx context.Context, node string, account Name) (bool, error) {
	if err := p.ready(); err != nil {
		return false, err
	}
	if node == "" { // also where pods are that are not scheduled yet
		return false, nil
	}
	known, err := p.informer.GetIndexer().IndexKeys(byPlace, place(node, account))
	if err != nil || len(known) > 0 {
		return len(known) > 0, err
	}
	// The pod may have been bound to the node a moment ago.
	if !p.mayLookUp(node) {
		return false, fmt.Errorf("no pod of service account %s is known on that node, and it asked for too many of that kind to look again", account)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	list, err := p.client.CoreV1().Pods(account.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("spec.nodeName", node).String(),
	})
	if err != nil {
		return false, fmt.Errorf("list pods of the node: %w", err)
	}
	for i := range list.Items {
		// The node is compared here too: an answer to another question grants nothing.
		if found := &list.Items[i]; found.Spec.NodeName == node && found.Namespace == account.Namespace && found.Spec.ServiceAccountName == account.Name && live(found) {
			return true, nil
		}
	}
	return false, nil
}

// Of each node, as many look-ups as pods start on it in a burst, then a few.
const (
	lookupRate  = 2
	lookupBurst = 50
)

func (p *pods) mayLookUp(node string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lookups[node]
	if l == nil {
		l = rate.NewLimiter(lookupRate, lookupBurst)
		p.lookups[node] = l
	}
	return l.Allow()
}

// nodeOf returns where a pod is, as the watch has it; "" when it does not know.
func (p *pods) nodeOf(uid string) string {
	found, err := p.informer.GetIndexer().ByIndex(byUID, uid)
	if err != nil || len(found) != 1 {
		return ""
	}
	one, ok := found[0].(*pod)
	if !ok {
		return ""
	}
	return one.node
}

// look asks the API server where the pod of that name, UID and service account is; "" when
// there is none, or it is on no node.
func (p *pods) look(ctx context.Context, name Name, uid, account string) (string, error) {
	found, err := p.client.CoreV1().Pods(name.Namespace).Get(ctx, name.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("get pod %s: %w", name, err)
	case string(found.UID) != uid || found.Spec.ServiceAccountName != account || !live(found):
		return "", nil
	}
	return found.Spec.NodeName, nil
}
