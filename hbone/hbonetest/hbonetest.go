// Package hbonetest makes what tests of HBONE need: a certificate authority with SPIFFE
// identities, TLS configurations as HBONE wants them, and connected pairs.
package hbonetest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// CA signs certificates of one trust domain.
type CA struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a root.
func NewCA(t testing.TB) *CA {
	t.Helper()
	key := newKey(t)
	cert := sign(t, &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: "hbonetest root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, key, key)
	return &CA{Cert: cert, key: key}
}

// Leaf is what to put into a leaf certificate. The zero value of all but IDs is right.
type Leaf struct {
	IDs       []string // URI SANs
	NotBefore time.Time
	NotAfter  time.Time
	Usage     []x509.ExtKeyUsage
}

// Issue signs a leaf as HBONE wants it: ECDSA P-256, empty subject, the ids as URI SANs in a
// critical extension, client and server authentication.
func (ca *CA) Issue(t testing.TB, l Leaf) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: serial(t), NotBefore: l.NotBefore, NotAfter: l.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: l.Usage, BasicConstraintsValid: true,
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Minute)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	if template.ExtKeyUsage == nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	for _, id := range l.IDs {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	key := newKey(t)
	cert := sign(t, template, ca.Cert, key, ca.key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// Pool holds the root.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return pool
}

// PEM is the root as text.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})
}

// CertPEM and KeyPEM are a leaf as text.
func CertPEM(c tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
}

// KeyPEM is a leaf's private key as text.
func KeyPEM(t testing.TB, c tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// ServerTLS requires a certificate of ca from clients, in TLS 1.3.
func (ca *CA) ServerTLS(t testing.TB, id string) *tls.Config {
	t.Helper()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.Issue(t, Leaf{IDs: []string{id}})},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(), NextProtos: []string{"h2"},
	}
}

// ClientTLS shows a certificate of id and demands one of peer.
func (ca *CA) ClientTLS(t testing.TB, id, peer string) *tls.Config {
	t.Helper()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.Issue(t, Leaf{IDs: []string{id}})},
		InsecureSkipVerify: true, // VerifyConnection does it, for URI SANs
		VerifyConnection:   ca.verify(peer), NextProtos: []string{"h2"},
	}
}

func (ca *CA) verify(peer string) func(tls.ConnectionState) error {
	roots := ca.Pool()
	return func(s tls.ConnectionState) error {
		leaf := s.PeerCertificates[0]
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			return err
		}
		if !slices.ContainsFunc(leaf.URIs, func(u *url.URL) bool { return u.String() == peer }) {
			return fmt.Errorf("%w: want %s, got %v", hbone.ErrWrongIdentity, peer, leaf.URIs)
		}
		return nil
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func sign(t testing.TB, template, parent *x509.Certificate, key *ecdsa.PrivateKey, by crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Identities that tests use.
const (
	ClientID = "spiffe://cluster.local/ns/demo/sa/web"
	ServerID = "spiffe://cluster.local/ns/demo/sa/db"
)

// Handshake turns two ends of a connection into TLS connections whose handshake has
// completed.
func Handshake(t testing.TB, client, server net.Conn, clientTLS, serverTLS *tls.Config) (c, s *tls.Conn) {
	t.Helper()
	c, s = tls.Client(hbone.NewWire(client), clientTLS), tls.Server(hbone.NewWire(server), serverTLS)
	var wg sync.WaitGroup
	var serverErr error
	wg.Go(func() { serverErr = s.HandshakeContext(context.Background()) })
	clientErr := c.HandshakeContext(context.Background())
	wg.Wait()
	if clientErr != nil || serverErr != nil {
		t.Fatalf("handshake: client %v, server %v", clientErr, serverErr)
	}
	return c, s
}

// TCPPair is two ends of a loopback connection.
func TCPPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(); _ = server.Close() })
	return client, server
}
