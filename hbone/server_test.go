package hbone_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

type x509Usage = x509.ExtKeyUsage

const clientAuth = x509.ExtKeyUsageClientAuth

// failures collects what OnHandshakeError is told.
func failures(s *hbone.ServerConfig) <-chan error {
	errs := make(chan error, 10)
	s.OnHandshakeError = func(_ netip.AddrPort, err error) { errs <- err }
	return errs
}

func TestServerReportsHandshakesThatFail(t *testing.T) {
	tests := map[string]struct {
		want   hbone.TLSCause
		client func(*tls.Config)
	}{
		"no client certificate": {hbone.TLSNoCertificate, func(c *tls.Config) { c.Certificates = nil }},
		"wrong ALPN":            {hbone.TLSProtocol, func(c *tls.Config) { c.NextProtos = []string{"h3"} }},
		"ALPN of HTTP/1.1":      {hbone.TLSProtocol, func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }},
		"no ALPN":               {hbone.TLSProtocol, func(c *tls.Config) { c.NextProtos = nil }},
		"client rejects the server": {hbone.TLSRejected, func(c *tls.Config) {
			c.VerifyConnection = func(tls.ConnectionState) error { return errors.New("no") }
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var errs <-chan error
			w := newWorld(t, func(_ *hbone.ClientConfig, s *hbone.ServerConfig) { errs = failures(s) })
			raw, err := w.net.dial(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			cfg := w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
			test.client(cfg)
			conn := tls.Client(raw, cfg)
			if err := conn.HandshakeContext(t.Context()); err == nil {
				_, _ = io.ReadAll(conn) // TLS 1.3: the server's verdict comes here
			}
			var te *hbone.TLSError
			if err := <-errs; !errors.As(err, &te) || te.Cause != test.want {
				t.Errorf("server was told %v, want cause %s", err, test.want)
			}
		})
	}
}

func TestServerBoundsHandshakesInTimeAndNumber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var errs <-chan error
		w := newWorld(t, func(_ *hbone.ClientConfig, s *hbone.ServerConfig) {
			errs = failures(s)
			s.MaxHandshakes, s.HandshakeTimeout = 1, 3*time.Second
		})
		silent, err := w.net.dial(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = silent.Close() }()
		start := time.Now()
		tunnel := w.open(t) // has to wait for the silent one
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("a second handshake began after %v, want the first one's timeout of 3s", took)
		}
		_ = tunnel.Close()
		var te *hbone.TLSError
		if err := <-errs; !errors.As(err, &te) || te.Cause != hbone.TLSTimeout {
			t.Errorf("server was told %v", err)
		}
	})
}

func TestServerBoundsConnections(t *testing.T) {
	var errs <-chan error
	w := newWorld(t, func(_ *hbone.ClientConfig, s *hbone.ServerConfig) {
		errs = failures(s)
		s.MaxConns = 1
	})
	tunnel := w.open(t)
	other := key
	other.Source = "other"
	if _, err := w.client.Open(t.Context(), other, request); err == nil {
		t.Error("a second connection was taken")
	}
	if err := <-errs; !errors.Is(err, hbone.ErrTooManyConns) {
		t.Errorf("server was told %v", err)
	}
	hbonetest.Ping(t, tunnel)
	_ = tunnel.Close()
}

func TestServerEndsAConnectionWhosePeerIsSilent(t *testing.T) {
	for name, hello := range map[string]string{
		"before its preface": "",
		"after its SETTINGS": http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				raw, err := w.net.dial(t.Context(), key)
				if err != nil {
					t.Fatal(err)
				}
				conn := tls.Client(raw, w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID))
				defer func() { _ = conn.Close() }()
				start := time.Now()
				if _, err := conn.Write([]byte(hello)); err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, conn) // its PINGs get no answer
				if took := time.Since(start); took < 10*time.Second || took > 30*time.Second {
					t.Errorf("connection ended after %v", took)
				}
			})
		})
	}
}

// tcpWorld is a server on loopback that drains and is forced apart.
func tcpWorld(t *testing.T) (client *hbone.Client, k hbone.Key, l net.Listener, drain, force context.CancelFunc, served chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ca := hbonetest.NewCA(t)
	srv := hbone.NewServer(hbone.ServerConfig{TLS: ca.ServerTLS(t, hbonetest.ServerID), Transport: h2.Server{}, Handler: hbonetest.Echo})
	ctx, drain := context.WithCancel(context.Background())
	forced, force := context.WithCancel(context.Background())
	served = make(chan error, 1)
	go func() { served <- srv.Serve(ctx, forced, l) }()
	cfg := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	client = hbone.NewClient(hbone.ClientConfig{
		Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", k.Remote.String())
		},
		TLS:       func(context.Context, hbone.Key) (*tls.Config, error) { return cfg, nil },
		Transport: h2.Client{},
	})
	t.Cleanup(func() { drain(); force(); _ = l.Close(); _ = client.Close() })
	k = key
	k.Remote = l.Addr().(*net.TCPAddr).AddrPort()
	return client, k, l, drain, force, served
}

func TestServeDrainsAndLeavesItsListenerOpen(t *testing.T) {
	client, k, l, drain, _, served := tcpWorld(t)
	tunnel, err := client.Open(t.Context(), k, request)
	if err != nil {
		t.Fatal(err)
	}
	drain()
	time.Sleep(50 * time.Millisecond)
	hbonetest.Ping(t, tunnel)
	select {
	case err := <-served:
		t.Fatalf("Serve returned %v with a stream alive", err)
	default:
	}
	_ = tunnel.CloseWrite()
	if _, err := io.ReadAll(tunnel); err != nil {
		t.Error(err)
	}
	_ = tunnel.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("listener was closed: %v", err)
	}
	_ = conn.Close()
}

func TestForceEndsServe(t *testing.T) {
	client, k, _, drain, force, served := tcpWorld(t)
	tunnel, err := client.Open(t.Context(), k, request)
	if err != nil {
		t.Fatal(err)
	}
	drain()
	force()
	if err := <-served; err != nil {
		t.Errorf("Serve = %v", err)
	}
	if _, err := io.ReadAll(tunnel); err == nil {
		t.Error("a cut stream ended cleanly")
	}
	_ = tunnel.Close()
}

func TestServeReportsAListenerThatBroke(t *testing.T) {
	_, _, l, _, _, served := tcpWorld(t)
	_ = l.Close()
	if err := <-served; err == nil {
		t.Error("Serve = nil after its listener was closed")
	}
}
