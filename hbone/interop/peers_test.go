package interop

import (
	"context"
	"crypto/tls"
	"net"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func dial(ctx context.Context, key hbone.Key) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", key.Remote.String())
}

// clientTLS shows a certificate of key.Source and demands one of key.Peer.
func clientTLS(t *testing.T, ca *hbonetest.CA) func(context.Context, hbone.Key) (*tls.Config, error) {
	return func(_ context.Context, key hbone.Key) (*tls.Config, error) {
		return ca.ClientTLS(t, key.Source, key.Peer), nil
	}
}
