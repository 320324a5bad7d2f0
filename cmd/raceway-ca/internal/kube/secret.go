package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/raceway-mesh/raceway/certs/ca"
)

// Names of the parts in the layout of cert-manager's Secrets.
const (
	tlsKey  = corev1.TLSPrivateKeyKey
	tlsCert = corev1.TLSCertKey
	tlsRoot = "ca.crt"
)

// secret is a ca.Source that watches a Secret.
type secret struct {
	client kubernetes.Interface
	name   Name
	log    *slog.Logger

	mu       sync.Mutex
	material ca.Material
	err      error // why there is none in what was seen last
}

// Credentials waits until the Secret is there, or makes it where it may, and returns it as
// the source of the authority. It ends with an error only when ctx does.
func (c *Cluster) Credentials(ctx context.Context) (ca.Source, error) {
	s := &secret{client: c.cfg.Client, name: c.cfg.Secret, log: c.cfg.Log}
	lastErr := ""
	for wait := time.Second / 2; ; wait = min(2*wait, 10*time.Second) {
		err := s.ensure(ctx, c.cfg.Generate, c.cfg.Root)
		if err == nil {
			return s, nil
		}
		if text := err.Error(); text != lastErr && ctx.Err() == nil {
			c.cfg.Log.Error("no credentials yet, trying again", "source", s.String(), "error", err)
			lastErr = text
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// ensure reads the Secret, or creates it. Of two replicas that create it at once one is told
// that it exists already, and reads what the other made.
func (s *secret) ensure(ctx context.Context, generate bool, root ca.Root) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	secrets := s.client.CoreV1().Secrets(s.name.Namespace)
	found, err := secrets.Get(ctx, s.name.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) && generate {
		fresh, makeErr := newSecret(s.name, root)
		if makeErr != nil {
			return fmt.Errorf("make a new root: %w", makeErr)
		}
		found, err = secrets.Create(ctx, fresh, metav1.CreateOptions{FieldManager: fieldManager})
		switch {
		case err == nil:
			s.log.Info("made a new root", "secret", s.name.String())
		case apierrors.IsAlreadyExists(err):
			found, err = secrets.Get(ctx, s.name.Name, metav1.GetOptions{})
		}
	}
	if err != nil {
		return err
	}
	s.take(found)
	_, err = s.Load()
	return err
}

func newSecret(name Name, root ca.Root) (*corev1.Secret, error) {
	m, err := root.Make()
	if err != nil {
		return nil, err
	}
	data := map[string][]byte{m.Chain.Name: {}} // istiod wants the key, also where there is no chain
	for _, p := range []ca.Part{m.Key, m.Cert, m.Roots} {
		data[p.Name] = p.PEM
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name.Name, Namespace: name.Namespace, Labels: labels()},
		Type:       corev1.SecretTypeOpaque,
		Data:       data,
	}, nil
}

func (s *secret) take(found *corev1.Secret) {
	material, err := layout(found.Data)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.material, s.err = material, err
}

// layout finds the parts by their names.
func layout(data map[string][]byte) (ca.Material, error) {
	part := func(name string) ca.Part { return ca.Part{Name: name, PEM: data[name]} }
	_, istioKey := data[ca.KeyFile]
	_, managerKey := data[tlsKey]
	switch {
	case istioKey && managerKey:
		return ca.Material{}, fmt.Errorf("it holds %s as well as %s: take one of them away, so that it is clear which one signs", ca.KeyFile, tlsKey)
	case istioKey:
		return ca.Material{Key: part(ca.KeyFile), Cert: part(ca.CertFile), Chain: part(ca.ChainFile), Roots: part(ca.RootFile)}, nil
	case managerKey:
		// An operator who replaces the root puts others beside cert-manager's own.
		roots := ca.Part{Name: tlsRoot, PEM: bytes.Join([][]byte{data[tlsRoot], data[ca.RootFile]}, []byte("\n"))}
		return ca.Material{Key: part(tlsKey), Cert: part(tlsCert), Chain: ca.Part{Name: tlsCert}, Roots: roots}, nil
	default:
		return ca.Material{}, fmt.Errorf("it holds neither %s (Istio's cacerts) nor %s (cert-manager)", ca.KeyFile, tlsKey)
	}
}

// Load implements ca.Source.
func (s *secret) Load() (ca.Material, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.material, s.err
}

// Run implements ca.Source.
func (s *secret) Run(ctx context.Context, changed func()) error {
	factory := informers.NewSharedInformerFactoryWithOptions(s.client, 0, informers.WithNamespace(s.name.Namespace), informers.WithTweakListOptions(only(s.name)))
	informer := factory.Core().V1().Secrets().Informer()
	see := func(object any) {
		if found, ok := object.(*corev1.Secret); ok && found.Name == s.name.Name {
			s.take(found)
			changed()
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    see,
		UpdateFunc: func(_, object any) { see(object) },
		DeleteFunc: func(any) {
			s.log.Error("the authority's secret was deleted; what was read of it stays in force until this process ends: put it back, or every certificate loses its root at the next start", "secret", s.name.String())
		},
	})
	if err := errors.Join(err, informer.SetWatchErrorHandlerWithContext(logWatch(s.log, s.String()))); err != nil {
		return fmt.Errorf("watch %s: %w", s, err)
	}
	informer.RunWithContext(ctx)
	return nil
}

// Close implements ca.Source: nothing is held beside what Run holds.
func (s *secret) Close() error { return nil }

func (s *secret) String() string { return "secret " + s.name.String() }

// only selects one object: rights on it by name suffice to list and watch it.
func only(name Name) func(*metav1.ListOptions) {
	return func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name.Name).String()
	}
}

// fieldManager is who the API server notes as the writer.
const fieldManager = "raceway-ca"

func labels() map[string]string {
	return map[string]string{
		"app.kubernetes.io/name":       "raceway",
		"app.kubernetes.io/part-of":    "raceway",
		"app.kubernetes.io/component":  "ca",
		"app.kubernetes.io/managed-by": fieldManager,
	}
}
