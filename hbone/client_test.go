package hbone_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func TestDialFailureSaysWhat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.drain()
		if err := <-w.served; err != nil {
			t.Error(err)
		}
		w.served <- nil
		_, err := w.client.Open(t.Context(), key, request)
		var de *hbone.DialError
		if !errors.As(err, &de) || de.Timeout() || de.Remote != key.Remote {
			t.Errorf("Open = %v", err)
		}
	})
}

func TestDialTimeoutNamesTheLikelyCause(t *testing.T) {
	for name, hidden := range map[string]bool{"context's error": false, "another error": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
					c.Dial = func(ctx context.Context, _ hbone.Key) (net.Conn, error) {
						<-ctx.Done()
						if hidden {
							return nil, errors.New("operation was canceled")
						}
						return nil, ctx.Err()
					}
				})
				start := time.Now()
				_, err := w.client.Open(t.Context(), key, request)
				var de *hbone.DialError
				if !errors.As(err, &de) || !de.Timeout() || time.Since(start) != 10*time.Second {
					t.Errorf("Open = %v after %v", err, time.Since(start))
				}
				if err == nil || !strings.Contains(err.Error(), "a NetworkPolicy may be blocking port 15008") {
					t.Errorf("Open = %v: the likely cause is not named", err)
				}
			})
		})
	}
}

func TestTLSFailureSaysWhy(t *testing.T) {
	expired := func(t *testing.T, ca *hbonetest.CA) tls.Certificate {
		return ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)})
	}
	tests := map[string]struct {
		want  hbone.TLSCause
		setup func(t *testing.T, ca *hbonetest.CA, client, server *tls.Config)
	}{
		"server's certificate is expired": {hbone.TLSExpired, func(t *testing.T, ca *hbonetest.CA, _, server *tls.Config) {
			server.Certificates = []tls.Certificate{expired(t, ca)}
		}},
		"server is somebody else": {hbone.TLSWrongIdentity, func(t *testing.T, ca *hbonetest.CA, _, server *tls.Config) {
			server.Certificates = []tls.Certificate{ca.Issue(t, hbonetest.Leaf{IDs: []string{"spiffe://cluster.local/ns/demo/sa/other"}})}
		}},
		"server's root is unknown": {hbone.TLSUnknownCA, func(t *testing.T, _ *hbonetest.CA, _, server *tls.Config) {
			server.Certificates = hbonetest.NewCA(t).ServerTLS(t, hbonetest.ServerID).Certificates
		}},
		"server's certificate is for clients": {hbone.TLSUnknownCA, func(t *testing.T, ca *hbonetest.CA, _, server *tls.Config) {
			server.Certificates = []tls.Certificate{ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}, Usage: []x509Usage{clientAuth}})}
		}},
		"client shows no certificate": {hbone.TLSNoCertificate, func(_ *testing.T, _ *hbonetest.CA, client, _ *tls.Config) {
			client.Certificates = nil
		}},
		"client's certificate is expired": {hbone.TLSExpired, func(t *testing.T, ca *hbonetest.CA, client, _ *tls.Config) {
			client.Certificates = []tls.Certificate{expired(t, ca)}
		}},
		"client's root is unknown": {hbone.TLSRejected, func(t *testing.T, _ *hbonetest.CA, client, _ *tls.Config) {
			client.Certificates = hbonetest.NewCA(t).ClientTLS(t, hbonetest.ClientID, "").Certificates
			// Go's client would keep a certificate back whose root the server did not name.
			cert := client.Certificates[0]
			client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			ca := hbonetest.NewCA(t)
			client, server := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(t, hbonetest.ServerID)
			test.setup(t, ca, client, server)
			w := newWorld(t, func(c *hbone.ClientConfig, s *hbone.ServerConfig) {
				c.TLS = func(context.Context, hbone.Key) (*tls.Config, error) { return client, nil }
				s.TLS = server
			})
			_, err := w.client.Open(t.Context(), key, request)
			var te *hbone.TLSError
			if !errors.As(err, &te) || te.Cause != test.want {
				t.Fatalf("Open = %v (%T), want cause %s", err, err, test.want)
			}
			if n := w.client.Stats().TLSFailures[test.want]; n != 1 {
				t.Errorf("counted %d times", n)
			}
			if n := w.net.dialed(); n != 1 {
				t.Errorf("%d dials: a verdict on a certificate must not be retried", n)
			}
		})
	}
}

func TestMissingOwnCertificateStopsBeforeTheDial(t *testing.T) {
	w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
		c.TLS = func(context.Context, hbone.Key) (*tls.Config, error) { return nil, hbone.ErrNoCertificate }
	})
	_, err := w.client.Open(t.Context(), key, request)
	var te *hbone.TLSError
	if !errors.As(err, &te) || te.Cause != hbone.TLSNoCertificate || w.net.dialed() != 0 {
		t.Errorf("Open = %v after %d dials", err, w.net.dialed())
	}
}

func TestSilentHandshakeTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.Dial = func(context.Context, hbone.Key) (net.Conn, error) {
				client, server := net.Pipe()
				go func() { // takes everything, says nothing, until the client hangs up
					defer func() { _ = server.Close() }()
					buf := make([]byte, 1024)
					for {
						if _, err := server.Read(buf); err != nil {
							return
						}
					}
				}()
				return client, nil
			}
		})
		_, err := w.client.Open(t.Context(), key, request)
		var te *hbone.TLSError
		if !errors.As(err, &te) || te.Cause != hbone.TLSTimeout || !te.Timeout() {
			t.Errorf("Open = %v", err)
		}
	})
}

func TestStatusReachesTheCaller(t *testing.T) {
	for _, status := range []int{400, 401, 503} {
		w := newWorld(t, func(_ *hbone.ClientConfig, s *hbone.ServerConfig) {
			s.Handler = func(r *hbone.ServerRequest) { r.Reject(status) }
		})
		_, err := w.client.Open(t.Context(), key, request)
		var se *hbone.StatusError
		if !errors.As(err, &se) || se.Status != status {
			t.Errorf("Open = %v, want status %d", err, status)
		}
		if s := w.client.Stats(); s.Streams != 0 || s.Retries != 0 {
			t.Errorf("after status %d: %+v", status, s)
		}
	}
}

func TestOpenContextEndsTheWaitOfOneOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			dial := c.Dial
			c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
				<-release
				return dial(ctx, k)
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := w.client.Open(ctx, key, request); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled Open = %v", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			tunnel, err := w.client.Open(t.Context(), key, request)
			if err != nil {
				t.Error(err)
				return
			}
			_ = tunnel.Close()
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(release)
		wg.Wait()
		if n := w.net.dialed(); n != 1 {
			t.Errorf("%d dials", n)
		}
	})
}

func TestDialThatNobodyWaitsForIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			c.Dial = func(ctx context.Context, _ hbone.Key) (net.Conn, error) {
				<-ctx.Done()
				close(ended)
				return nil, ctx.Err()
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := w.client.Open(ctx, key, request)
		<-ended
		if took := time.Since(start); took != time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Open = %v, dial ended after %v", err, took)
		}
		synctest.Wait()
		if s := w.client.Stats(); s.Keys != 0 {
			t.Errorf("pool keeps %+v", s)
		}
	})
}

func TestCloseEndsSessionsAndWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *hbone.ClientConfig, _ *hbone.ServerConfig) {
			dial := c.Dial
			c.Dial = func(ctx context.Context, k hbone.Key) (net.Conn, error) {
				if k != key {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return dial(ctx, k)
			}
		})
		tunnel := w.open(t)
		other := key
		other.Source = "other"
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := w.client.Open(t.Context(), other, request); !errors.Is(err, hbone.ErrClosed) {
				t.Errorf("waiting Open = %v", err)
			}
		})
		synctest.Wait()
		_ = w.client.Close()
		wg.Wait()
		if _, err := tunnel.Read(make([]byte, 1)); err == nil {
			t.Error("stream survived Close")
		}
		_ = tunnel.Close()
		if _, err := w.client.Open(t.Context(), key, request); !errors.Is(err, hbone.ErrClosed) {
			t.Errorf("Open after Close = %v", err)
		}
		_ = w.client.Close()
	})
}

func TestCloseKeysCutsAndRetireKeysDoesNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		all := func(k hbone.Key) bool { return k == key }
		first := w.open(t)
		w.client.RetireKeys(all)
		hbonetest.Ping(t, first)
		second := w.open(t)
		if second.Reused || second.Conn == first.Conn {
			t.Error("retired session was used again")
		}
		_ = first.Close()
		synctest.Wait()
		time.Sleep(5 * time.Second)
		if s := w.client.Stats(); s.Sessions != 1 {
			t.Errorf("retired session outlives its last stream: %+v", s)
		}
		w.client.CloseKeys(func(hbone.Key) bool { return false })
		hbonetest.Ping(t, second)
		w.client.CloseKeys(all)
		if _, err := second.Read(make([]byte, 1)); err == nil {
			t.Error("stream survived CloseKeys")
		}
		_ = second.Close()
		third := w.open(t)
		hbonetest.Ping(t, third)
		_ = third.Close()
	})
}

func TestInvalidRequestIsNotSent(t *testing.T) {
	w := newWorld(t, nil)
	for _, r := range []*hbone.Request{
		{},
		{Authority: "10.0.0.1"},
		{Authority: "10.0.0.1:80", TraceParent: "x"},
		{Authority: "10.0.0.1:80", Forwarded: hbone.Forwarded{Host: "a\"b"}},
	} {
		if _, err := w.client.Open(t.Context(), key, r); err == nil {
			t.Errorf("Open(%+v) succeeded", r)
		}
	}
	if n := w.net.dialed(); n != 0 {
		t.Errorf("%d dials", n)
	}
}
