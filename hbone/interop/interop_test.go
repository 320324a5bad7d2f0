// Package interop tests hbone against peers that were not written here, in both directions.
// A peer that is missing skips its tests, unless RACEWAY_REQUIRE_PEERS=1 says that it must
// not be.
package interop

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer finds a peer's program: what the environment variable names, else name on PATH.
func peer(t *testing.T, variable, name, remedy string) string {
	t.Helper()
	if path := os.Getenv(variable); path != "" {
		return path
	}
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path
	case os.Getenv("RACEWAY_REQUIRE_PEERS") == "1":
		t.Fatalf("%s is not installed (%s)", name, remedy)
	default:
		t.Skipf("%s is not installed (%s)", name, remedy)
	}
	return ""
}

// server is our hbone.Server on loopback, with certificates of ca.
type server struct {
	addr netip.AddrPort
	ca   *hbonetest.CA
	errs chan error // handshakes that did not succeed
	// opened counts the tunnels that its handler was given.
	opened atomic.Int64
}

// startServer serves authorized tunnels by an echo, as a node's proxy would: status 400 for
// another target than application, 401 for another identity than ClientID.
func startServer(t *testing.T, ca *hbonetest.CA) *server {
	t.Helper()
	return &startDrainingWith(t, ca).server
}

// draining is a server whose drain the test starts.
type draining struct {
	server
	drain context.CancelFunc
	done  chan error // what Serve returned
}

func startDraining(t *testing.T) *draining {
	t.Helper()
	return startDrainingWith(t, hbonetest.NewCA(t))
}

func startDrainingWith(t *testing.T, ca *hbonetest.CA) *draining {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	d := &draining{drain: drain, done: make(chan error, 1)}
	d.addr, d.ca, d.errs = l.Addr().(*net.TCPAddr).AddrPort(), ca, make(chan error, 100)
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS: ca.ServerTLS(t, hbonetest.ServerID), Transport: h2.Server{}, Handler: d.handle,
		HandshakeTimeout: 2 * time.Second,
		OnHandshakeError: func(_ netip.AddrPort, err error) {
			select {
			case d.errs <- err:
			default:
			}
		},
	})
	go func() { d.done <- srv.Serve(ctx, force, l) }()
	t.Cleanup(func() {
		drain()
		cut()
		if err := <-d.done; err != nil {
			t.Errorf("Serve = %v", err)
		}
		_ = l.Close()
	})
	return d
}

// application is the one target that the test server has.
const application = "127.0.0.1:7000"

func (s *server) handle(r *hbone.ServerRequest) {
	s.opened.Add(1)
	switch {
	case r.Authority != application:
		r.Reject(400)
		return
	case r.Conn.TLS.PeerCertificates[0].URIs[0].String() != hbonetest.ClientID:
		r.Reject(401)
		return
	}
	st, err := r.Accept(hbone.Response{Baggage: hbone.Baggage{Service: "db"}})
	if err != nil {
		return
	}
	defer func() { _ = st.Close() }()
	if _, err := io.Copy(struct{ io.Writer }{st}, st); err == nil {
		_ = st.CloseWrite()
	}
}

// newClient is our hbone.Client with certificates of ca.
func newClient(t *testing.T, ca *hbonetest.CA) *hbone.Client {
	t.Helper()
	return newClientWith(t, clientTLS(t, ca))
}
