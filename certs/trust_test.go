package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// replace writes a file as editors and Kubernetes do.
func replace(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name+".tmp", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".tmp", name); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for what a file's change brings about.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// runs runs f until the test ends.
func runs(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func fileRoots(t *testing.T, path string) *certs.FileRoots {
	t.Helper()
	roots, err := certs.NewFileRoots(path, td, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = roots.Close() })
	runs(t, roots.Run)
	return roots
}

// node is one node of a mesh whose root is being rotated.
type node struct {
	id     spiffe.ID
	file   string
	ca     *swap
	keeper *certs.Keeper
}

// swap is a CA whose root is replaced.
type swap struct{ authorities chan *certstest.Authority }

func (s *swap) Sign(ctx context.Context, id spiffe.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	a := <-s.authorities
	defer func() { s.authorities <- a }()
	return a.Sign(ctx, id, csr, ttl)
}

func (s *swap) to(a *certstest.Authority) {
	<-s.authorities
	s.authorities <- a
}

func newNode(t *testing.T, id spiffe.ID, a *certstest.Authority) *node {
	n := &node{id: id, file: filepath.Join(t.TempDir(), "root-cert.pem"), ca: &swap{authorities: make(chan *certstest.Authority, 1)}}
	n.ca.authorities <- a
	replace(t, n.file, certstest.PEM(a.Root.Raw))
	n.keeper = certstest.Run(t, certs.Config{Signer: n.ca, Roots: fileRoots(t, n.file), TrustDomain: td}, id)
	return n
}

// trusts writes a node's roots and waits until they are in force.
func (n *node) trusts(t *testing.T, authorities ...*certstest.Authority) {
	t.Helper()
	changed := n.keeper.Changed()
	var data []byte
	for _, a := range authorities {
		data = append(data, certstest.PEM(a.Root.Raw)...)
	}
	replace(t, n.file, data)
	select {
	case <-changed:
	case <-time.After(20 * time.Second):
		t.Fatal("the change of roots was not told")
	}
}

func (n *node) serial(t *testing.T) string { return only(t, n.keeper).Serial }

func TestRootRotationInterruptsNobody(t *testing.T) {
	oldRoot, newRoot := certstest.New(t, td), certstest.New(t, td)
	a, b := newNode(t, web, oldRoot), newNode(t, db, oldRoot)
	talk := func(step string) {
		t.Helper()
		for _, pair := range [][2]*node{{a, b}, {b, a}} {
			client, server := pair[0], pair[1]
			if _, _, clientErr, serverErr := shake(t, clientTLS(t, client.keeper, client.id, server.id), server.keeper.ServerTLS(server.id)); clientErr != nil || serverErr != nil {
				t.Errorf("%s: %s to %s: client %v, server %v", step, client.id, server.id, clientErr, serverErr)
			}
		}
	}
	talk("old root")
	first := a.serial(t)
	a.trusts(t, oldRoot, newRoot)
	talk("one node has both roots")
	b.trusts(t, newRoot, oldRoot)
	talk("both nodes have both roots")
	if a.serial(t) != first {
		t.Error("a new root alone replaced a certificate that is still trusted")
	}
	a.ca.to(newRoot)
	b.ca.to(newRoot)
	a.keeper.Forget(web) // the next refresh, brought forward
	a.keeper.Want(web)
	if err := a.keeper.Ready(t.Context(), web); err != nil {
		t.Fatal(err)
	}
	talk("one node has a certificate of the new root")
	before := b.serial(t)
	b.trusts(t, newRoot)
	eventually(t, "a certificate whose root was removed is replaced at once", func() bool { return b.serial(t) != before })
	talk("one node has only the new root")
	a.trusts(t, newRoot)
	talk("new root")
	if s := only(t, b.keeper); s.LastError != nil {
		t.Errorf("after the rotation: %v", s.LastError)
	}
	// What the old root signed counts no more.
	stray := peerCase{by: func(w *world) *certstest.Authority { return w.own }, leaf: leafFor(db.String()), cause: certs.CauseUntrusted}
	_, _, clientErr, _ := shake(t, clientTLS(t, a.keeper, web, db), stray.rawTLS(t, &world{own: oldRoot}))
	stray.judge(t, clientErr)
}

func TestConnectionsOfARemovedRootAreDistrusted(t *testing.T) {
	oldRoot, newRoot := certstest.New(t, td), certstest.New(t, td)
	a, b := newNode(t, web, oldRoot), newNode(t, db, oldRoot)
	ours, theirs, clientErr, serverErr := shake(t, clientTLS(t, a.keeper, web, db), b.keeper.ServerTLS(db))
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	judge := func(step string, want certs.Cause) {
		t.Helper()
		for side, err := range map[string]error{"as client": a.keeper.Distrusted(ours), "as server": b.keeper.Distrusted(theirs)} {
			if (err == nil) != (want == "") || err != nil && certs.CauseOf(err) != want {
				t.Errorf("%s, %s: %v, want cause %q", step, side, err, want)
			}
		}
	}
	judge("one root", "")
	a.trusts(t, oldRoot, newRoot)
	b.trusts(t, oldRoot, newRoot)
	judge("both roots", "")
	a.trusts(t, newRoot)
	b.trusts(t, newRoot)
	judge("its root is gone", certs.CauseUntrusted)
	if a.keeper.Revoked(ours) != nil {
		t.Error("a root's removal is no revocation")
	}
	if a.keeper.Distrusted(tls.ConnectionState{}) == nil {
		t.Error("a connection without a certificate is trusted")
	}
}

func TestRootsThatDoNotParseLeaveTheLastOnesInForce(t *testing.T) {
	a, other := certstest.New(t, td), certstest.New(t, td)
	name := filepath.Join(t.TempDir(), "root-cert.pem")
	good := certstest.PEM(a.Root.Raw)
	replace(t, name, good)
	roots := fileRoots(t, name)
	leaf := a.Issue(t, certstest.Leaf(web.String()))
	for _, bad := range [][]byte{
		nil,
		[]byte("garbage"),
		certstest.PEM([]byte("garbage")),
		certstest.PEM(leaf.Certificate[0]), // a leaf is no root
		append(slices.Clone(good), "-----BEGIN CERTIFICATE-----\nMII"...),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
	} {
		replace(t, name, bad)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond) // let the watcher see it
	if b, _ := roots.Load(); !slices.EqualFunc(b.Roots(td), []*x509.Certificate{a.Root}, (*x509.Certificate).Equal) {
		t.Errorf("roots in force: %v", b.Roots(td))
	}
	replace(t, name, certstest.PEM(other.Root.Raw))
	eventually(t, "good roots take over", func() bool {
		b, _ := roots.Load()
		return len(b.Roots(td)) == 1 && b.Roots(td)[0].Equal(other.Root)
	})
}

func TestDirectoryOfRootsHoldsOneFileForEachTrustDomain(t *testing.T) {
	a, old, far := certstest.New(t, td), certstest.New(t, td), certstest.New(t, foreign)
	dir := t.TempDir()
	if _, err := certs.NewFileRoots(dir, td, discard()); err == nil || !strings.Contains(err.Error(), "root-cert.pem") {
		t.Errorf("empty directory: %v", err)
	}
	replace(t, filepath.Join(dir, "root-cert.pem"), certstest.PEM(a.Root.Raw))
	replace(t, filepath.Join(dir, td+".pem"), certstest.PEM(old.Root.Raw))
	roots := fileRoots(t, dir)
	if b, _ := roots.Load(); len(b.Roots(td)) != 2 || len(b.TrustDomains()) != 1 {
		t.Errorf("%d own roots of %v", len(b.Roots(td)), b.TrustDomains())
	}
	replace(t, filepath.Join(dir, foreign+".pem"), certstest.PEM(far.Root.Raw))
	eventually(t, "a new trust domain's roots are in force", func() bool {
		b, _ := roots.Load()
		return len(b.Roots(foreign)) == 1
	})
}

func TestMissingFilesAreStartErrors(t *testing.T) {
	name := filepath.Join(t.TempDir(), "none.pem")
	if _, err := certs.NewFileRoots(name, td, discard()); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("roots: %v", err)
	}
	if _, err := certs.NewFileRevocations(name, discard()); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("revocations: %v", err)
	}
}

// revocable is a mesh under a with a file of revocations.
func revocable(t *testing.T, a *certstest.Authority, ids ...spiffe.ID) (k *certs.Keeper, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "crl.pem")
	replace(t, file, nil)
	revocations, err := certs.NewFileRevocations(file, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = revocations.Close() })
	runs(t, revocations.Run)
	k = certstest.Run(t, certs.Config{Signer: a, Roots: certstest.Bundle(t, a), Revocations: revocations, TrustDomain: td}, ids...)
	return k, file
}

func revoke(t *testing.T, k *certs.Keeper, file string, crl []byte) {
	t.Helper()
	changed := k.Changed()
	replace(t, file, crl)
	select {
	case <-changed:
	case <-time.After(20 * time.Second):
		t.Fatal("the revocation was not told")
	}
}

func TestRevocationRefusesNewHandshakesAndNamesLiveConnections(t *testing.T) {
	a := certstest.New(t, td)
	k, file := revocable(t, a, web)
	bad, good := a.Issue(t, certstest.Leaf(db.String())), a.Issue(t, certstest.Leaf(db.String()))
	meet := func(cert tls.Certificate) (tls.ConnectionState, error) {
		state, _, err, _ := shake(t, clientTLS(t, k, web, db), &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert})
		return state, err
	}
	liveBad, err := meet(bad)
	if err != nil {
		t.Fatal(err)
	}
	liveGood, err := meet(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Revoked(liveBad); err != nil {
		t.Fatalf("revoked before the list: %v", err)
	}
	revoke(t, k, file, a.CRL(t, bad.Leaf))
	if err := k.Revoked(liveBad); certs.CauseOf(err) != certs.CauseRevoked || !strings.Contains(err.Error(), db.String()) {
		t.Errorf("live connection: %v", err)
	}
	if err := k.Revoked(liveGood); err != nil {
		t.Errorf("another live connection of the same identity: %v", err)
	}
	if _, err := meet(bad); certs.CauseOf(err) != certs.CauseRevoked {
		t.Errorf("new handshake: %v", err)
	}
	if _, err := meet(good); err != nil {
		t.Errorf("new handshake with another certificate: %v", err)
	}
	if err := k.Revoked(tls.ConnectionState{}); err != nil {
		t.Errorf("connection without a certificate: %v", err)
	}
	// A list that does not parse unrevokes nothing.
	replace(t, file, []byte("garbage"))
	time.Sleep(200 * time.Millisecond)
	if _, err := meet(bad); certs.CauseOf(err) != certs.CauseRevoked {
		t.Errorf("after a damaged list: %v", err)
	}
}

func TestRevokedIntermediateTakesItsLeavesAlong(t *testing.T) {
	root := certstest.New(t, td)
	lower := root.Intermediate(t)
	keeper, file := revocable(t, lower, web, db)
	state, _, clientErr, serverErr := shake(t, clientTLS(t, keeper, web, db), keeper.ServerTLS(db))
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	if n := len(state.PeerCertificates); n != 2 {
		t.Errorf("server sent %d certificates, want its leaf and the intermediate", n)
	}
	if err := keeper.Revoked(state); err != nil {
		t.Fatal(err)
	}
	revoke(t, keeper, file, root.CRL(t, lower.Issuer))
	if err := keeper.Revoked(state); certs.CauseOf(err) != certs.CauseRevoked {
		t.Errorf("live connection: %v", err)
	}
	if _, _, clientErr, _ = shake(t, clientTLS(t, keeper, web, db), keeper.ServerTLS(db)); certs.CauseOf(clientErr) != certs.CauseRevoked && certs.CauseOf(clientErr) != certs.CauseRejected {
		t.Errorf("new handshake: %v", clientErr)
	}
}

func TestListOfAnotherAuthorityRevokesNothing(t *testing.T) {
	a := certstest.New(t, td)
	k, file := revocable(t, a, web)
	cert := a.Issue(t, certstest.Leaf(db.String()))
	// The impostor has the same name and lists the same serial, under another key.
	revoke(t, k, file, certstest.New(t, td).CRL(t, cert.Leaf))
	if _, _, err, _ := shake(t, clientTLS(t, k, web, db), &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert}); err != nil {
		t.Error(err)
	}
}

func TestOwnRevokedCertificateIsReplaced(t *testing.T) {
	a := certstest.New(t, td)
	k, file := revocable(t, a, web)
	config := clientTLS(t, k, web, db)
	cert, err := config.GetClientCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	revoke(t, k, file, a.CRL(t, cert.Leaf))
	eventually(t, "the revoked certificate is replaced", func() bool {
		now, err := config.GetClientCertificate(nil)
		return err == nil && !now.Leaf.Equal(cert.Leaf)
	})
}

func TestRevocationListsInDERAndPEM(t *testing.T) {
	a := certstest.New(t, td)
	leaf := a.Issue(t, certstest.Leaf(web.String())).Leaf
	text := a.CRL(t, leaf)
	block, _ := pem.Decode(text)
	for name, data := range map[string][]byte{"DER": block.Bytes, "PEM": text, "two": append(slices.Clone(text), text...), "empty": nil} {
		if _, err := certs.ParseRevocations(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"garbage": []byte("x"), "a certificate": certstest.PEM(a.Root.Raw), "cut PEM": text[:len(text)-20], "second cut": append(slices.Clone(text), text[:50]...)} {
		if _, err := certs.ParseRevocations(data); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func FuzzParseCertificates(f *testing.F) {
	a := certstest.New(f, td)
	f.Add(certstest.PEM(a.Root.Raw))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		parsed, err := certs.ParseCertificates(data)
		if (err == nil) != (len(parsed) > 0) {
			t.Fatalf("%d certificates and error %v", len(parsed), err)
		}
	})
}

func FuzzParseRevocations(f *testing.F) {
	a := certstest.New(f, td)
	text := a.CRL(f, a.Root)
	block, _ := pem.Decode(text)
	f.Add(text)
	f.Add(block.Bytes)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := certs.ParseRevocations(data)
		if err == nil && r == nil {
			t.Fatal("neither lists nor an error")
		}
	})
}
