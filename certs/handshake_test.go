package certs_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

const (
	td      = "cluster.local"
	foreign = "far.example"
)

var (
	web = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "web"}
	db  = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "db"}
)

// shake runs a handshake between the two and a byte from the server, without which a TLS 1.3
// client does not learn that its certificate was refused. The connection is gone afterwards.
func shake(t *testing.T, client, server *tls.Config) (clientState, serverState tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	a, b := connect(t)
	c, s := tls.Client(a, client), tls.Server(b, server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if serverErr = s.Handshake(); serverErr == nil {
			_, serverErr = s.Write([]byte{1})
		}
		serverState = s.ConnectionState()
		_ = b.CloseWrite()
	}()
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	clientState = c.ConnectionState()
	_ = a.CloseWrite()
	<-done // neither closes first: a reset would overtake the other's alert
	return clientState, serverState, clientErr, serverErr
}

// connect returns both ends of a loopback connection. Unlike a net.Pipe it takes what nobody
// reads, as when both sides give up at once.
func connect(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialed, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	client, server = dialed.(*net.TCPConn), accepted.(*net.TCPConn)
	for _, conn := range []*net.TCPConn{client, server} {
		t.Cleanup(func() { _ = conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return client, server
}

func clientTLS(t *testing.T, k *certs.Keeper, self spiffe.ID, peers ...spiffe.ID) *tls.Config {
	t.Helper()
	config, err := k.ClientTLS(self, peers)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func TestTunnelHandshakeIsAsPeersExpect(t *testing.T) {
	k := certstest.New(t, td).Keeper(t, web, db)
	server := k.ServerTLS(db)
	var hello *tls.ClientHelloInfo
	getCertificate := server.GetCertificate
	server.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		hello = h
		return getCertificate(h)
	}
	c, s, clientErr, serverErr := shake(t, clientTLS(t, k, web, db), server)
	if err := errors.Join(clientErr, serverErr); err != nil {
		t.Fatal(err)
	}
	if id, err := certs.PeerIdentity(c); err != nil || id != db {
		t.Errorf("client sees %v, %v", id, err)
	}
	if id, err := certs.PeerIdentity(s); err != nil || id != web {
		t.Errorf("server sees %v, %v", id, err)
	}
	if hello.ServerName != "" {
		t.Errorf("client sent SNI %q", hello.ServerName)
	}
	if len(hello.SupportedProtos) != 1 || hello.SupportedProtos[0] != "h2" {
		t.Errorf("client offers ALPN %q", hello.SupportedProtos)
	}
	if len(hello.SupportedVersions) != 1 || hello.SupportedVersions[0] != tls.VersionTLS13 {
		t.Errorf("client offers versions %x", hello.SupportedVersions)
	}
	want := []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}
	if len(hello.SupportedCurves) != len(want) || hello.SupportedCurves[0] != want[0] || hello.SupportedCurves[1] != want[1] || hello.SupportedCurves[2] != want[2] {
		t.Errorf("client offers key exchanges %v, want %v", hello.SupportedCurves, want)
	}
	if c.CurveID != tls.X25519MLKEM768 || c.NegotiatedProtocol != "h2" || c.Version != tls.VersionTLS13 {
		t.Errorf("negotiated %v, %q, %x", c.CurveID, c.NegotiatedProtocol, c.Version)
	}
	if c.DidResume || len(s.PeerCertificates) != 1 {
		t.Errorf("resumed %v, client sent %d certificates, want only its leaf", c.DidResume, len(s.PeerCertificates))
	}
}

func TestClientPresentsItsCertificateWhateverCAsTheServerLists(t *testing.T) {
	k := certstest.New(t, td).Keeper(t, web, db)
	server := k.ServerTLS(db)
	server.ClientCAs = x509.NewCertPool() // what CertificateRequest lists
	server.ClientCAs.AddCert(certstest.New(t, foreign).Root)
	if _, _, clientErr, serverErr := shake(t, clientTLS(t, k, web, db), server); clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
}

// peerCase is a certificate that one side presents and the other judges.
type peerCase struct {
	name  string
	by    func(w *world) *certstest.Authority // nil: the mesh's own
	leaf  func() *x509.Certificate
	none  bool // present no certificate
	cause certs.Cause
	text  string // part of the error
}

type world struct {
	own, far, alien *certstest.Authority // alien is trusted by nobody
}

func leafFor(uri string, edits ...func(*x509.Certificate)) func() *x509.Certificate {
	return func() *x509.Certificate {
		c := certstest.Leaf(uri)
		for _, edit := range edits {
			edit(c)
		}
		return c
	}
}

// peerCases are judged alike by client and server, who expect the identity db.
func peerCases() []peerCase {
	usage := func(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = u }
	}
	return []peerCase{
		{name: "correct", leaf: leafFor(db.String())},
		{name: "no extended key usage", leaf: leafFor(db.String(), usage())},
		{name: "two URI SANs", leaf: func() *x509.Certificate { return certstest.Leaf(db.String(), web.String()) }, cause: certs.CauseURISAN, text: "this one has 2"},
		{name: "no SAN", leaf: func() *x509.Certificate { return certstest.Leaf() }, cause: certs.CauseURISAN, text: "this one has 0"},
		{name: "only a DNS SAN", leaf: func() *x509.Certificate {
			c := certstest.Leaf()
			c.DNSNames = []string{"db.shop.svc"}
			return c
		}, cause: certs.CauseURISAN, text: "this one has 0"},
		{name: "a URI that is no workload", leaf: leafFor("spiffe://cluster.local/host/x"), cause: certs.CauseURISAN, text: "spiffe://cluster.local/host/x"},
		{name: "unknown trust domain", leaf: leafFor("spiffe://nowhere.example/ns/shop/sa/db"), cause: certs.CauseTrustDomain, text: "nowhere.example is neither"},
		{name: "unknown authority", by: func(w *world) *certstest.Authority { return w.alien }, leaf: leafFor(db.String()), cause: certs.CauseUntrusted, text: "trust roots may differ"},
		{name: "own authority names the federated domain", leaf: leafFor("spiffe://far.example/ns/shop/sa/db"), cause: certs.CauseUntrusted, text: "root of trust domain far.example"},
		{name: "federated authority names the own domain", by: func(w *world) *certstest.Authority { return w.far }, leaf: leafFor(db.String()), cause: certs.CauseUntrusted, text: "root of trust domain cluster.local"},
		{name: "expired", leaf: leafFor(db.String(), func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
		}), cause: certs.CauseExpired, text: "expired at"},
		{name: "not yet valid", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), cause: certs.CauseNotYetValid, text: "compare the clocks"},
		{name: "for signing code", leaf: leafFor(db.String(), usage(x509.ExtKeyUsageCodeSigning)), cause: certs.CauseUsage, text: "extended key usage"},
		{name: "a CA", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.IsCA = true }), cause: certs.CauseUsage, text: "signing certificate"},
		{name: "may sign certificates", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), cause: certs.CauseUsage, text: "signing certificate"},
	}
}

func newWorld(t *testing.T) (*world, *certs.Keeper) {
	w := &world{own: certstest.New(t, td), far: certstest.New(t, foreign), alien: certstest.New(t, td)}
	k := certstest.Run(t, certs.Config{
		Signer: w.own, Roots: certstest.Bundle(t, w.own, w.far), TrustDomain: td,
		Aliases: []string{"old.local"}, Federated: []string{foreign},
	}, web, db)
	return w, k
}

// rawTLS presents a case's certificate and checks nothing.
func (p peerCase) rawTLS(t *testing.T, w *world) *tls.Config {
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert}
	if p.none {
		return config
	}
	authority := w.own
	if p.by != nil {
		authority = p.by(w)
	}
	cert := authority.Issue(t, p.leaf())
	config.Certificates = []tls.Certificate{cert}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	return config
}

func (p peerCase) judge(t *testing.T, err error) {
	t.Helper()
	if p.cause == "" {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	if err == nil {
		t.Fatal("accepted")
	}
	if got := certs.CauseOf(err); got != p.cause || !strings.Contains(err.Error(), p.text) {
		t.Errorf("cause %q, error %q; want cause %q and %q", got, err, p.cause, p.text)
	}
}

func TestServerJudgesClients(t *testing.T) {
	w, k := newWorld(t)
	cases := append(peerCases(),
		peerCase{name: "another identity", leaf: leafFor(web.String())},
		peerCase{name: "alias", leaf: leafFor("spiffe://old.local/ns/shop/sa/db")},
		peerCase{name: "federated", by: func(w *world) *certstest.Authority { return w.far }, leaf: leafFor("spiffe://far.example/ns/shop/sa/db")},
		peerCase{name: "alias signed by the federated authority", by: func(w *world) *certstest.Authority { return w.far }, leaf: leafFor("spiffe://old.local/ns/shop/sa/db"), cause: certs.CauseUntrusted, text: "old.local"},
		peerCase{name: "client certificate only", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })},
		peerCase{name: "server certificate only", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), cause: certs.CauseUsage, text: "extended key usage"},
		peerCase{name: "no certificate", none: true, cause: certs.CauseNoCertificate, text: "client didn't provide a certificate"},
	)
	for _, p := range cases {
		t.Run(p.name, func(t *testing.T) {
			_, _, clientErr, serverErr := shake(t, p.rawTLS(t, w), k.ServerTLS(db))
			p.judge(t, serverErr)
			if p.cause != "" && certs.CauseOf(clientErr) != certs.CauseRejected {
				t.Errorf("client's error %v is of cause %q", clientErr, certs.CauseOf(clientErr))
			}
		})
	}
}

func TestClientJudgesServers(t *testing.T) {
	w, k := newWorld(t)
	farDB := spiffe.ID{TrustDomain: foreign, Namespace: "shop", ServiceAccount: "db"}
	cases := append(peerCases(),
		peerCase{name: "wrong identity", leaf: leafFor(web.String()), cause: certs.CauseWrongIdentity, text: "peer spiffe://cluster.local/ns/shop/sa/web refused: expected spiffe://cluster.local/ns/shop/sa/db"},
		peerCase{name: "same name in an alias of the trust domain", leaf: leafFor("spiffe://old.local/ns/shop/sa/db")},
		peerCase{name: "other name in an alias of the trust domain", leaf: leafFor("spiffe://old.local/ns/shop/sa/web"), cause: certs.CauseWrongIdentity, text: "expected"},
		peerCase{name: "same name in the federated domain", by: func(w *world) *certstest.Authority { return w.far }, leaf: leafFor(farDB.String()), cause: certs.CauseWrongIdentity, text: "expected"},
		peerCase{name: "server certificate only", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })},
		peerCase{name: "client certificate only", leaf: leafFor(db.String(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), cause: certs.CauseUsage, text: "extended key usage"},
	)
	for _, p := range cases {
		t.Run(p.name, func(t *testing.T) {
			_, _, clientErr, serverErr := shake(t, clientTLS(t, k, web, db), p.rawTLS(t, w))
			p.judge(t, clientErr)
			if p.cause != "" && serverErr == nil {
				t.Error("the server was not told")
			}
		})
	}
	t.Run("one of several expected", func(t *testing.T) {
		p := peerCase{by: func(w *world) *certstest.Authority { return w.far }, leaf: leafFor(farDB.String())}
		_, _, clientErr, _ := shake(t, clientTLS(t, k, web, db, farDB), p.rawTLS(t, w))
		p.judge(t, clientErr)
	})
	t.Run("nobody expected", func(t *testing.T) {
		p := peerCase{leaf: leafFor(db.String()), cause: certs.CauseWrongIdentity, text: "expected nobody"}
		_, _, clientErr, _ := shake(t, clientTLS(t, k, web), p.rawTLS(t, w))
		p.judge(t, clientErr)
	})
}

func TestPeersWithoutH2OrTLS13AreRefused(t *testing.T) {
	w, k := newWorld(t)
	plain := peerCase{leaf: leafFor(db.String())}
	for _, tt := range []struct {
		name  string
		edit  func(*tls.Config)
		cause certs.Cause
	}{
		{"no ALPN", func(c *tls.Config) { c.NextProtos = nil }, certs.CauseALPN},
		{"another protocol", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, certs.CauseALPN},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, certs.CauseOther},
		{"P-384 only", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }, certs.CauseOther},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := plain.rawTLS(t, w)
			tt.edit(config)
			_, _, _, serverErr := shake(t, config, k.ServerTLS(db))
			if serverErr == nil || certs.CauseOf(serverErr) != tt.cause {
				t.Errorf("server's error %v is of cause %q, want %q", serverErr, certs.CauseOf(serverErr), tt.cause)
			}
			if _, _, clientErr, _ := shake(t, clientTLS(t, k, web, db), config); clientErr == nil {
				t.Error("client accepted")
			}
		})
	}
}

func TestWithoutACertificateNoHandshakeSucceedsAndTheReasonIsNamed(t *testing.T) {
	a := certstest.New(t, td)
	k := a.Keeper(t, web)
	other := spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "cache"}
	var missing *certs.NoCertificateError
	if _, err := k.ClientTLS(other, []spiffe.ID{web}); !errors.As(err, &missing) || missing.Identity != other {
		t.Errorf("ClientTLS of an unwanted identity: %v", err)
	}
	_, _, clientErr, serverErr := shake(t, clientTLS(t, k, web, other), k.ServerTLS(other))
	if !errors.As(serverErr, &missing) || certs.CauseOf(serverErr) != certs.CauseOwnCertificate {
		t.Errorf("server's error is %v", serverErr)
	}
	if certs.CauseOf(clientErr) != certs.CauseRejected {
		t.Errorf("client's error is %v", clientErr)
	}
	// A configuration made earlier does not outlive what it presents.
	config := clientTLS(t, k, web, other)
	k.Forget(web)
	k.Want(other)
	if err := k.Ready(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if _, _, clientErr, _ = shake(t, config, k.ServerTLS(other)); !errors.As(clientErr, &missing) || missing.Identity != web {
		t.Errorf("client's error after Forget is %v", clientErr)
	}
}

func TestPercentEncodedIdentityIsNotTheDecodedOne(t *testing.T) {
	w, k := newWorld(t)
	p := peerCase{leaf: func() *x509.Certificate {
		c := certstest.Leaf()
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: td, Path: "/ns/shop/sa/db", RawPath: "/ns/shop/sa/d%62"}}
		return c
	}, cause: certs.CauseURISAN, text: "'%'"}
	_, _, clientErr, _ := shake(t, clientTLS(t, k, web, db), p.rawTLS(t, w))
	p.judge(t, clientErr)
}
