package interop

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
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

func newClientWith(t *testing.T, f func(context.Context, hbone.Key) (*tls.Config, error)) *hbone.Client {
	t.Helper()
	c := hbone.NewClient(hbone.ClientConfig{Dial: dial, TLS: f, Transport: h2.Client{}})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func wantTLSError(t *testing.T, c *hbone.Client, key hbone.Key, cause hbone.TLSCause) {
	t.Helper()
	_, err := c.Open(t.Context(), key, &hbone.Request{Authority: application})
	var te *hbone.TLSError
	if !errors.As(err, &te) || te.Cause != cause {
		t.Errorf("Open = %v, want cause %s", err, cause)
	}
}

// duplex is an end of a tunnel or of a connection.
type duplex interface {
	io.ReadWriter
	CloseWrite() error
}

// exchange sends random bytes in random chunks to an echo, ends its direction, and expects
// the same bytes and then a clean end.
func exchange(t *testing.T, conn duplex, size int) {
	sent, got := sha256.New(), sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		seed := rand.Uint64()
		random, sizes := rand.NewChaCha8([32]byte{byte(seed)}), rand.New(rand.NewPCG(seed, 1))
		for left := size; left > 0; {
			buf := make([]byte, min(left, 1+sizes.IntN(100_000)))
			_, _ = random.Read(buf) // never fails
			sent.Write(buf)
			if _, err := conn.Write(buf); err != nil {
				t.Errorf("write with %d bytes left: %v", left, err)
				return
			}
			left -= len(buf)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	n, err := io.Copy(got, struct{ io.Reader }{conn})
	wg.Wait()
	if err != nil || n != int64(size) {
		t.Errorf("echo of %d bytes, %v; want %d", n, err, size)
	} else if string(sent.Sum(nil)) != string(got.Sum(nil)) {
		t.Error("echo differs from what was sent")
	}
}

// startEcho is an application that sends back what it gets, and ends when its client does.
func startEcho(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer func() { _ = conn.Close() }()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}
