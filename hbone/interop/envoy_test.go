package interop

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"text/template"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// envoy is a running Envoy.
type envoy struct {
	dir string
	log bytes.Buffer
}

const envoyRemedy = "set RACEWAY_ENVOY to $(hbone/interop/install-envoy.sh DIR)"

// startEnvoy runs Envoy with a configuration made of a template and waits until it listens
// on addr. Certificates are in files of its directory, named in the template's data.
func startEnvoy(t *testing.T, text string, data map[string]any, cert tls.Certificate, ca *hbonetest.CA, addr string) {
	t.Helper()
	binary := peer(t, "RACEWAY_ENVOY", "envoy", envoyRemedy)
	e := &envoy{dir: t.TempDir()}
	for name, content := range map[string][]byte{
		"root.pem": ca.PEM(), "cert.pem": hbonetest.CertPEM(cert), "key.pem": hbonetest.KeyPEM(t, cert),
	} {
		path := filepath.Join(e.dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		data[strings.TrimSuffix(name, ".pem")] = path
	}
	var config bytes.Buffer
	if err := template.Must(template.New("envoy").Parse(text)).Execute(&config, data); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(e.dir, "envoy.yaml")
	if err := os.WriteFile(path, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-c", path, "--use-dynamic-base-id", "--concurrency", "2", "--log-level", "warning", "--drain-time-s", "1")
	cmd.Stdout, cmd.Stderr = &e.log, &e.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Logf("envoy:\n%s", e.log.Bytes())
		}
	})
	waitListening(t, addr)
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

// freePort is a port that was free a moment ago.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// envoyClient tunnels plain connections to port through HBONE, as a sidecar does.
const envoyClient = `
static_resources:
  listeners:
  - name: plain
    address: {socket_address: {address: 127.0.0.1, port_value: {{.port}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: plain
          cluster: hbone
          tunneling_config:
            hostname: "{{.target}}"
            headers_to_add:
            - header: {key: baggage, value: "k8s.namespace.name=demo,k8s.deployment.name=envoy"}
  clusters:
  - name: hbone
    type: STATIC
    load_assignment:
      cluster_name: hbone
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{.hbone}}}}}}]}]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {allow_connect: true}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [h2]
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          tls_certificates: [{certificate_chain: {filename: "{{.cert}}"}, private_key: {filename: "{{.key}}"}}]
          validation_context:
            trusted_ca: {filename: "{{.root}}"}
            match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "{{.peer}}"}}]
`

// envoyServer ends HBONE tunnels for one application, as a sidecar or a waypoint does.
const envoyServer = `
static_resources:
  listeners:
  - name: hbone
    address: {socket_address: {address: 127.0.0.1, port_value: {{.hbone}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          codec_type: HTTP2
          http2_protocol_options: {allow_connect: true}
          upgrade_configs: [{upgrade_type: CONNECT}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["{{.target}}"]
              routes:
              - match: {connect_matcher: {}}
                route:
                  cluster: application
                  upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates: [{certificate_chain: {filename: "{{.cert}}"}, private_key: {filename: "{{.key}}"}}]
            validation_context: {trusted_ca: {filename: "{{.root}}"}}
  clusters:
  - name: application
    type: STATIC
    load_assignment:
      cluster_name: application
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{.application}}}}}}]}]
`

// startEnvoyClient returns the address whose connections Envoy tunnels to target through
// our server.
func startEnvoyClient(t *testing.T, s *server, target, peerID string, cert tls.Certificate) string {
	t.Helper()
	port := freePort(t)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	startEnvoy(t, envoyClient, map[string]any{"port": port, "target": target, "hbone": s.addr.Port(), "peer": peerID}, cert, s.ca, addr)
	return addr
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
	port := freePort(t)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	startEnvoy(t, envoyServer, map[string]any{"hbone": port, "target": target, "application": startEcho(t).Port()}, cert, ca, addr)
	return hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: netip.MustParseAddrPort(addr)}
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
