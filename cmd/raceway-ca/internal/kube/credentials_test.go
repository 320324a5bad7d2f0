package kube

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/ca"
)

func material(t *testing.T) ca.Material {
	t.Helper()
	m, err := ca.Root{TrustDomain: td}.Make()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func newObject(data map[string][]byte) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: secretName.Namespace, Name: secretName.Name}, Data: data}
}

// cacerts is a Secret as Istio's, that signs with m and trusts the roots of others too.
func cacerts(m ca.Material, others ...ca.Material) map[string][]byte {
	roots := m.Roots.PEM
	for _, o := range others {
		roots = append(append([]byte(nil), o.Roots.PEM...), roots...)
	}
	return map[string][]byte{ca.KeyFile: m.Key.PEM, ca.CertFile: m.Cert.PEM, ca.RootFile: roots, ca.ChainFile: {}}
}

func credentials(t *testing.T, c *Cluster) ca.Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	source, err := c.Credentials(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return source
}

func authority(t *testing.T, source ca.Source) *ca.Authority {
	t.Helper()
	a, err := ca.New(ca.Config{Source: source, TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestReplicasThatStartAtOnceAgreeOnARoot(t *testing.T) {
	client := fake.NewClientset()
	// Both look before either has made it.
	var both sync.WaitGroup
	both.Add(2)
	var first sync.Map
	roots := make([]*x509.Certificate, 2)
	var group sync.WaitGroup
	for i := range roots {
		replica := fake.NewClientset()
		replica.PrependReactor("*", "secrets", func(action clienttesting.Action) (bool, runtime.Object, error) {
			object, err := client.Invokes(action, &corev1.Secret{})
			if _, seen := first.LoadOrStore(i, true); !seen {
				both.Done()
				both.Wait()
			}
			return true, object, err
		})
		group.Go(func() {
			c := newCluster(t, replica, nil)
			source, err := c.Credentials(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			a, err := ca.New(ca.Config{Source: source, TrustDomain: td})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = a.Roots()[0]
		})
	}
	group.Wait()
	if t.Failed() || !roots[0].Equal(roots[1]) {
		t.Fatal("two replicas made different roots")
	}
	creates := 0
	for _, action := range client.Actions() {
		if action.GetVerb() == "create" {
			creates++
		}
	}
	if creates != 2 {
		t.Errorf("%d replicas tried to create the secret: the race was not run", creates)
	}
	made, err := client.CoreV1().Secrets(secretName.Namespace).Get(t.Context(), secretName.Name, metav1.GetOptions{})
	if err != nil || made.Labels["app.kubernetes.io/component"] != "ca" || len(made.Data) != 4 {
		t.Errorf("%v, %v", made, err)
	}
}

func TestCredentialsAreWaitedFor(t *testing.T) {
	s := newServer()
	c := newCluster(t, s.Clientset, func(cfg *Config) { cfg.Generate = false })
	go func() {
		time.Sleep(100 * time.Millisecond)
		if err := s.Tracker().Add(newObject(cacerts(material(t)))); err != nil {
			t.Error(err)
		}
	}()
	authority(t, credentials(t, c))
	for _, action := range s.Actions() {
		if action.GetVerb() != "get" {
			t.Errorf("%s of %s, where nothing is to be made", action.GetVerb(), action.GetResource().Resource)
		}
	}

	away := newServer()
	away.PrependReactor("*", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errAway })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := newCluster(t, away.Clientset, nil).Credentials(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("API server away: %v", err)
	}
}

func TestLayoutsOfSecrets(t *testing.T) {
	m, old := material(t), material(t)
	manager := func(edit func(map[string][]byte)) map[string][]byte {
		data := map[string][]byte{tlsKey: m.Key.PEM, tlsCert: m.Cert.PEM, tlsRoot: m.Roots.PEM}
		if edit != nil {
			edit(data)
		}
		return data
	}
	for _, tt := range []struct {
		name  string
		data  map[string][]byte
		roots int
		text  string
	}{
		{"Istio's", cacerts(m), 1, ""},
		{"Istio's without a chain", map[string][]byte{ca.KeyFile: m.Key.PEM, ca.CertFile: m.Cert.PEM, ca.RootFile: m.Roots.PEM}, 1, ""},
		{"cert-manager's", manager(nil), 1, ""},
		{"cert-manager's, with the old root beside it", manager(func(d map[string][]byte) { d[ca.RootFile] = old.Roots.PEM }), 2, ""},
		{"cert-manager's, with its own root beside it", manager(func(d map[string][]byte) { d[ca.RootFile] = m.Roots.PEM }), 1, ""},
		{"cert-manager's without a root", manager(func(d map[string][]byte) { delete(d, tlsRoot) }), 0, tlsRoot + ": no PEM"},
		{"cert-manager's of another key", manager(func(d map[string][]byte) { d[tlsKey] = old.Key.PEM }), 0, tlsCert + ": it is not the certificate of the key in " + tlsKey},
		{"both", manager(func(d map[string][]byte) { d[ca.KeyFile] = m.Key.PEM }), 0, "as well as"},
		{"neither", map[string][]byte{"x": nil}, 0, "neither"},
		{"empty", nil, 0, "neither"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			found, err := layout(tt.data)
			if err == nil {
				var a *ca.Authority
				if a, err = ca.New(ca.Config{Source: fixed(found), TrustDomain: td}); err == nil && len(a.Roots()) != tt.roots {
					t.Errorf("%d roots, want %d", len(a.Roots()), tt.roots)
				}
			}
			if (err == nil) != (tt.text == "") || err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want %q", err, tt.text)
			}
		})
	}
}

// fixed is a ca.Source that never changes.
type fixed ca.Material

func (f fixed) Load() (ca.Material, error)                  { return ca.Material(f), nil }
func (fixed) Run(ctx context.Context, changed func()) error { return nil }
func (fixed) Close() error                                  { return nil }
func (fixed) String() string                                { return "test" }

func published(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	found, err := client.CoreV1().ConfigMaps(bundleName.Namespace).Get(t.Context(), bundleName.Name, metav1.GetOptions{})
	if err != nil {
		return ""
	}
	return found.Data[ca.RootFile]
}

func TestRootIsRotatedWithoutARestart(t *testing.T) {
	oldRoot, newRoot := material(t), material(t)
	client := newServer(newObject(cacerts(oldRoot))).Clientset
	c := newCluster(t, client, nil)
	a := authority(t, credentials(t, c))
	runs(t, a.Run)
	runs(t, func(ctx context.Context) error { return c.Publish(ctx, a) })
	update := func(data map[string][]byte) {
		t.Helper()
		if _, err := client.CoreV1().Secrets(secretName.Namespace).Update(t.Context(), newObject(data), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	signer := func() *x509.Certificate {
		t.Helper()
		serving, err := a.Serving([]string{"ca.example"})
		if err != nil {
			t.Fatal(err)
		}
		cert, err := serving.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range []ca.Material{oldRoot, newRoot} {
			root, err := certs.ParseCertificates(r.Cert.PEM)
			if err != nil {
				t.Fatal(err)
			}
			if cert.Leaf.CheckSignatureFrom(root[0]) == nil {
				return root[0]
			}
		}
		return nil
	}
	first := signer()
	// Both roots are trusted before the new one signs.
	eventually(t, "the old root is published", func() bool { return published(t, client) == string(oldRoot.Roots.PEM) })
	update(cacerts(oldRoot, newRoot))
	eventually(t, "both roots are published", func() bool { return strings.Count(published(t, client), "BEGIN") == 2 })
	if !signer().Equal(first) {
		t.Error("the new root signs before it was told to")
	}
	update(map[string][]byte{ca.KeyFile: newRoot.Key.PEM}) // torn
	time.Sleep(100 * time.Millisecond)
	if !signer().Equal(first) || len(a.Roots()) != 2 {
		t.Error("half a secret was taken over")
	}
	update(cacerts(newRoot, oldRoot))
	eventually(t, "the new root signs", func() bool { return !signer().Equal(first) })
	if len(a.Roots()) != 2 {
		t.Error("the old root is not trusted any more")
	}
	update(cacerts(newRoot))
	eventually(t, "the old root is gone", func() bool { return published(t, client) == string(newRoot.Roots.PEM) })
	// A secret that is taken away takes nothing with it.
	if err := client.CoreV1().Secrets(secretName.Namespace).Delete(t.Context(), secretName.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if signer() == nil || len(a.Roots()) != 1 {
		t.Error("nothing is signed after the secret was deleted")
	}
}

// roots are published as they are.
type roots struct{ pem string }

func (r roots) Bundle() ([]byte, <-chan struct{}) { return []byte(r.pem), nil }

func TestPublishedRootsAreRepaired(t *testing.T) {
	client := newServer().Clientset
	want := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}))
	for range 2 { // replicas
		c := newCluster(t, client, nil)
		runs(t, func(ctx context.Context) error { return c.Publish(ctx, roots{want}) })
	}
	maps := client.CoreV1().ConfigMaps(bundleName.Namespace)
	eventually(t, "made", func() bool { return published(t, client) == want })
	found, err := maps.Get(t.Context(), bundleName.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	found.Data = map[string]string{ca.RootFile: "forged", "other": "kept"}
	if _, err := maps.Update(t.Context(), found, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "put right", func() bool { return published(t, client) == want })
	if found, err = maps.Get(t.Context(), bundleName.Name, metav1.GetOptions{}); err != nil || found.Data["other"] != "kept" {
		t.Errorf("%v, %v", found.Data, err)
	}
	if err := maps.Delete(t.Context(), bundleName.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "put back", func() bool { return published(t, client) == want })
	// In step, nobody writes.
	time.Sleep(bundleSettle + 200*time.Millisecond)
	client.ClearActions()
	time.Sleep(2 * bundleSettle)
	for _, action := range client.Actions() {
		if verb := action.GetVerb(); verb != "get" {
			t.Errorf("%s of a configmap that is right", verb)
		}
	}
}

func TestRootsThatCannotBePublishedAreTriedAgain(t *testing.T) {
	client := newServer().Clientset
	var mu sync.Mutex
	down := errAway
	client.PrependReactor("create", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		return down != nil, nil, down
	})
	told := make(chan error, 100)
	c := newCluster(t, client, func(cfg *Config) { cfg.OnBundle = func(err error) { told <- err } })
	runs(t, func(ctx context.Context) error { return c.Publish(ctx, roots{"pem"}) })
	if err := <-told; !errors.Is(err, errAway) {
		t.Errorf("told %v", err)
	}
	mu.Lock()
	down = nil
	mu.Unlock()
	eventually(t, "published", func() bool { return published(t, client) == "pem" })
}
