package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// shortTTL is a certificate's lifetime in these tests: refreshed every five seconds or so.
const shortTTL = "10s"

// certificate is the one that a node's agent holds for an identity.
func (c *cluster) certificate(node int, identity string) (admin.Certificate, error) {
	rows, err := c.client(node).Certificates(c.t.Context())
	if err != nil {
		return admin.Certificate{}, err
	}
	for _, row := range rows {
		if row.Identity.String() == identity {
			return row, nil
		}
	}
	return admin.Certificate{}, fmt.Errorf("no certificate of %s among %+v", identity, rows)
}

// Certificates are refreshed under traffic, and no connection notices.
func TestRefreshFailsNoConnection(t *testing.T) {
	s := newShop(t, lab.Options{}, "--cert-ttl", shortTTL)
	serve(t, s.db, portEcho, echo)
	lasting := open(t, s.web, s.db.AddrPort(portEcho))
	traffic := startLoad(t, 2, s.web, s.db.AddrPort(portEcho))
	serials := make(map[string]bool)
	eventually(t, "three refreshes", func() error {
		row, err := s.certificate(1, webID)
		if err != nil {
			return err
		}
		serials[row.Serial] = true
		if len(serials) < 4 {
			return fmt.Errorf("%d certificates so far", len(serials))
		}
		return nil
	})
	for _, err := range traffic.stop() {
		t.Error(err)
	}
	t.Logf("%d connections over %d certificates", traffic.count.Load(), len(serials))
	if err := lasting.use(); err != nil {
		t.Error("a connection older than the certificates:", err)
	}
}

// Without its CA the mesh goes on while certificates are valid. Then nothing new opens, and
// what is open goes on.
func TestMeshOutlivesItsCA(t *testing.T) {
	s := newShop(t, lab.Options{}, "--cert-ttl", "12s")
	serve(t, s.db, portEcho, echo)
	lasting := open(t, s.web, s.db.AddrPort(portEcho))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.CA().Stop(ctx); err != nil {
		t.Fatal(err)
	}
	err := ask(ctx, s.web, s.db.AddrPort(portEcho), nonce())
	if row, stateErr := s.certificate(1, webID); stateErr != nil || time.Now().After(row.NotAfter) {
		t.Logf("the certificate expired too soon to say anything: %+v, %v", row, stateErr)
	} else if err != nil {
		t.Error("with valid certificates:", err)
	}
	for node, id := range map[int]string{1: webID, 2: "spiffe://cluster.local/ns/shop/sa/db"} {
		eventually(t, "the certificate expires", func() error {
			row, err := s.certificate(node, id)
			if err == nil && row.State != "expired" {
				err = fmt.Errorf("it is %+v", row)
			}
			return err
		})
	}
	if err := refused(s.web, s.db.AddrPort(portEcho)); err != nil {
		t.Error("a new connection without a certificate:", err)
	}
	flow := s.flow(1, "the refusal", func(f admin.Flow) bool { return f.Event == admin.FlowFailed && f.Flags == "TLS_FAILURE" })
	if !strings.Contains(flow.Cause, "no valid certificate for "+webID) {
		t.Errorf("the reason is %q", flow.Cause)
	}
	if err := lasting.use(); err != nil {
		t.Error("a live connection:", err)
	}
	if _, err := s.StartCA(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "new connections with new certificates", func() error {
		return ask(t.Context(), s.web, s.db.AddrPort(portEcho), nonce())
	})
	if err := lasting.use(); err != nil {
		t.Error("a live connection:", err)
	}
}

// A revoked certificate cuts what it vouches for, on both nodes, and nothing else.
func TestRevocationCutsLiveConnections(t *testing.T) {
	list := filepath.Join(t.TempDir(), "crl.pem")
	if err := os.WriteFile(list, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := newShop(t, lab.Options{}, "--crl-file", list)
	serve(t, s.db, portEcho, echo)
	revoked, other := open(t, s.web, s.db.AddrPort(portEcho)), open(t, s.near, s.db.AddrPort(portEcho))
	for _, one := range []steady{revoked, other} {
		if err := one.use(); err != nil {
			t.Fatal(err)
		}
	}
	row, err := s.certificate(1, webID)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(list+".new", s.revoke(row.Serial), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(list+".new", list); err != nil {
		t.Fatal(err)
	}
	if err := resetOf(revoked.TCPConn); err != nil {
		t.Error("the connection with the revoked certificate:", err)
	}
	if err := other.use(); err != nil {
		t.Error("another connection:", err)
	}
	eventually(t, "a new certificate", func() error {
		now, err := s.certificate(1, webID)
		if err == nil && (now.Serial == row.Serial || now.State != "valid") {
			err = fmt.Errorf("it is %+v", now)
		}
		return err
	})
	eventually(t, "connections with the new certificate", func() error {
		return ask(t.Context(), s.web, s.db.AddrPort(portEcho), nonce())
	})
}

// revoke is a revocation list of the mesh's CA.
func (s *shop) revoke(serial string) []byte {
	s.t.Helper()
	number, ok := new(big.Int).SetString(strings.ReplaceAll(serial, ":", ""), 16)
	if !ok {
		s.t.Fatalf("serial %q", serial)
	}
	dir := s.CA().DataDir
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca-cert.pem"), filepath.Join(dir, "ca-key.pem"))
	if err != nil {
		s.t.Fatal(err)
	}
	key, ok := ca.PrivateKey.(crypto.Signer)
	if !ok {
		s.t.Fatalf("the CA's key is a %T", ca.PrivateKey)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: number, RevocationTime: time.Now()}},
	}, ca.Leaf, key)
	if err != nil {
		s.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}
