package link

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// rate is the bandwidth of the benchmarks' paths, in bits a second.
const rate = 200_000_000

// tunnels is a client in one namespace and a server in the other, with a link between.
type tunnels struct {
	client *hbone.Client
	key    hbone.Key
}

// serveBytes sends as many bytes as the first eight that it gets say, and echoes the rest.
func serveBytes(r *hbone.ServerRequest) {
	s, err := r.Accept(hbone.Response{})
	if err != nil {
		return
	}
	defer func() { _ = s.Close() }()
	var length [8]byte
	if _, err := io.ReadFull(s, length[:]); err != nil {
		return
	}
	buf := make([]byte, 128<<10)
	for left := binary.BigEndian.Uint64(length[:]); left > 0; {
		n, err := s.Write(buf[:min(left, uint64(len(buf)))])
		if err != nil {
			return
		}
		left -= uint64(n)
	}
	if _, err := io.Copy(struct{ io.Writer }{s}, s); err == nil {
		_ = s.CloseWrite()
	}
}

func newTunnels(t testing.TB, transport string, way Path) *tunnels {
	t.Helper()
	back := way
	back.Seed++
	l, a, b := connect(t, way, back)
	for _, ns := range []*netns.Namespace{a, b} {
		// What most hosts have, and quic-go has as well.
		netnstest.Do(t, ns, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("cubic"), 0o644)
		})
	}
	ca := hbonetest.NewCA(t)
	cfg := ca.ClientTLS(t, hbonetest.ClientID, hbonetest.ServerID)
	client := hbone.ClientConfig{TLS: func(context.Context, hbone.Key) (*tls.Config, error) { return cfg, nil }}
	server := hbone.ServerConfig{TLS: ca.ServerTLS(t, hbonetest.ServerID), Handler: serveBytes, Transport: h2.Server{}}
	addr := netip.AddrPortFrom(l.B.V4, 15008)
	var serve func(ctx context.Context, srv *hbone.Server) error
	switch transport {
	case "h2":
		client.Transport = h2.Client{}
		client.Dial = func(ctx context.Context, key hbone.Key) (net.Conn, error) {
			return a.Dial(ctx, netns.DialConfig{Remote: key.Remote})
		}
		listener := netnstest.Listen(t, b, "tcp", addr.String())
		serve = func(ctx context.Context, srv *hbone.Server) error { return srv.Serve(ctx, ctx, listener) }
	case "h3":
		client.Connector = newEndpoint(t, a, netip.AddrPortFrom(l.A.V4, 15008))
		endpoint := newEndpoint(t, b, addr)
		serve = func(ctx context.Context, srv *hbone.Server) error { return srv.ServeEndpoint(ctx, ctx, endpoint) }
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, hbone.NewServer(server)) }()
	w := &tunnels{client: hbone.NewClient(client), key: hbone.Key{Remote: addr, Local: l.A.V4}}
	t.Cleanup(func() {
		_ = w.client.Close()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return w
}

func newEndpoint(t testing.TB, ns *netns.Namespace, addr netip.AddrPort) *h3.Endpoint {
	t.Helper()
	var conn *net.UDPConn
	netnstest.Do(t, ns, func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	})
	e, err := h3.New(h3.Config{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// get fetches n bytes and leaves the stream to echo.
func (w *tunnels) get(ctx context.Context, n int) (*hbone.Tunnel, error) {
	s, err := w.client.Open(ctx, w.key, &hbone.Request{Authority: "10.99.0.2:80"})
	if err != nil {
		return nil, err
	}
	if _, err := s.Write(binary.BigEndian.AppendUint64(nil, uint64(n))); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if _, err := io.CopyN(io.Discard, s, int64(n)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func TestTunnelsCarryAllOverALinkThatLosesAndReorders(t *testing.T) {
	for _, transport := range []string{"h2", "h3"} {
		t.Run(transport, func(t *testing.T) {
			w := newTunnels(t, transport, Path{Delay: 2 * time.Millisecond, Loss: 0.02, Reorder: 0.02, Rate: rate})
			s, err := w.get(t.Context(), 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			if _, err := s.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			if err := s.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if all, err := io.ReadAll(s); string(all) != "ping" || err != nil {
				t.Errorf("echo = %q, %v", all, err)
			}
		})
	}
}

// paths calls run for each transport, round trip and loss.
func paths(b *testing.B, run func(b *testing.B, transport string, way Path)) {
	for _, rtt := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 80 * time.Millisecond} {
		for _, loss := range []float64{0, 0.001, 0.01, 0.03} {
			for _, transport := range []string{"h2", "h3"} {
				name := fmt.Sprintf("rtt=%v/loss=%v%%/%s", rtt, loss*100, transport)
				b.Run(name, func(b *testing.B) {
					run(b, transport, Path{Delay: rtt / 2, Loss: loss, Rate: rate, Seed: 1})
				})
			}
		}
	}
}

// BenchmarkBulk is 4 MiB by 1 and by 8 streams of one connection.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			paths(b, func(b *testing.B, transport string, way Path) {
				const total = 4 << 20
				w := newTunnels(b, transport, way)
				s, err := w.get(b.Context(), 1) // the handshake
				if err != nil {
					b.Fatal(err)
				}
				_ = s.Close()
				b.SetBytes(total)
				for b.Loop() {
					var work sync.WaitGroup
					for range streams {
						work.Go(func() {
							s, err := w.get(b.Context(), total/streams)
							if err != nil {
								b.Error(err)
								return
							}
							_ = s.Close()
						})
					}
					work.Wait()
				}
			})
		})
	}
}

// BenchmarkRequestBesideBulk is 256 bytes there and back while another stream of the connection
// moves bulk.
func BenchmarkRequestBesideBulk(b *testing.B) {
	paths(b, func(b *testing.B, transport string, way Path) {
		w := newTunnels(b, transport, way)
		s, err := w.get(b.Context(), 1)
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		ctx, cancel := context.WithCancel(b.Context())
		var bulk sync.WaitGroup
		bulk.Go(func() {
			for ctx.Err() == nil {
				if s, err := w.get(ctx, 1<<20); err == nil {
					_ = s.Close()
				}
			}
		})
		defer bulk.Wait()
		defer cancel()
		var took []time.Duration
		buf := make([]byte, 256)
		for b.Loop() {
			start := time.Now()
			if _, err := s.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(s, buf); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	})
}
