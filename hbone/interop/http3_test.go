package interop

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// udpSocket is one on loopback.
func udpSocket(t *testing.T) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return conn, conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func endpoint(t *testing.T, cfg h3.Config) (*h3.Endpoint, netip.AddrPort) {
	t.Helper()
	conn, addr := udpSocket(t)
	cfg.Conn = conn
	e, err := h3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e, addr
}

// echoDatagrams sends a flow's datagrams back.
type echoDatagrams struct{ flow hbone.DatagramStream }

func (e echoDatagrams) Datagram(p []byte) { _ = e.flow.Send(p, true) }
func (e echoDatagrams) End(error)         { _ = e.flow.Close() }

// ourHTTP3Server echoes streams and flows.
func ourHTTP3Server(t *testing.T, ca *hbonetest.CA) netip.AddrPort {
	t.Helper()
	e, addr := endpoint(t, h3.Config{Datagrams: true})
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS:     ca.ServerTLS(t, hbonetest.ServerID),
		Handler: hbonetest.Echo,
		Datagrams: func(r *hbone.ServerRequest) {
			if r.Target.Port() != 53 {
				r.Reject(401)
				return
			}
			if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
				f.Deliver(echoDatagrams{f})
			}
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.ServeEndpoint(ctx, ctx, e) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return addr
}

// http3Client is quic-go's, connected to addr.
func http3Client(t *testing.T, ca *hbonetest.CA, addr netip.AddrPort) *http3.ClientConn {
	t.Helper()
	cfg := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	cfg.NextProtos = []string{http3.NextProtoH3}
	conn, err := quic.DialAddr(t.Context(), addr.String(), cfg, &quic.Config{EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "") })
	return (&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)
}

func connectRequest(t *testing.T, authority string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodConnect, "https://"+authority, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestQuicGoClientTunnelsThroughOurServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	client := http3Client(t, ca, ourHTTP3Server(t, ca))
	s, err := client.OpenRequestStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendRequestHeader(connectRequest(t, "10.0.0.1:80")); err != nil {
		t.Fatal(err)
	}
	if response, err := s.ReadResponse(); err != nil || response.StatusCode != 200 {
		t.Fatalf("response = %+v, %v", response, err)
	}
	want := bytes.Repeat([]byte("tunnel "), 100_000)
	go func() {
		_, _ = s.Write(want)
		_ = s.Close()
	}()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, %v; want %d", len(got), err, len(want))
	}
}

func TestOurServerRefusesWhatIsNoTunnel(t *testing.T) {
	ca := hbonetest.NewCA(t)
	client := http3Client(t, ca, ourHTTP3Server(t, ca))
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://10.0.0.1/", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.RoundTrip(r)
	if err != nil || response.StatusCode != 400 {
		t.Fatalf("GET: %+v, %v; want 400", response, err)
	}
	_ = response.Body.Close()
	response, err = client.RoundTrip(connectUDP(t, "/.well-known/masque/udp/10.0.0.1/54/"))
	if err != nil || response.StatusCode != 401 {
		t.Fatalf("CONNECT-UDP to a port that is denied: %+v, %v; want 401", response, err)
	}
	_ = response.Body.Close()
}

func connectUDP(t *testing.T, path string) *http.Request {
	t.Helper()
	u, err := url.Parse("https://10.0.0.1:15008" + path)
	if err != nil {
		t.Fatal(err)
	}
	r := &http.Request{Method: http.MethodConnect, Proto: "connect-udp", Host: u.Host, URL: u, Header: http.Header{"Capsule-Protocol": {"?1"}}}
	return r.WithContext(t.Context())
}

func TestQuicGoClientSendsDatagramsThroughOurServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	client := http3Client(t, ca, ourHTTP3Server(t, ca))
	<-client.ReceivedSettings()
	if s := client.Settings(); !s.EnableDatagrams || !s.EnableExtendedConnect {
		t.Fatalf("settings = %+v", s)
	}
	s, err := client.OpenRequestStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendRequestHeader(connectUDP(t, "/.well-known/masque/udp/10.0.0.1/53/")); err != nil {
		t.Fatal(err)
	}
	// The first datagram does not wait for the answer.
	if err := s.SendDatagram(hbone.AppendDatagram(nil, []byte("first"))); err != nil {
		t.Fatal(err)
	}
	if response, err := s.ReadResponse(); err != nil || response.StatusCode != 200 {
		t.Fatalf("response = %+v, %v", response, err)
	}
	if got, err := s.ReceiveDatagram(t.Context()); err != nil || string(got) != "\x00first" {
		t.Fatalf("datagram = %q, %v", got, err)
	}
	// One of a foreign context is dropped, one in a capsule is not.
	if err := s.SendDatagram([]byte{2, 'x'}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(hbone.AppendCapsule(nil, []byte("capsule"))); err != nil {
		t.Fatal(err)
	}
	if got, err := s.ReceiveDatagram(t.Context()); err != nil || string(got) != "\x00capsule" {
		t.Fatalf("datagram = %q, %v", got, err)
	}
	// An end makes an end.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(s); err != nil || len(rest) > 0 {
		t.Errorf("behind the end: %d bytes, %v", len(rest), err)
	}
}

// quicGoServer is quic-go's, which tunnels bytes and datagrams back.
func quicGoServer(t *testing.T, ca *hbonetest.CA) netip.AddrPort {
	t.Helper()
	conn, addr := udpSocket(t)
	cfg := ca.ServerTLS(t, hbonetest.ServerID)
	srv := &http3.Server{
		EnableDatagrams: true, TLSConfig: http3.ConfigureTLSConfig(cfg),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			s, err := w.(http3.HTTPStreamer).HTTPStream()
			if err != nil {
				return
			}
			defer func() { _ = s.Close() }()
			if r.Proto != "connect-udp" {
				_, _ = io.Copy(s, s)
				return
			}
			for {
				p, err := s.ReceiveDatagram(r.Context())
				if err != nil || s.SendDatagram(p) != nil {
					return
				}
			}
		}),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(conn) }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		_ = conn.Close()
	})
	return addr
}

func TestOurClientTunnelsThroughQuicGoServer(t *testing.T) {
	ca := hbonetest.NewCA(t)
	addr := quicGoServer(t, ca)
	e, local := endpoint(t, h3.Config{})
	cfg := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	client := hbone.NewClient(hbone.ClientConfig{
		Connector: e, TLS: func(context.Context, hbone.Key) (*tls.Config, error) { return cfg, nil },
	})
	t.Cleanup(func() { _ = client.Close() })
	key := hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: addr, Local: local.Addr()}

	tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("tunnel "), 100_000)
	go func() {
		_, _ = tunnel.Write(want)
		_ = tunnel.CloseWrite()
	}()
	if got, err := io.ReadAll(tunnel); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, %v; want %d", len(got), err, len(want))
	}
	_ = tunnel.Close()

	flow, err := client.OpenDatagrams(t.Context(), key, &hbone.Request{Authority: "10.0.0.1:53"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !flow.Reused {
		t.Error("the flow has a session of its own")
	}
	got := make(chan []byte, 16)
	flow.Deliver(collected(got))
	if err := flow.Send([]byte("datagram"), false); err != nil {
		t.Fatal(err)
	}
	select {
	case p := <-got:
		if string(p) != "datagram" {
			t.Errorf("datagram = %q", p)
		}
	case <-time.After(10 * time.Second):
		t.Error("no datagram came back")
	}
	_ = flow.Close()
}

// collected keeps what comes.
type collected chan []byte

func (c collected) Datagram(p []byte) { c <- bytes.Clone(p) }
func (c collected) End(error)         {}
