package interop

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
	"github.com/raceway-mesh/raceway/hbone/interop/envoy"
)

const envoyRemedy = "set RACEWAY_ENVOY to $(hbone/interop/install-envoy.sh DIR)"

// startEnvoy runs Envoy as a relay with that certificate, and waits until it listens.
func startEnvoy(t *testing.T, relay envoy.Relay, cert tls.Certificate, ca *hbonetest.CA) {
	t.Helper()
	binary := peer(t, "RACEWAY_ENVOY", "envoy", envoyRemedy)
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	relay.Root = write("root.pem", ca.PEM())
	relay.Cert, relay.Key = write("cert.pem", hbonetest.CertPEM(cert)), write("key.pem", hbonetest.KeyPEM(t, cert))
	config, err := relay.Config()
	if err != nil {
		t.Fatal(err)
	}
	path := write("envoy.yaml", config)
	var log bytes.Buffer
	cmd := exec.Command(binary, "-c", path, "--use-dynamic-base-id", "--concurrency", "2", "--log-level", "warning", "--drain-time-s", "1")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Logf("envoy:\n%s", log.Bytes())
		}
	})
	waitListening(t, relay.Listen.String())
}

func waitListening(t *testing.T, addr string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing listens on %s: %v", addr, err)
		}
	}
}

// freeAddr is an address whose port was free a moment ago.
func freeAddr(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// startEnvoyClient returns the address whose connections Envoy tunnels to target through
// our server.
func startEnvoyClient(t *testing.T, s *server, target, peerID string, cert tls.Certificate) string {
	t.Helper()
	relay := envoy.Relay{
		Listen: freeAddr(t), Dial: s.addr, Target: target, Peer: peerID,
		Baggage: "k8s.namespace.name=demo,k8s.deployment.name=envoy",
	}
	startEnvoy(t, relay, cert, s.ca)
	return relay.Listen.String()
}

func TestEnvoyAsClient(t *testing.T) {
	ca := hbonetest.NewCA(t)
	s := startServer(t, ca)
	addr := startEnvoyClient(t, s, application, hbonetest.ServerID, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}}))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = conn.Close() }()
			exchange(t, conn.(*net.TCPConn), 8<<20)
		})
	}
	wg.Wait()
	if n := s.opened.Load(); n < 8 {
		t.Errorf("our server saw %d tunnels of 8", n)
	}
}

func TestEnvoyAsClientIsRejected(t *testing.T) {
	ca := hbonetest.NewCA(t)
	now := time.Now()
	tests := map[string]struct {
		target, peerID string
		leaf           hbonetest.Leaf
		cause          hbone.TLSCause // of the handshake that our server reports
	}{
		"another target":      {"127.0.0.2:7000", hbonetest.ServerID, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}}, ""},
		"another identity":    {application, hbonetest.ServerID, hbonetest.Leaf{IDs: []string{"spiffe://cluster.local/ns/demo/sa/other"}}, ""},
		"it rejects our name": {application, "spiffe://cluster.local/ns/demo/sa/other", hbonetest.Leaf{IDs: []string{hbonetest.ClientID}}, hbone.TLSRejected},
		"expired": {application, hbonetest.ServerID, hbonetest.Leaf{
			IDs:       []string{hbonetest.ClientID},
			NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour),
		}, hbone.TLSExpired},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, ca)
			addr := startEnvoyClient(t, s, test.target, test.peerID, ca.Issue(t, test.leaf))
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = conn.Write([]byte("hello"))
			if all, err := io.ReadAll(conn); len(all) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read %q, %v through a tunnel that must not be", all, err)
			}
			if test.cause == "" {
				return
			}
			var te *hbone.TLSError
			if err := <-s.errs; !errors.As(err, &te) || te.Cause != test.cause {
				t.Errorf("our server reports %v, want cause %s", err, test.cause)
			}
		})
	}
}

// startEnvoyServer returns the key of an Envoy that serves target with an echo application.
func startEnvoyServer(t *testing.T, ca *hbonetest.CA, target string, cert tls.Certificate) hbone.Key {
	t.Helper()
	relay := envoy.Relay{Listen: freeAddr(t), Dial: startEcho(t), Target: target}
	startEnvoy(t, relay, cert, ca)
	return hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: relay.Listen}
}

func TestEnvoyAsServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startEnvoyServer(t, ca, application, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}}))
	client := newClient(t, ca)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			tunnel, err := client.Open(t.Context(), key, &hbone.Request{
				Authority: application, Baggage: hbone.Baggage{Namespace: "demo"},
				Forwarded: hbone.Forwarded{For: netip.MustParseAddrPort("10.0.0.1:4321")}, TraceParent: hbone.NewTraceParent(),
			})
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = tunnel.Close() }()
			exchange(t, tunnel, 8<<20)
		})
	}
	wg.Wait()
	if n := client.Stats().Sessions; n != 1 {
		t.Errorf("%d sessions for 8 streams", n)
	}
}

func TestEnvoyAsServerRejects(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startEnvoyServer(t, ca, application, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}}))
	t.Run("another target", func(t *testing.T) {
		_, err := newClient(t, ca).Open(t.Context(), key, &hbone.Request{Authority: "127.0.0.2:7000"})
		var se *hbone.StatusError
		if !errors.As(err, &se) || se.Status != 404 {
			t.Errorf("Open = %v, want Envoy's 404 for a route that is not there", err)
		}
	})
	t.Run("wrong SAN", func(t *testing.T) {
		k := key
		k.Peer = "spiffe://cluster.local/ns/demo/sa/other"
		wantTLSError(t, newClient(t, ca), k, hbone.TLSWrongIdentity)
	})
	for name, test := range map[string]struct {
		change func(*tls.Config)
		cause  hbone.TLSCause
	}{
		"no client certificate": {func(c *tls.Config) { c.Certificates = nil }, hbone.TLSNoCertificate},
		"expired": {func(c *tls.Config) {
			c.Certificates = []tls.Certificate{ca.Issue(t, hbonetest.Leaf{
				IDs:       []string{hbonetest.ClientID},
				NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
			})}
		}, hbone.TLSExpired},
		"foreign root": {func(c *tls.Config) {
			cert := hbonetest.NewCA(t).Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ClientID}})
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		}, hbone.TLSRejected},
	} {
		t.Run(name, func(t *testing.T) {
			wantTLSError(t, newClientWith(t, func(_ context.Context, k hbone.Key) (*tls.Config, error) {
				cfg := ca.ClientTLS(t, k.Source, k.Peer)
				test.change(cfg)
				return cfg, nil
			}), key, test.cause)
		})
	}
}
