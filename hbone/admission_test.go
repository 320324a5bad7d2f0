package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// gated is an Endpoint that hands its gate to the test.
type gated struct{ gate chan *hbone.Gate }

func (g gated) Listen(_ *tls.Config, gate *hbone.Gate) (hbone.Listener, error) {
	g.gate <- gate
	return g, nil
}

func (g gated) Accept(ctx context.Context) (hbone.Accepted, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (g gated) Close() error { return nil }

func TestGateBoundsHandshakes(t *testing.T) {
	told := make(chan error, 16)
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS: hbonetest.NewCA(t).ServerTLS(t, hbonetest.ServerID), Handler: hbonetest.Echo, MaxHandshakes: 8,
		OnHandshakeError: func(_ netip.AddrPort, err error) { told <- err },
	})
	g := gated{make(chan *hbone.Gate, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- srv.ServeEndpoint(ctx, ctx, g) }()
	gate := <-g.gate

	from := func(host byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, host}), 4000)
	}
	var under []*hbone.Admission
	admit := func(host byte) {
		t.Helper()
		a, err := gate.Admit(from(host))
		if err != nil {
			t.Fatal(err)
		}
		under = append(under, a)
	}
	if gate.Crowded(from(1)) {
		t.Error("an idle server is crowded")
	}
	admit(1)
	if !gate.Crowded(from(1)) || gate.Crowded(from(2)) {
		t.Error("half of an address's share does not make it prove itself, or others")
	}
	admit(1) // its share: a quarter of all
	if _, err := gate.Admit(from(1)); !errors.Is(err, hbone.ErrTooManyHandshakes) || !errors.Is(<-told, hbone.ErrTooManyHandshakes) {
		t.Errorf("beyond an address's share: %v", err)
	}
	if !gate.Crowded(from(2)) {
		t.Error("a quarter of all handshakes does not make others prove themselves")
	}
	for host := range byte(6) {
		admit(2 + host)
	}
	if _, err := gate.Admit(from(9)); !errors.Is(err, hbone.ErrTooManyHandshakes) || !errors.Is(<-told, hbone.ErrTooManyHandshakes) {
		t.Errorf("beyond all handshakes: %v", err)
	}
	under[0].Done(nil)
	under[1].Done(context.DeadlineExceeded)
	var te *hbone.TLSError
	if err := <-told; !errors.As(err, &te) || te.Cause != hbone.TLSTimeout {
		t.Errorf("a handshake that failed is told as %v", err)
	}
	admit(1)
	for _, a := range under[2:] {
		a.Done(nil)
	}
	if gate.Crowded(from(1)) {
		t.Error("a server whose handshakes have ended is crowded")
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
