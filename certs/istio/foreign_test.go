package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1alpha1"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/ca"
)

// foreign is a CA that is as particular as istiod and istio-csr together. istiod finds the
// cluster by the header clusterid, and takes the identity from the metadata; istio-csr wants
// the request to name just that identity too, and nothing else. Both answer anything that they
// do not like with Unauthenticated, and send each certificate of the chain by itself.
type foreign struct {
	security.UnimplementedIstioCertificateServiceServer

	authority *ca.Authority
	refusal   atomic.Pointer[string]
}

func (f *foreign) refuse(why string) error {
	f.refusal.Store(&why)
	return status.Error(codes.Unauthenticated, "request impersonation authentication failure")
}

func (f *foreign) CreateCertificate(ctx context.Context, r *security.IstioCertificateRequest) (*security.IstioCertificateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	header := func(key string) string { return strings.Join(md.Get(key), "|") }
	asked := r.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
	block, _ := pem.Decode([]byte(r.GetCsr()))
	if block == nil {
		return nil, f.refuse("no request")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	switch {
	case header("authorization") != "Bearer "+tokenA:
		return nil, f.refuse("authorization " + header("authorization"))
	case header("clusterid") != "Kubernetes":
		return nil, f.refuse("clusterid " + header("clusterid"))
	case asked != web.String():
		return nil, f.refuse("asks for " + asked)
	case err != nil || request.CheckSignature() != nil:
		return nil, f.refuse("signature")
	case len(request.URIs) != 1 || request.URIs[0].String() != asked || request.Subject.String() != "" || len(request.Extensions) != 1:
		return nil, f.refuse("the request names something else")
	case r.GetValidityDuration() != 3600:
		return nil, f.refuse("lifetime in another unit than seconds")
	}
	issued, err := f.authority.Sign([]byte(r.GetCsr()), web, time.Hour)
	if err != nil {
		return nil, err
	}
	reply := &security.IstioCertificateResponse{}
	for _, element := range issued.Chain {
		for block, rest := pem.Decode(element); block != nil; block, rest = pem.Decode(rest) {
			reply.CertChain = append(reply.CertChain, string(pem.EncodeToMemory(block)))
		}
	}
	return reply, nil
}

func TestKeeperIsServedByIstiodAndIstioCSR(t *testing.T) {
	dir := t.TempDir()
	f := &foreign{authority: authorityIn(t, dir)}
	serving, err := f.authority.Serving([]string{"istiod.istio-system.svc"})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: serving.GetCertificate})))
	security.RegisterIstioCertificateServiceServer(server, f)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	defer func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	tokenFile, rootFile := filepath.Join(t.TempDir(), "token"), filepath.Join(dir, ca.RootFile)
	put(t, tokenFile, tokenA+"\n")
	client := func(cluster string) *Client {
		c, err := NewClient(ClientConfig{Address: l.Addr().String(), ServerName: "istiod.istio-system.svc", RootFile: rootFile, TokenFile: tokenFile, Cluster: cluster})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	roots, err := certs.NewFileRoots(rootFile, td, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = roots.Close() }()
	keeper, err := certs.New(certs.Config{Signer: client(""), Roots: roots, TrustDomain: td, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	runs(t, keeper.Run)
	keeper.Want(web)
	if err := keeper.Ready(limit(t), web); err != nil {
		why := ""
		if refusal := f.refusal.Load(); refusal != nil {
			why = *refusal
		}
		t.Fatalf("%v, because: %s", err, why)
	}
	// What such a CA does not say, the error must.
	if _, err := client("other").Sign(limit(t), web, csr(t), time.Hour); code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "trusted node account") {
		t.Errorf("refused: %v", err)
	}
}

// TestRootsOfAConfigMapAreFollowed mounts roots as Kubernetes does and swaps them.
func TestRootsOfAConfigMapAreFollowed(t *testing.T) {
	dir := t.TempDir()
	publish := func(generation string, a *ca.Authority) {
		t.Helper()
		text, _ := a.Bundle()
		if err := os.Mkdir(filepath.Join(dir, generation), 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, generation, ca.RootFile), string(text))
		if err := os.Symlink(generation, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	first, second := authorityIn(t, t.TempDir()), authorityIn(t, t.TempDir())
	publish("..1", first)
	if err := os.Symlink(filepath.Join("..data", ca.RootFile), filepath.Join(dir, ca.RootFile)); err != nil {
		t.Fatal(err)
	}
	var checks []func()
	for name, path := range map[string]string{"the file": filepath.Join(dir, ca.RootFile), "the directory": dir} {
		roots, err := certs.NewFileRoots(path, td, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(func() { _ = roots.Close() })
		runs(t, roots.Run)
		bundle, changed := roots.Load()
		if !bundle.Roots(td)[0].Equal(first.Roots()[0]) {
			t.Fatalf("%s: other roots", name)
		}
		checks = append(checks, func() {
			select {
			case <-changed:
			case <-time.After(20 * time.Second): // the sweep would notice after 30
				t.Errorf("%s: not noticed", name)
				return
			}
			if bundle, _ := roots.Load(); !bundle.Roots(td)[0].Equal(second.Roots()[0]) {
				t.Errorf("%s: not the new roots", name)
			}
		})
	}
	publish("..2", second)
	for _, check := range checks {
		check()
	}
}
