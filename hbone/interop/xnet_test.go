package interop

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"testing"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// xnetTunnel is a CONNECT of x/net/http2's Transport.
type xnetTunnel struct {
	io.Reader
	*io.PipeWriter
}

func (x xnetTunnel) CloseWrite() error { return x.Close() }

// xnetConnect sends CONNECT through x/net/http2's Transport.
func xnetConnect(t *testing.T, s *server, id, target string) (*http.Response, xnetTunnel) {
	t.Helper()
	conn, err := tls.Dial("tcp", s.addr.String(), s.ca.ClientTLS(t, id, hbonetest.ServerID))
	if err != nil {
		t.Fatal(err)
	}
	cc, err := new(http2.Transport).NewClientConn(conn) //nolint:staticcheck // a peer to test with
	if err != nil {
		t.Fatal(err)
	}
	body, w := io.Pipe()
	resp, err := cc.RoundTrip(&http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: target}, Host: target, Body: body, Header: http.Header{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.Close()
		_ = resp.Body.Close()
		_ = cc.Close()
	})
	return resp, xnetTunnel{resp.Body, w}
}

func TestXNetTransportAsClient(t *testing.T) {
	s := startServer(t, hbonetest.NewCA(t))
	resp, tunnel := xnetConnect(t, s, hbonetest.ClientID, application)
	if resp.StatusCode != 200 {
		t.Fatalf("status %d", resp.StatusCode)
	}
	exchange(t, tunnel, 16<<20)
	for _, test := range []struct {
		id, target string
		status     int
	}{
		{hbonetest.ClientID, "127.0.0.2:7000", 400},
		{hbonetest.ClientID, "127.0.0.1", 400},
		{"spiffe://cluster.local/ns/demo/sa/other", application, 401},
	} {
		if resp, _ := xnetConnect(t, s, test.id, test.target); resp.StatusCode != test.status {
			t.Errorf("CONNECT %s as %s: status %d, want %d", test.target, test.id, resp.StatusCode, test.status)
		}
	}
}

// startXNetServer serves tunnels with x/net/http2's Server; handler sees the request.
func startXNetServer(t *testing.T, ca *hbonetest.CA, handler http.HandlerFunc) hbone.Key {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := ca.ServerTLS(t, hbonetest.ServerID)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				conn := tls.Server(raw, cfg)
				if conn.HandshakeContext(context.Background()) != nil {
					_ = raw.Close()
					return
				}
				new(http2.Server).ServeConn(conn, &http2.ServeConnOpts{Handler: handler}) //nolint:staticcheck // a peer to test with
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	return hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: l.Addr().(*net.TCPAddr).AddrPort()}
}

func TestXNetServerAsServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startXNetServer(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != application {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		_ = http.NewResponseController(w).Flush()
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				_, _ = w.Write(buf[:n])
				_ = http.NewResponseController(w).Flush()
			}
			if err != nil {
				return
			}
		}
	})
	client := newClient(t, ca)
	tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application, Forwarded: hbone.Forwarded{For: netip.MustParseAddrPort("10.0.0.1:1")}})
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, tunnel, 16<<20)
	_ = tunnel.Close()
	_, err = client.Open(t.Context(), key, &hbone.Request{Authority: "127.0.0.2:7000"})
	var se *hbone.StatusError
	if !errors.As(err, &se) || se.Status != 503 {
		t.Errorf("Open = %v, want status 503", err)
	}
	_ = client.Close()
}
