package link

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/dataplane/paths"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// rate is the bandwidth of the benchmarks' paths, in bits a second.
const rate = 200_000_000

// tunnels is a client in one namespace and a server in the other, with a link between.
type tunnels struct {
	clients map[string]*hbone.Client // by transport
	key     hbone.Key
	link    *Link
	broken  chan error  // how streams broke that the server echoed
	ours    paths.Judge // the client's, with both transports
	theirs  paths.Judge
}

// serve sends as many bytes as the first eight that it gets say, and echoes the rest.
func (w *tunnels) serve(r *hbone.ServerRequest) {
	var response hbone.Response
	if tcp, ok := r.Conn.Raw.(*net.TCPConn); ok {
		w.theirs.Watch(r.Conn.Remote.Addr(), tcp)
		if q := w.theirs.Ours(r.Conn.Remote.Addr()); q.Bad() {
			response.Path = q.String()
		}
	}
	s, err := r.Accept(response)
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
	if _, err := io.Copy(struct{ io.Writer }{s}, s); err != nil {
		select {
		case w.broken <- err:
		default:
		}
		return
	}
	_ = s.CloseWrite()
}

// pings are h2.Client's and h3.Config's.
type pings struct{ interval, timeout time.Duration }

func newTunnels(t testing.TB, way Path, transports ...string) *tunnels {
	t.Helper()
	return newTunnelsPinging(t, way, pings{}, transports...)
}

func newTunnelsPinging(t testing.TB, way Path, p pings, transports ...string) *tunnels {
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
	addr := netip.AddrPortFrom(l.B.V4, 15008)
	w := &tunnels{
		clients: make(map[string]*hbone.Client), key: hbone.Key{Remote: addr, Local: l.A.V4}, link: l, broken: make(chan error, 1),
	}
	server := hbone.NewServer(hbone.ServerConfig{
		TLS: ca.ServerTLS(t, hbonetest.ServerID), Handler: w.serve,
		Transport: h2.Server{PingInterval: p.interval, PingTimeout: p.timeout},
	})
	ctx, cancel := context.WithCancel(context.Background())
	var served errgroup.Group
	for _, transport := range transports {
		client := hbone.ClientConfig{TLS: func(context.Context, hbone.Key) (*tls.Config, error) { return cfg, nil }}
		switch transport {
		case "h2":
			client.Transport = h2.Client{PingInterval: p.interval, PingTimeout: p.timeout}
			client.Dial = func(ctx context.Context, key hbone.Key) (net.Conn, error) {
				return a.Dial(ctx, netns.DialConfig{Remote: key.Remote})
			}
			listener := netnstest.Listen(t, b, "tcp", addr.String())
			served.Go(func() error { return server.Serve(ctx, ctx, listener) })
		case "h3":
			client.Connector = newEndpoint(t, a, netip.AddrPortFrom(l.A.V4, 15008), p)
			endpoint := newEndpoint(t, b, addr, p)
			served.Go(func() error { return server.ServeEndpoint(ctx, ctx, endpoint) })
		}
		w.clients[transport] = hbone.NewClient(client)
	}
	t.Cleanup(func() {
		for _, c := range w.clients {
			_ = c.Close()
		}
		cancel()
		if err := served.Wait(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// open opens a stream by the only transport, or by the one that suits the path.
func (w *tunnels) open(ctx context.Context) (*hbone.Tunnel, error) {
	peer := w.key.Remote.Addr()
	transport := slices.Collect(maps.Keys(w.clients))[0]
	if len(w.clients) > 1 {
		transport = "h2"
		if bad, _ := w.ours.Bad(peer); bad {
			transport = "h3"
		}
	}
	s, err := w.clients[transport].Open(ctx, w.key, &hbone.Request{Authority: "10.99.0.2:80"})
	if err != nil {
		return nil, err
	}
	if tcp, ok := s.Conn.Raw.(*net.TCPConn); ok {
		w.ours.Watch(peer, tcp)
	}
	if q, err := paths.Parse(s.Response.Path); err == nil {
		w.ours.Hear(peer, q)
	}
	return s, nil
}

func newEndpoint(t testing.TB, ns *netns.Namespace, addr netip.AddrPort, p pings) *h3.Endpoint {
	t.Helper()
	var conn *net.UDPConn
	netnstest.Do(t, ns, func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	})
	e, err := h3.New(h3.Config{Conn: conn, PingInterval: p.interval, PingTimeout: p.timeout})
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

// ask opens a stream and asks for n bytes.
func (w *tunnels) ask(ctx context.Context, n int) (*hbone.Tunnel, error) {
	s, err := w.open(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := s.Write(binary.BigEndian.AppendUint64(nil, uint64(n))); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// get fetches n bytes and leaves the stream to echo.
func (w *tunnels) get(ctx context.Context, n int) (*hbone.Tunnel, error) {
	s, err := w.ask(ctx, n)
	if err != nil {
		return nil, err
	}
	if _, err := io.CopyN(io.Discard, s, int64(n)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func TestTunnelsCarryAllOverALinkThatLosesAndReorders(t *testing.T) {
	for _, transport := range []string{"h2", "h3"} {
		t.Run(transport, func(t *testing.T) {
			w := newTunnels(t, Path{Delay: 2 * time.Millisecond, Loss: 0.02, Reorder: 0.02, Rate: rate}, transport)
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

// A stream that waits for a peer beyond a path that carries nothing any more ends on both sides, within
// the same time by either transport.
func TestStreamsEndWhenThePathIsDead(t *testing.T) {
	t.Parallel()
	p := pings{interval: 2 * time.Second, timeout: 2 * time.Second}
	for _, transport := range []string{"h2", "h3"} {
		for _, sends := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sends=%v", transport, sends), func(t *testing.T) {
				t.Parallel()
				w := newTunnelsPinging(t, Path{Delay: 5 * time.Millisecond}, p, transport)
				s, err := w.get(t.Context(), 1)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = s.Close() }()
				time.Sleep(p.interval / 4)
				w.link.Cut()
				start := time.Now()
				if sends {
					time.Sleep(p.interval * 9 / 10) // quic-go's idle timeout begins anew with it
					if _, err := s.Write([]byte("x")); err != nil {
						t.Fatal(err)
					}
				}
				ended := make(chan error, 1)
				go func() {
					_, err := s.Read(make([]byte, 1))
					ended <- err
				}()
				for side, broken := range map[string]chan error{"client": ended, "server": w.broken} {
					select {
					case err := <-broken:
						if took := time.Since(start); !errors.Is(err, hbone.ErrPeerSilent) || took > p.interval+p.timeout+time.Second {
							t.Errorf("%s: %v after %v, want silence within %v", side, err, took, p.interval+p.timeout)
						}
					case <-time.After(10 * time.Second):
						t.Errorf("%s: the stream lives 10 s after its path", side)
					}
				}
			})
		}
	}
}

// The path decides which transport carries the next stream, by what either end lost.
func TestAPathThatLosesPacketsIsTakenByHTTP3(t *testing.T) {
	for loss, want := range map[float64]bool{0: false, 0.02: true} {
		t.Run(fmt.Sprintf("%v%%", loss*100), func(t *testing.T) {
			w := newTunnels(t, Path{Delay: 5 * time.Millisecond, Loss: loss, Rate: rate, Seed: 1}, "h2", "h3")
			over3 := false
			for deadline := time.Now().Add(20 * time.Second); !over3 && time.Now().Before(deadline); {
				s, err := w.get(t.Context(), 1<<20)
				if err != nil {
					t.Fatal(err)
				}
				over3 = s.Conn.Raw == nil
				_ = s.Close()
				if !want && w.theirs.Ours(w.key.Local).Segments > 4000 {
					break
				}
			}
			if over3 != want {
				t.Errorf("by HTTP/3: %v, want %v", over3, want)
			}
		})
	}
}
