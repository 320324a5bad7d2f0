package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := play(strings.Fields(role)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const trustDomain = "cluster.local"

// world is two nodes with a proxy each and the pods web (node1) and db (node2), whose
// addresses are loopback ones:
//
//	client ─► web's outbound ─ proxy 1 ═ HBONE ═ db:15008 ─ proxy 2 ─► server on db
type world struct {
	t        testing.TB
	ca       *certstest.Authority
	keeper   *certs.Keeper
	store    *dataplane.Store
	contents dataplane.Contents
	web, db  *fakePod
	nodes    [2]*node
}

// node is a proxy and what it needs.
type node struct {
	*Proxy
	telemetry *telemetry.Telemetry
	targets   *targets
}

type option func(*Config)

func newWorld(t testing.TB, options ...option) *world {
	t.Helper()
	w := &world{t: t, store: new(dataplane.Store), ca: certstest.New(t, trustDomain)}
	net := fmt.Sprintf("127.%d.%d.", 2+rand.IntN(250), rand.IntN(256))
	w.web, w.db = newFakePod(t, "web", net+"1"), newFakePod(t, "db", net+"2")
	w.contents = dataplane.Contents{
		TrustDomain: trustDomain, RootNamespace: "istio-system",
		Namespaces: []dataplane.Namespace{{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}}},
		Nodes: []dataplane.Node{
			{Name: "node1", PodCIDRs: []netip.Prefix{netip.MustParsePrefix(net + "0/24")}},
			{Name: "node2"},
		},
		Workloads: []dataplane.Workload{w.web.workload("node1"), w.db.workload("node2")},
		Captured:  map[string]bool{"web": true, "db": true},
	}
	w.publish(nil)
	snapshot, _ := w.store.Load()
	w.keeper = w.ca.Keeper(t, snapshot.Workload("web").Identity, snapshot.Workload("db").Identity)
	for i, name := range []string{"node1", "node2"} {
		w.nodes[i] = w.newNode(name, options...)
	}
	w.serve(w.nodes[0], w.web)
	w.serve(w.nodes[1], w.db)
	return w
}

// publish makes a snapshot of the contents after change.
func (w *world) publish(change func(c *dataplane.Contents)) {
	if change != nil {
		change(&w.contents)
	}
	c := w.contents
	c.Workloads = append([]dataplane.Workload(nil), c.Workloads...)
	c.Services = append([]dataplane.Service(nil), c.Services...)
	w.store.Publish(dataplane.NewSnapshot(c))
}

func (w *world) newNode(name string, options ...option) *node {
	w.t.Helper()
	tel, err := telemetry.New(telemetry.Config{})
	if err != nil {
		w.t.Fatal(err)
	}
	cfg := Config{Node: name, Store: w.store, Certs: w.keeper, Telemetry: tel, DiscoveryWait: 100 * time.Millisecond, ConnectTimeout: 5 * time.Second}
	for _, o := range options {
		o(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	n := &node{Proxy: p, telemetry: tel, targets: newTargets()}
	p.addresses = n.targets.of
	w.background(p.Run)
	return n
}

// background runs f until the test ends.
func (w *world) background(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
}

// serve serves pod until the test ends, or sooner by the returned functions.
func (w *world) serve(n *node, pod *fakePod) (drain, cut func(), done <-chan struct{}) {
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := n.ServePod(ctx, force, pod); err != nil {
			w.t.Error(err)
		}
	}()
	w.t.Cleanup(func() {
		drain()
		cut()
		<-ended
	})
	if snapshot, _ := w.store.Load(); snapshot.Workload(pod.uid) != nil {
		eventually(w.t, "the pod is served", func() bool {
			return slices.ContainsFunc(n.serving(pod.uid), func(s *servedPod) bool { return s.pod == Pod(pod) })
		})
	}
	return drain, cut, ended
}

// dial is the application of pod on n connecting to target.
func (w *world) dial(n *node, pod *fakePod, target netip.AddrPort) *net.TCPConn {
	w.t.Helper()
	return n.dial(w.t, pod.outbound, pod.addr, target)
}

// plain is a client at address from that reaches target in clear and is captured by pod on n.
func (w *world) plain(n *node, pod *fakePod, from netip.Addr, target netip.AddrPort) *net.TCPConn {
	w.t.Helper()
	return n.dial(w.t, pod.inbound, from, target)
}

func (n *node) dial(t testing.TB, l net.Listener, from netip.Addr, target netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	n.targets.set(addrPort(conn.LocalAddr()), target)
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// listen is an application of pod that serve gets each connection of.
func (w *world) listen(addr netip.Addr, serve func(c *net.TCPConn)) netip.AddrPort {
	w.t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		w.t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			work.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	w.t.Cleanup(func() {
		_ = l.Close()
		work.Wait()
	})
	return addrPort(l.Addr())
}

// echo sends back what it gets, and ends when the client did.
func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.CloseWrite()
	} else {
		reset(c)
	}
}

// targets is where connections were going before a listener captured them.
type targets struct {
	mu    sync.Mutex
	known sync.Cond
	by    map[netip.AddrPort]netip.AddrPort
}

func newTargets() *targets {
	t := &targets{by: make(map[netip.AddrPort]netip.AddrPort)}
	t.known.L = &t.mu
	return t
}

func (t *targets) set(client, target netip.AddrPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.by[client] = target
	t.known.Broadcast()
}

func (t *targets) of(c *netns.Conn) (destination, client netip.AddrPort) {
	client = c.Remote()
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if target, ok := t.by[client]; ok {
			return target, client
		}
		t.known.Wait()
	}
}

// fakePod is a Pod on loopback addresses.
type fakePod struct {
	uid               string
	addr              netip.Addr
	outbound, inbound *netns.Listener
	tunnel            *net.TCPListener

	mu     sync.Mutex
	plain  int                       // DialDirect calls
	apps   []netip.AddrPort          // clients that DialApp was asked for
	breaks func(remote string) error // makes DialTunnel fail
}

func newFakePod(t testing.TB, uid, addr string) *fakePod {
	t.Helper()
	p := &fakePod{uid: uid, addr: netip.MustParseAddr(addr)}
	p.tunnel = listenOn(t, netip.AddrPortFrom(p.addr, dataplane.PortTunnel))
	for _, l := range []**netns.Listener{&p.outbound, &p.inbound} {
		var err error
		if *l, err = netns.TakeListener(listenOn(t, netip.AddrPortFrom(p.addr, 0))); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*l).Close() })
	}
	return p
}

func listenOn(t testing.TB, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func (p *fakePod) workload(node string) dataplane.Workload {
	return dataplane.Workload{
		UID: p.uid, Name: dataplane.Name{Namespace: "shop", Name: p.uid}, ServiceAccount: p.uid,
		Node: node, Addrs: []netip.Addr{p.addr}, Phase: dataplane.PodRunning, Ready: true,
	}
}

func (p *fakePod) UID() string               { return p.uid }
func (p *fakePod) Outbound() *netns.Listener { return p.outbound }
func (p *fakePod) Inbound() *netns.Listener  { return p.inbound }
func (p *fakePod) Tunnel() *net.TCPListener  { return p.tunnel }

func (p *fakePod) DialTunnel(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error) {
	p.mu.Lock()
	fail := p.breaks
	p.mu.Unlock()
	if fail != nil {
		if err := fail(remote.String()); err != nil {
			return nil, err
		}
	}
	return dialFrom(ctx, p.addr, remote)
}

func (p *fakePod) DialDirect(ctx context.Context, remote netip.AddrPort) (*netns.Conn, error) {
	p.mu.Lock()
	p.plain++
	p.mu.Unlock()
	return connectFrom(ctx, p.addr, remote)
}

func (p *fakePod) DialApp(ctx context.Context, client, app netip.AddrPort, _ bool) (*netns.Conn, error) {
	p.mu.Lock()
	p.apps = append(p.apps, client)
	p.mu.Unlock()
	return connectFrom(ctx, client.Addr(), app)
}

func connectFrom(ctx context.Context, from netip.Addr, to netip.AddrPort) (*netns.Conn, error) {
	c, err := dialFrom(ctx, from, to)
	if err != nil {
		return nil, err
	}
	return netns.Take(c)
}

// addrPort is a TCP address unmapped.
func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func dialFrom(ctx context.Context, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (p *fakePod) dialedPlain() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.plain
}

func (p *fakePod) breakTunnels(f func(remote string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.breaks = f
}

func wantReset(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := io.Copy(io.Discard, c)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read ended with %v after %d bytes, want a connection reset", err, n)
	}
}

func wantEOF(t testing.TB, c net.Conn, want string) {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != want {
		t.Fatalf("read %q and %v, want %q and a clean end", got, err, want)
	}
}

func sendText(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func receive(t testing.TB, c net.Conn, want string) {
	t.Helper()
	p := make([]byte, len(want))
	if _, err := io.ReadFull(c, p); err != nil || string(p) != want {
		t.Fatalf("read %q and %v, want %q", p, err, want)
	}
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// events are the flow records of n so far.
func (n *node) events(event admin.FlowEvent) []admin.Flow {
	var found []admin.Flow
	_ = n.telemetry.Flows(context.Background(), false, func(f admin.Flow) error {
		if f.Event == event {
			found = append(found, f)
		}
		return nil
	})
	return found
}

// event waits for the one record of that kind.
func (n *node) event(t testing.TB, event admin.FlowEvent) admin.Flow {
	t.Helper()
	eventually(t, fmt.Sprintf("a record of a connection that is %s", event), func() bool { return len(n.events(event)) > 0 })
	return n.events(event)[0]
}

func workloadID(name string) spiffe.ID {
	return spiffe.ID{TrustDomain: trustDomain, Namespace: "shop", ServiceAccount: name}
}

var _ Certificates = (*certs.Keeper)(nil)
