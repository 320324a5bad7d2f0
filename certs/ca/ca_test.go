package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const td = "cluster.local"

var web = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "web"}

func open(t *testing.T, dir string, cfg Config) *Authority {
	t.Helper()
	a, err := try(t, dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func try(t *testing.T, dir string, cfg Config) (*Authority, error) {
	t.Helper()
	source, err := NewDir(dir, Root{TrustDomain: td})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = source.Close() })
	cfg.Source, cfg.TrustDomain = source, td
	return New(cfg)
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func sign(t *testing.T, a *Authority, ttl time.Duration) (Issued, []*x509.Certificate) {
	t.Helper()
	issued, err := a.Sign(request(t, p256(t), &x509.CertificateRequest{}), web, ttl)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := certs.ParseCertificates(bytes.Join(issued.Chain, nil))
	if err != nil {
		t.Fatal(err)
	}
	return issued, chain
}

func write(t *testing.T, name string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

// authority is a CA certificate with its key, as an operator would bring.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t *testing.T, name string, parent *authority, life time.Duration) *authority {
	t.Helper()
	key := p256(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	signer := &authority{template, key}
	if parent != nil {
		signer = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, key.Public(), signer.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) keyPEM(t *testing.T) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// install writes the files of Istio's cacerts.
func install(t *testing.T, dir string, signer *authority, chain []byte, roots ...*authority) {
	t.Helper()
	var bundle []byte
	for _, r := range roots {
		bundle = append(bundle, encode(r.cert)...)
	}
	write(t, filepath.Join(dir, KeyFile), signer.keyPEM(t), 0o600)
	write(t, filepath.Join(dir, CertFile), encode(signer.cert), 0o644)
	write(t, filepath.Join(dir, RootFile), bundle, 0o644)
	write(t, filepath.Join(dir, ChainFile), chain, 0o644)
}

func TestLeafIsAnX509SVID(t *testing.T) {
	a := open(t, t.TempDir(), Config{})
	// All that a request may try to smuggle in is left behind.
	uri, _ := url.Parse("spiffe://cluster.local/ns/kube-system/sa/admin")
	ca, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	key := p256(t)
	issued, err := a.Sign(request(t, key, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin"}, URIs: []*url.URL{uri}, DNSNames: []string{"kubernetes.default"}, IPAddresses: []net.IP{{10, 0, 0, 1}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: ca}},
	}), web, 0)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := certs.ParseCertificates(bytes.Join(issued.Chain, nil))
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	if id, err := spiffe.FromCertificate(leaf); err != nil || id != web {
		t.Errorf("identity %v, %v", id, err)
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Errorf("names %v %v, CA %v", leaf.DNSNames, leaf.IPAddresses, leaf.IsCA)
	}
	if !bytes.Equal(leaf.RawSubject, []byte{0x30, 0}) {
		t.Errorf("subject %q", leaf.Subject)
	}
	critical := false
	for _, e := range leaf.Extensions {
		critical = critical || e.Critical && e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17})
	}
	if !critical {
		t.Error("the SAN is not critical")
	}
	if len(leaf.ExtKeyUsage) != 2 || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("usage %v %v", leaf.ExtKeyUsage, leaf.KeyUsage)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("another key was certified")
	}
	if life := time.Until(leaf.NotAfter); life < 24*time.Hour-time.Minute || life > 24*time.Hour {
		t.Errorf("expires in %s", life)
	}
	if age := time.Since(leaf.NotBefore); age < 2*time.Minute || age > 3*time.Minute {
		t.Errorf("valid since %s", age)
	}
	if leaf.SerialNumber.BitLen() < 64 {
		t.Errorf("serial %x is short", leaf.SerialNumber)
	}
	if _, second := sign(t, a, 0); second[0].SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Error("two certificates have one serial")
	}
}

func TestLifetimeIsClamped(t *testing.T) {
	for _, tt := range []struct {
		name            string
		cfg             Config
		ask, want, life time.Duration
	}{
		{name: "default", want: 24 * time.Hour},
		{name: "shorter", ask: time.Hour, want: time.Hour},
		{name: "longer", ask: 48 * time.Hour, want: 24 * time.Hour},
		{name: "negative", ask: -time.Hour, want: 24 * time.Hour},
		{name: "the longest is shorter than the default", cfg: Config{MaxTTL: 2 * time.Hour}, want: 2 * time.Hour},
		{name: "longer, allowed", cfg: Config{TTL: time.Hour, MaxTTL: 72 * time.Hour}, ask: 48 * time.Hour, want: 48 * time.Hour},
		{name: "not longer than the root", life: 30 * time.Minute, want: 30 * time.Minute},
	} {
		dir := t.TempDir()
		if tt.life > 0 {
			root := newAuthority(t, "root", nil, tt.life)
			install(t, dir, root, nil, root)
		}
		issued, _ := sign(t, open(t, dir, tt.cfg), tt.ask)
		if got := time.Until(issued.NotAfter); got > tt.want || got < tt.want-time.Minute {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestIntermediateBoundsLeavesAndIsSentAlong(t *testing.T) {
	root := newAuthority(t, "root", nil, 1000*time.Hour)
	old := newAuthority(t, "old root", nil, time.Hour)
	upper := newAuthority(t, "upper", root, 2*time.Hour)
	lower := newAuthority(t, "lower", upper, 10*time.Hour)
	dir := t.TempDir()
	install(t, dir, lower, append(encode(lower.cert, upper.cert), encode(root.cert)...), old, root)
	a := open(t, dir, Config{})
	issued, chain := sign(t, a, 0)
	if issued.NotAfter.After(upper.cert.NotAfter) || !a.Expires().Equal(upper.cert.NotAfter) {
		t.Errorf("leaf expires %s, authority %s, the intermediate above it %s", issued.NotAfter, a.Expires(), upper.cert.NotAfter)
	}
	want := []*x509.Certificate{chain[0], lower.cert, upper.cert, old.cert, root.cert}
	if len(chain) != len(want) || len(issued.Chain) != 4 {
		t.Fatalf("%d certificates in %d elements", len(chain), len(issued.Chain))
	}
	for i := range want {
		if !chain[i].Equal(want[i]) {
			t.Errorf("certificate %d is %s, want %s", i, chain[i].Subject, want[i].Subject)
		}
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(root.cert)
	between.AddCert(chain[1])
	between.AddCert(chain[2])
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between}); err != nil {
		t.Error(err)
	}
}

func TestExpiredAuthoritySignsNothing(t *testing.T) {
	a := open(t, t.TempDir(), Config{})
	creds := *a.current.Load()
	creds.notAfter = time.Now().Add(-time.Second)
	a.current.Store(&creds)
	if _, err := a.Sign(request(t, p256(t), &x509.CertificateRequest{}), web, 0); !errors.Is(err, ErrExpired) {
		t.Errorf("error %v", err)
	}
}

func TestRequestsThatCannotBeCertified(t *testing.T) {
	a := open(t, t.TempDir(), Config{})
	good := request(t, p256(t), &x509.CertificateRequest{})
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	for _, tt := range []struct {
		name string
		csr  []byte
		id   spiffe.ID
		text string
	}{
		{"no PEM", []byte("x"), web, "not PEM"},
		{"empty", nil, web, "not PEM"},
		{"a certificate", encode(a.Roots()[0]), web, "not a CERTIFICATE REQUEST"},
		{"two", append(bytes.Clone(good), good...), web, "followed by other data"},
		{"too large", append(bytes.Clone(good), bytes.Repeat([]byte("\n"), maxRequestBytes)...), web, "larger than"},
		{"forged signature", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), web, "signature"},
		{"torn", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged[:50]}), web, "parse"},
		{"Ed25519", request(t, edKey, &x509.CertificateRequest{}), web, "use ECDSA or RSA"},
		{"P-224", request(t, p224, &x509.CertificateRequest{}), web, "use P-256"},
		{"foreign trust domain", good, spiffe.ID{TrustDomain: "far.example", Namespace: "shop", ServiceAccount: "web"}, "not of the trust domain"},
		{"invalid identity", good, spiffe.ID{TrustDomain: td, Namespace: "a/b", ServiceAccount: "web"}, "namespace"},
	} {
		_, err := a.Sign(tt.csr, tt.id, 0)
		var refused *RequestError
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: error %v, want one with %q", tt.name, err, tt.text)
		}
	}
	for bits, ok := range map[int]bool{1024: false, 2047: false, 2048: true, 8192: true, 8193: false} {
		key := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), uint(bits-1)), E: 65537}
		if err := checkKey(key); (err == nil) != ok {
			t.Errorf("RSA of %d bits: %v", bits, err)
		}
	}
}

func TestChangedFilesAreTakenOver(t *testing.T) {
	oldRoot, newRoot := newAuthority(t, "old", nil, time.Hour), newAuthority(t, "new", nil, time.Hour)
	dir := t.TempDir()
	install(t, dir, oldRoot, nil, oldRoot)
	a := open(t, dir, Config{})
	serving, err := a.Serving([]string{"ca.example", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	first, err := serving.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	install(t, dir, oldRoot, nil, oldRoot, newRoot)
	eventually(t, func() bool { return len(a.Roots()) == 2 })
	// A key without its certificate is no authority: the old one stays.
	write(t, filepath.Join(dir, KeyFile), newRoot.keyPEM(t), 0o600)
	time.Sleep(200 * time.Millisecond)
	if _, chain := sign(t, a, 0); chain[0].CheckSignatureFrom(oldRoot.cert) != nil {
		t.Error("half a set of files was taken over")
	}
	install(t, dir, newRoot, nil, oldRoot, newRoot)
	eventually(t, func() bool { return a.current.Load().cert.Equal(newRoot.cert) })
	if _, chain := sign(t, a, 0); chain[0].CheckSignatureFrom(newRoot.cert) != nil || len(chain) != 3 {
		t.Errorf("not signed by the new root, or %d certificates instead of leaf and both roots", len(chain))
	}
	second, err := serving.GetCertificate(nil)
	if err != nil || second.Leaf.Equal(first.Leaf) || second.Leaf.CheckSignatureFrom(newRoot.cert) != nil {
		t.Errorf("serving certificate was not renewed: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 20 s")
		}
	}
}

func TestServingCertificateRenewsItself(t *testing.T) {
	a := open(t, t.TempDir(), Config{})
	if _, err := a.Serving(nil); err == nil {
		t.Error("made one without a name")
	}
	s, err := a.Serving([]string{"ca.example", "::1"})
	if err != nil {
		t.Fatal(err)
	}
	first, _ := s.GetCertificate(nil)
	if again, _ := s.GetCertificate(nil); again != first {
		t.Error("renewed at once")
	}
	if first.Leaf.VerifyHostname("ca.example") != nil || first.Leaf.VerifyHostname("::1") != nil || first.Leaf.VerifyHostname("other") == nil {
		t.Errorf("names %v %v", first.Leaf.DNSNames, first.Leaf.IPAddresses)
	}
	s.renewAt = time.Now()
	if again, _ := s.GetCertificate(nil); again == first {
		t.Error("not renewed past half of its life")
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, tt := range []struct {
		cfg  Config
		text string
	}{
		{Config{TrustDomain: td}, "no source"},
		{Config{Source: &Dir{}, TrustDomain: "UPPER"}, "trust domain"},
		{Config{Source: &Dir{}, TrustDomain: td, TTL: -1}, "negative"},
		{Config{Source: &Dir{}, TrustDomain: td, TTL: 2, MaxTTL: 1}, "longer than"},
	} {
		if err := tt.cfg.Validate(); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%+v: %v", tt.cfg, err)
		}
	}
}

// FuzzRequestedKey checks that whatever is accepted is a key that may be certified.
func FuzzRequestedKey(f *testing.F) {
	f.Add(request(f, p256(f), &x509.CertificateRequest{DNSNames: []string{"a"}}))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := requestedKey(data)
		if err == nil && checkKey(key) != nil {
			t.Fatalf("accepted a key of type %T", key)
		}
	})
}
