package h3_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
	"github.com/raceway-mesh/raceway/hbone/hbonetest/conformance"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is an endpoint with a client and a server on it.
type node struct {
	endpoint *h3.Endpoint
	addr     netip.AddrPort
	drain    context.CancelFunc // of the server
	force    context.CancelFunc
	served   chan error // what ServeEndpoint returned
}

// loopbacks are the addresses that nodes are tested on.
func loopbacks() map[string]string { return map[string]string{"IPv4": "127.0.0.1", "IPv6": "::1"} }

func newNode(t testing.TB, addr string, cfg h3.Config) *node {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Conn = conn
	e, err := h3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{endpoint: e, addr: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
	t.Cleanup(func() {
		if n.served != nil {
			n.drain()
			n.force()
			if err := <-n.served; err != nil {
				t.Errorf("ServeEndpoint = %v", err)
			}
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// serve runs srv on the node until the test ends.
func (n *node) serve(srv *hbone.Server) {
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	n.drain, n.force, n.served = drain, cut, make(chan error, 1)
	go func() { n.served <- srv.ServeEndpoint(ctx, force, n.endpoint) }()
}

// world is two nodes, a client on one and a server on the other.
type world struct {
	ca             *hbonetest.CA
	client, server *node
	key            hbone.Key
	clientTLS      *tls.Config
	serverConfig   hbone.ServerConfig
}

// newWorld may be changed by f before the server starts.
func newWorld(t testing.TB, addr string, handler hbone.Handler, f func(*h3.Config, *hbone.ServerConfig)) *world {
	t.Helper()
	ca := hbonetest.NewCA(t)
	w := &world{ca: ca, clientTLS: ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)}
	cfg := h3.Config{Datagrams: true}
	w.serverConfig = hbone.ServerConfig{TLS: ca.ServerTLS(t, hbonetest.ServerID), Handler: handler, Datagrams: handler}
	if f != nil {
		f(&cfg, &w.serverConfig)
	}
	w.server = newNode(t, addr, cfg)
	w.server.serve(hbone.NewServer(w.serverConfig))
	w.client = newNode(t, addr, h3.Config{})
	w.key = hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: w.server.addr, Local: w.client.addr.Addr()}
	return w
}

// connect makes a session that ends with the test.
func (w *world) connect(t testing.TB) hbone.Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, _, err := w.client.endpoint.Connect(ctx, w.key, w.clientTLS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Close()
		<-s.Done()
	})
	return s
}

func TestConformance(t *testing.T) {
	for name, addr := range loopbacks() {
		t.Run(name, func(t *testing.T) {
			conformance.Test(t, func(t *testing.T, handler hbone.Handler) *conformance.Pair {
				w := newWorld(t, addr, handler, nil)
				return &conformance.Pair{Session: w.connect(t), Force: w.server.force}
			})
		})
	}
}

func TestDatagramConformance(t *testing.T) {
	for name, addr := range loopbacks() {
		t.Run(name, func(t *testing.T) {
			conformance.TestDatagrams(t, func(t *testing.T, handler hbone.Handler) *conformance.Pair {
				w := newWorld(t, addr, handler, nil)
				return &conformance.Pair{Session: w.connect(t), Force: w.server.force}
			})
		})
	}
}
