package certs_test

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// BenchmarkHandshake is what both ends of a tunnel's handshake take together. The resumed one is
// what session tickets would save: everything about the certificates is checked anew on
// resumption, as it would have to be. With -cpu 1 it is CPU time.
func BenchmarkHandshake(b *testing.B) {
	authority := certstest.New(b, td)
	keeper := authority.Keeper(b, web, db)
	for _, bench := range []struct {
		name    string
		resumed bool
		curves  []tls.CurveID
	}{
		{"full", false, nil},
		{"resumed", true, nil},
		{"full X25519", false, []tls.CurveID{tls.X25519}},
		{"resumed X25519", true, []tls.CurveID{tls.X25519}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			// Not a net.Pipe: a ticket is sent when nobody reads yet. One listener: without SNI
			// the peer's address is what a session is found by.
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			server := keeper.ServerTLS(db)
			client, err := keeper.ClientTLS(web, []spiffe.ID{db})
			if err != nil {
				b.Fatal(err)
			}
			if bench.curves != nil {
				client.CurvePreferences, server.CurvePreferences = bench.curves, bench.curves
			}
			if bench.resumed {
				client.SessionTicketsDisabled, server.SessionTicketsDisabled = false, false
				client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
				handshake(b, l, client, server)
			}
			for b.Loop() {
				if got := handshake(b, l, client, server); got != bench.resumed {
					b.Fatalf("resumed: %v", got)
				}
			}
		})
	}
}

// handshake shakes hands and moves a byte each way, by which a ticket arrives.
func handshake(b *testing.B, l net.Listener, client, server *tls.Config) (resumed bool) {
	x, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	y, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	c, s := tls.Client(x, client), tls.Server(y, server)
	failed := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		failed <- err
	}()
	if _, err := c.Write([]byte{1}); err != nil {
		b.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		b.Fatal(err)
	}
	if err := <-failed; err != nil {
		b.Fatal(err)
	}
	resumed = c.ConnectionState().DidResume
	_, _ = x.Close(), y.Close()
	return resumed
}
