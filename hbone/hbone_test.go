package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	key     = hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: netip.MustParseAddrPort("10.0.0.2:15008")}
	request = &hbone.Request{Authority: "10.0.0.2:3306"}
)

// memory is a network of one listener, made of net.Pipe, so that it runs in a synctest
// bubble.
type memory struct {
	accept chan net.Conn
	closed chan struct{}
	once   sync.Once

	mu    sync.Mutex
	conns []net.Conn // the server's ends
	dials int
}

func newMemory() *memory {
	return &memory{accept: make(chan net.Conn), closed: make(chan struct{})}
}

func (m *memory) Accept() (net.Conn, error) {
	select {
	case c := <-m.accept:
		return c, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

func (m *memory) Close() error   { m.once.Do(func() { close(m.closed) }); return nil }
func (m *memory) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 2), Port: 15008} }

func (m *memory) dial(ctx context.Context, _ hbone.Key) (net.Conn, error) {
	client, server := net.Pipe()
	m.mu.Lock()
	m.dials++
	m.conns = append(m.conns, server)
	m.mu.Unlock()
	select {
	case m.accept <- server:
		return client, nil
	case <-m.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *memory) dialed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dials
}

// cut breaks every connection.
func (m *memory) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.conns {
		_ = c.Close()
	}
}

// world is a client and a server in a memory network.
type world struct {
	ca     *hbonetest.CA
	net    *memory
	client *hbone.Client
	drain  context.CancelFunc // of the server
	served chan error
}

// newWorld may be changed by f before anything starts.
func newWorld(t *testing.T, f func(*hbone.ClientConfig, *hbone.ServerConfig)) *world {
	t.Helper()
	w := &world{ca: hbonetest.NewCA(t), net: newMemory()}
	clientTLS := w.ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	cc := hbone.ClientConfig{
		Dial:      w.net.dial,
		TLS:       func(context.Context, hbone.Key) (*tls.Config, error) { return clientTLS, nil },
		Transport: h2.Client{},
	}
	sc := hbone.ServerConfig{TLS: w.ca.ServerTLS(t, hbonetest.ServerID), Transport: h2.Server{}, Handler: hbonetest.Echo}
	if f != nil {
		f(&cc, &sc)
	}
	w.client = hbone.NewClient(cc)
	w.serve(hbone.NewServer(sc), w.net)
	t.Cleanup(func() {
		_ = w.client.Close()
		w.drain()
		if err := <-w.served; err != nil {
			t.Error(err)
		}
	})
	return w
}

// serve runs srv; its force comes with its ctx.
func (w *world) serve(srv *hbone.Server, l net.Listener) {
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	w.drain = func() { drain(); cut() }
	w.served = make(chan error, 1)
	go func() { w.served <- srv.Serve(ctx, force, l) }()
}

func (w *world) open(t *testing.T) *hbone.Tunnel {
	t.Helper()
	tunnel, err := w.client.Open(t.Context(), key, request)
	if err != nil {
		t.Fatal(err)
	}
	return tunnel
}
