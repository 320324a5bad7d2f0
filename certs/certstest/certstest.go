// Package certstest is an authority in memory for tests: it signs what it is told to, also
// what no real one would, and answers a Keeper.
package certstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Authority signs for one trust domain, and is a certs.Signer for every identity.
type Authority struct {
	TrustDomain string
	Root        *x509.Certificate
	Issuer      *x509.Certificate // of leaves: Root, or an intermediate under it
	key         *ecdsa.PrivateKey // of Issuer

	mu       sync.Mutex
	err      error
	edit     func(*x509.Certificate)
	requests int
}

// New makes the root of a trust domain.
func New(t testing.TB, trustDomain string) *Authority {
	t.Helper()
	key := NewKey(t)
	template := authority(trustDomain, "Root CA")
	a := &Authority{TrustDomain: trustDomain, key: key}
	a.Root = a.sign(t, template, template, &key.PublicKey)
	a.Issuer = a.Root
	return a
}

// Intermediate makes an authority under the same root that signs with a key of its own.
func (a *Authority) Intermediate(t testing.TB) *Authority {
	t.Helper()
	key := NewKey(t)
	issuer := a.sign(t, authority(a.TrustDomain, "Intermediate CA"), a.Issuer, &key.PublicKey)
	return &Authority{TrustDomain: a.TrustDomain, Root: a.Root, Issuer: issuer, key: key}
}

func authority(trustDomain, name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{trustDomain}, CommonName: name},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(10 * 365 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// NewKey makes a P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Bundle is the roots of the given authorities; those of one trust domain are all accepted.
func Bundle(t testing.TB, authorities ...*Authority) *certs.Bundle {
	t.Helper()
	roots := map[string][]*x509.Certificate{}
	for _, a := range authorities {
		roots[a.TrustDomain] = append(roots[a.TrustDomain], a.Root)
	}
	bundle, err := certs.NewBundle(roots)
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

// Leaf is the template of a correct workload certificate for uris, to be made wrong by a test.
func Leaf(uris ...string) *x509.Certificate {
	now := time.Now()
	c := &x509.Certificate{
		NotBefore:             now.Add(-2 * time.Minute),
		NotAfter:              now.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			panic(err) // a test's own literal
		}
		c.URIs = append(c.URIs, parsed)
	}
	return c
}

// Issue signs template as it is, over a new key.
func (a *Authority) Issue(t testing.TB, template *x509.Certificate) tls.Certificate {
	t.Helper()
	key := NewKey(t)
	leaf := a.sign(t, template, a.Issuer, &key.PublicKey)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// CRL is a revocation list in PEM that revokes the given certificates.
func (a *Authority) CRL(t testing.TB, revoked ...*x509.Certificate) []byte {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(time.Now().UnixNano()), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.Issuer, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

func (a *Authority) sign(t testing.TB, template, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// FailWith makes every later Sign fail with err, until it is called with nil.
func (a *Authority) FailWith(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

// Edit changes every later leaf before it is signed.
func (a *Authority) Edit(edit func(leaf *x509.Certificate)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.edit = edit
}

// Requests is how often Sign was called.
func (a *Authority) Requests() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests
}

// Sign implements certs.Signer.
func (a *Authority) Sign(ctx context.Context, id spiffe.ID, csrPEM []byte, ttl time.Duration) ([][]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests++
	if err := errors.Join(ctx.Err(), a.err); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(csrPEM)
	if block == nil {
		return nil, errors.New("the request is not PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	template := Leaf(id.String())
	template.NotAfter = time.Now().Add(ttl)
	if a.edit != nil {
		a.edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Issuer, csr.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	chain := [][]byte{PEM(der)}
	if a.Issuer != a.Root {
		chain = append(chain, PEM(a.Issuer.Raw))
	}
	return append(chain, PEM(a.Root.Raw)), nil
}

// PEM encodes one certificate.
func PEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// Keeper runs, until the test ends, a Keeper of the authority's trust domain that trusts it
// alone, and waits until ids have certificates.
func (a *Authority) Keeper(t testing.TB, ids ...spiffe.ID) *certs.Keeper {
	t.Helper()
	return Run(t, certs.Config{Signer: a, Roots: Bundle(t, a), TrustDomain: a.TrustDomain}, ids...)
}

// Run runs, until the test ends, a Keeper of cfg, and waits until ids have certificates.
func Run(t testing.TB, cfg certs.Config, ids ...spiffe.ID) *certs.Keeper {
	t.Helper()
	k, err := certs.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, id := range ids {
		k.Want(id)
		if err := k.Ready(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	return k
}
