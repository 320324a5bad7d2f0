package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// fakeDatagrams is a pod's UDP without a kernel: what applications send and get are queues.
type fakeDatagrams struct {
	sent     chan fakeDatagram // by applications
	got      chan fakeDatagram // by applications
	closed   chan fakeDatagram // ports, of which the kernel tells
	told     chan string       // what applications were told
	deadline chan struct{}

	quic func() (*net.UDPConn, error) // nil: there is none

	mu      sync.Mutex
	kept    map[[2]netip.AddrPort]bool
	expired bool
}

type fakeDatagram struct {
	from, to netip.AddrPort
	payload  string
	whole    bool
	segment  int
}

func newFakeDatagrams() *fakeDatagrams {
	return &fakeDatagrams{
		sent: make(chan fakeDatagram, 1000), got: make(chan fakeDatagram, 1000), closed: make(chan fakeDatagram, 10), told: make(chan string, 10),
		deadline: make(chan struct{}), kept: make(map[[2]netip.AddrPort]bool),
	}
}

func (d *fakeDatagrams) Wait() error { return nil }

func (d *fakeDatagrams) Receive(b []byte) (int, dataplane.Datagram, error) {
	select {
	case s := <-d.sent:
		return copy(b, s.payload), dataplane.Datagram{From: s.from, To: s.to, Whole: s.whole, Segment: s.segment}, nil
	case <-d.deadline:
		return 0, dataplane.Datagram{}, os.ErrDeadlineExceeded
	}
}

func (d *fakeDatagrams) Deliver(from, to netip.AddrPort, payload []byte) error {
	d.got <- fakeDatagram{from: from, to: to, payload: string(payload)}
	return nil
}

func (d *fakeDatagrams) Refuse(app, peer netip.AddrPort) error {
	d.told <- fmt.Sprint("refused ", app, " ", peer)
	return nil
}

func (d *fakeDatagrams) TooBig(app, peer netip.AddrPort, size, longest int) error {
	d.told <- fmt.Sprint("too big ", app, " ", peer, " ", size, " ", longest)
	return nil
}

func (d *fakeDatagrams) Refused(bool) (client, app netip.AddrPort, err error) {
	select {
	case c := <-d.closed:
		return c.from, c.to, nil
	case <-d.deadline:
		return client, app, net.ErrClosed
	}
}

func (d *fakeDatagrams) QUIC() (conn *net.UDPConn, mark [2]byte, err error) {
	if d.quic != nil {
		conn, err = d.quic()
	}
	return conn, mark, err
}

func (d *fakeDatagrams) Families() (v4, v6 bool) { return true, false }

func (d *fakeDatagrams) Keep(app, client netip.AddrPort) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kept[[2]netip.AddrPort{app, client}] = true
	return nil
}

func (d *fakeDatagrams) Forget(app, client netip.AddrPort) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.kept, [2]netip.AddrPort{app, client})
}

func (d *fakeDatagrams) keeps() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.kept)
}

func (d *fakeDatagrams) SetDeadline(t time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !t.IsZero() && !d.expired {
		d.expired = true
		close(d.deadline)
	}
	return nil
}

// hear is what an application gets next.
func (d *fakeDatagrams) hear(t testing.TB) fakeDatagram {
	t.Helper()
	select {
	case g := <-d.got:
		return g
	case <-time.After(30 * time.Second):
		t.Fatal("no datagram arrived")
		panic("unreachable")
	}
}

// udpWorld is a world in which web and db speak UDP to each other.
type udpWorld struct {
	*world
	webUDP, dbUDP *fakeDatagrams
	stopDB        func()
}

func newUDPWorld(t testing.TB, options ...option) *udpWorld {
	t.Helper()
	w := newWorld(t, append(options, func(c *Config) {
		c.ClientTransport, c.ServerTransport = datagramTransport{}, datagramTransport{}
	})...)
	u := &udpWorld{world: w, webUDP: newFakeDatagrams(), dbUDP: newFakeDatagrams()}
	if w.nodes[0].cfg.ResetKey != nil {
		u.webUDP.quic, u.dbUDP.quic = tunnelPort(w.web), tunnelPort(w.db)
	}
	w.publish(func(c *dataplane.Contents) { c.UDP = map[string]bool{"web": true, "db": true} })
	u.serveUDP(w.nodes[0], w.web, u.webUDP)
	u.stopDB = u.serveUDP(w.nodes[1], w.db, u.dbUDP)
	return u
}

// tunnelPort makes a socket at the pod's UDP port 15008.
func tunnelPort(p *fakePod) func() (*net.UDPConn, error) {
	return func() (*net.UDPConn, error) {
		return net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.addr, dataplane.PortTunnel)))
	}
}

// overQUIC has the flows of a world go by QUIC.
func overQUIC(c *Config) { c.UDP, c.ResetKey = true, &[32]byte{1} }

func (u *udpWorld) serveUDP(n *node, pod *fakePod, d *fakeDatagrams) (stop func()) {
	drain, cut, done := u.startUDP(n, pod, d)
	return func() {
		cut()
		drain()
		<-done
	}
}

// startUDP serves a pod's UDP until the test ends, or sooner by the returned functions.
func (u *udpWorld) startUDP(n *node, pod *fakePod, d *fakeDatagrams) (drain, cut func(), done <-chan struct{}) {
	ctx, drain := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := n.ServeUDP(ctx, force, pod.uid, d); err != nil {
			u.t.Error(err)
		}
	}()
	u.t.Cleanup(func() {
		cut()
		drain()
		<-ended
	})
	eventually(u.t, "UDP is served", func() bool { return n.serving(pod.uid)[0].datagrams() != nil })
	return drain, cut, ended
}

func (u *udpWorld) at(p *fakePod, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.addr, port)
}

// open sends the first datagram of a flow from web to db.
func (u *udpWorld) open(t testing.TB) (app, server netip.AddrPort) {
	t.Helper()
	app, server = u.at(u.web, 40000), u.at(u.db, 9000)
	u.webUDP.sent <- fakeDatagram{from: app, to: server, payload: "question"}
	if got, want := u.dbUDP.hear(t), (fakeDatagram{from: app, to: server, payload: "question"}); got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	return app, server
}

func (u *udpWorld) flows(n *node, uid string) int {
	d := n.serving(uid)[0].datagrams()
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.live)
}

func TestUDPFlowBothWays(t *testing.T) {
	t.Run("QUIC", func(t *testing.T) { testFlowBothWays(t, newUDPWorld(t, overQUIC)) })
	t.Run("another transport", func(t *testing.T) { testFlowBothWays(t, newUDPWorld(t)) })
}

func testFlowBothWays(t *testing.T, u *udpWorld) {
	app, server := u.open(t)
	for i := range 100 {
		text := fmt.Sprint("answer ", i)
		u.dbUDP.sent <- fakeDatagram{from: server, to: app, payload: text}
		if got, want := u.webUDP.hear(t), (fakeDatagram{from: server, to: app, payload: text}); got != want {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
	if n := u.flows(u.nodes[1], "db"); n != 1 {
		t.Errorf("the server's node has %d flows, want the client's alone", n)
	}
	if n := u.dbUDP.keeps(); n != 1 {
		t.Errorf("the answers of %d flows are kept, want 1", n)
	}
	for i, n := range u.nodes {
		open := n.telemetry.Connections()
		if len(open) != 1 || open[0].Protocol != dataplane.ProtocolHBONEUDP || open[0].Source.Identity.IsZero() || open[0].Destination.Identity.IsZero() {
			t.Errorf("node %d: connections %+v, want one of UDP with both identities", i, open)
		}
		if n.Live([]string{"web", "db"}[i]) != 0 {
			t.Errorf("node %d waits for flows of UDP", i)
		}
	}
}

// Many datagrams in one buffer arrive one by one.
func TestUDPSegmentsArriveOneByOne(t *testing.T) {
	u := newUDPWorld(t)
	app, server := u.at(u.web, 40000), u.at(u.db, 9000)
	u.webUDP.sent <- fakeDatagram{from: app, to: server, payload: strings.Repeat("a", 10) + strings.Repeat("b", 10) + "c", segment: 10}
	for _, want := range []string{"aaaaaaaaaa", "bbbbbbbbbb", "c"} {
		if got := u.dbUDP.hear(t).payload; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestUDPEmptyDatagram(t *testing.T) {
	u := newUDPWorld(t)
	app, server := u.open(t)
	u.webUDP.sent <- fakeDatagram{from: app, to: server}
	if got := u.dbUDP.hear(t); got.payload != "" {
		t.Errorf("got %+v, want an empty datagram", got)
	}
}

// A policy that denies a flow refuses it, and one that comes later ends it.
func TestUDPPolicy(t *testing.T) {
	u := newUDPWorld(t, overQUIC)
	u.open(t)
	u.publish(func(c *dataplane.Contents) {
		c.Authorizations = []dataplane.AuthorizationPolicy{{
			Name: dataplane.Name{Namespace: "shop", Name: "nobody"}, Action: dataplane.ActionAllow,
		}}
	})
	eventually(t, "the flow ends", func() bool {
		return u.flows(u.nodes[0], "web") == 0 && u.flows(u.nodes[1], "db") == 0 && u.dbUDP.keeps() == 0
	})
	u.webUDP.sent <- fakeDatagram{from: u.at(u.web, 40001), to: u.at(u.db, 9000), payload: "denied"}
	eventually(t, "the denial is told", func() bool {
		return u.nodes[1].telemetry.PolicyCounts("AuthorizationPolicy", dataplane.Name{Namespace: "shop", Name: "nobody"}, false).Denied > 0 ||
			len(u.nodes[1].telemetry.Connections()) == 0
	})
	select {
	case d := <-u.dbUDP.got:
		t.Errorf("%+v arrived although it is denied", d)
	default:
	}
}

func TestUDPClosedPortIsTold(t *testing.T) {
	u := newUDPWorld(t, overQUIC)
	app, server := u.open(t)
	u.dbUDP.closed <- fakeDatagram{from: app, to: server}
	select {
	case got := <-u.webUDP.told:
		if want := fmt.Sprint("refused ", app, " ", server); got != want {
			t.Errorf("the application is told %q, want %q", got, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the application is told nothing")
	}
	eventually(t, "the flows end", func() bool { return u.flows(u.nodes[0], "web") == 0 && u.flows(u.nodes[1], "db") == 0 })
}

func TestUDPTooBigIsTold(t *testing.T) {
	u := newUDPWorld(t)
	app, server := u.open(t)
	long := strings.Repeat("x", 1200)
	u.webUDP.sent <- fakeDatagram{from: app, to: server, payload: long, whole: true}
	u.webUDP.sent <- fakeDatagram{from: app, to: server, payload: long}
	if got := u.dbUDP.hear(t).payload; got != long {
		t.Errorf("%d bytes arrived, want the datagram that may be fragmented", len(got))
	}
	if got, want := <-u.webUDP.told, fmt.Sprint("too big ", app, " ", server, " 1200 1000"); got != want {
		t.Errorf("the application is told %q, want %q", got, want)
	}
}

// What nobody uses ends, and begins anew with the next datagram.
func TestUDPExpiry(t *testing.T) {
	u := newUDPWorld(t)
	for _, n := range u.nodes {
		n.cfg.DatagramIdle = 20 * time.Millisecond
	}
	app, server := u.open(t)
	eventually(t, "the flows expire", func() bool { return u.flows(u.nodes[0], "web") == 0 && u.flows(u.nodes[1], "db") == 0 })
	u.webUDP.sent <- fakeDatagram{from: app, to: server, payload: "again"}
	if got := u.dbUDP.hear(t).payload; got != "again" {
		t.Errorf("got %q", got)
	}
}

func TestUDPIdleIsTwoMinutesAtLeast(t *testing.T) {
	c := Config{DatagramIdle: time.Second}.withDefaults()
	if c.DatagramIdle != 2*time.Minute || c.DNSIdle != 30*time.Second {
		t.Errorf("%v and %v for DNS", c.DatagramIdle, c.DNSIdle)
	}
}

// A pod may have so many flows, and no more.
func TestUDPFlowsAreBounded(t *testing.T) {
	u := newUDPWorld(t, func(c *Config) { c.Limits.PodFlows = 2 })
	server := u.at(u.db, 9000)
	for i := range 5 {
		u.webUDP.sent <- fakeDatagram{from: u.at(u.web, uint16(40000+i)), to: server, payload: fmt.Sprint(i)}
	}
	heard := map[string]bool{u.dbUDP.hear(t).payload: true, u.dbUDP.hear(t).payload: true}
	if !heard["0"] || !heard["1"] {
		t.Errorf("heard %v, want the first two", heard)
	}
	if n := u.flows(u.nodes[0], "web"); n != 2 {
		t.Errorf("%d flows, want 2", n)
	}
}

// Many flows, each with its answer. So many at a time as the queues of a connection hold.
func TestUDPManyFlows(t *testing.T) {
	u := newUDPWorld(t, overQUIC)
	const rounds, flows = 20, 25
	for round := range rounds {
		for i := range flows {
			port := uint16(10000 + round*flows + i)
			u.webUDP.sent <- fakeDatagram{from: u.at(u.web, port), to: u.at(u.db, 9000), payload: fmt.Sprint(port)}
		}
		for range flows {
			got := u.dbUDP.hear(t)
			u.dbUDP.sent <- fakeDatagram{from: got.to, to: got.from, payload: got.payload}
		}
		for range flows {
			if got := u.webUDP.hear(t); fmt.Sprint(got.to.Port()) != got.payload {
				t.Errorf("%v got the answer to %s", got.to, got.payload)
			}
		}
	}
	if n := u.flows(u.nodes[0], "web"); n != rounds*flows {
		t.Errorf("%d flows, want %d", n, rounds*flows)
	}
}

// What is sent to a pod that has not published that it takes UDP is dropped, never in clear.
func TestUDPToWhoDoesNotSpeakIt(t *testing.T) {
	u := newUDPWorld(t)
	u.publish(func(c *dataplane.Contents) { c.UDP = map[string]bool{"web": true} })
	u.webUDP.sent <- fakeDatagram{from: u.at(u.web, 40000), to: u.at(u.db, 9000), payload: "lost"}
	flows := u.nodes[0].telemetry
	eventually(t, "the flow fails", func() bool { return len(flows.Connections()) == 0 && u.flows(u.nodes[0], "web") == 1 })
	want := fmt.Sprint("refused ", u.at(u.web, 40000), " ", u.at(u.db, 9000))
	eventually(t, "the application is told", func() bool { return len(u.webUDP.told) > 0 && <-u.webUDP.told == want })
	eventually(t, "it can be tried again", func() bool { return u.flows(u.nodes[0], "web") == 0 })
}

// Without captured UDP on its side an agent answers 501, and tells so.
func TestUDPNotCapturedByThePeer(t *testing.T) {
	u := newUDPWorld(t)
	u.stopDB()
	u.webUDP.sent <- fakeDatagram{from: u.at(u.web, 40000), to: u.at(u.db, 9000), payload: "lost"}
	eventually(t, "the flow has failed", func() bool { return u.flows(u.nodes[0], "web") == 0 })
}

// A flow that begins anew on the client's side takes the place of the one before.
func TestUDPFlowTakesTheOldOnesPlace(t *testing.T) {
	u := newUDPWorld(t)
	app, server := u.open(t)
	d := u.nodes[0].serving("web")[0].datagrams()
	d.mu.Lock()
	old := d.flows[ends{app: app, peer: server}]
	delete(d.flows, ends{app: app, peer: server}) // as a client's agent that was killed
	d.mu.Unlock()
	u.open(t)
	eventually(t, "the old flow ends", func() bool {
		old.mu.Lock()
		defer old.mu.Unlock()
		return old.ended && u.flows(u.nodes[1], "db") == 1
	})
	if n := u.dbUDP.keeps(); n != 1 {
		t.Errorf("the answers of %d flows are kept, want 1", n)
	}
	u.dbUDP.sent <- fakeDatagram{from: server, to: app, payload: "answer"}
	if got := u.webUDP.hear(t).payload; got != "answer" {
		t.Errorf("got %q", got)
	}
}

// A datagram whose sender is none of the pod's is dropped, and what follows is not.
func TestUDPForgedSource(t *testing.T) {
	u := newUDPWorld(t)
	forged := &forgingDatagrams{fakeDatagrams: newFakeDatagrams()}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- u.nodes[0].ServeUDP(ctx, ctx, "web", forged) }()
	forged.sent <- fakeDatagram{from: u.at(u.web, 40000), to: u.at(u.db, 9000), payload: "honest"}
	if got := u.dbUDP.hear(t).payload; got != "honest" {
		t.Errorf("got %q", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// When one part of it fails or is closed, all end, the tunnels over QUIC too, and it may be served anew.
func TestUDPEndsWhenAPartOfItDoes(t *testing.T) {
	u := newUDPWorld(t, overQUIC)
	broken := errors.New("the raw socket broke")
	for name, want := range map[string]error{"a failure": broken, "closed": nil} {
		t.Run(name, func(t *testing.T) {
			d := &breakingDatagrams{fakeDatagrams: newFakeDatagrams(), broken: make(chan error)}
			d.quic = func() (*net.UDPConn, error) { return net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}) }
			done := make(chan error, 1)
			go func() { done <- u.nodes[0].ServeUDP(t.Context(), t.Context(), "web", d) }()
			d.broken <- cmp.Or(want, net.ErrClosed)
			select {
			case err := <-done:
				if !errors.Is(err, want) {
					t.Errorf("ServeUDP = %v, want %v", err, want)
				}
			case <-time.After(10 * time.Second):
				t.Error("ServeUDP goes on")
			}
		})
	}
}

// breakingDatagrams has Refused fail as it is told to.
type breakingDatagrams struct {
	*fakeDatagrams
	broken chan error
}

func (d *breakingDatagrams) Refused(bool) (client, app netip.AddrPort, err error) {
	return client, app, <-d.broken
}

// forgingDatagrams fails once.
type forgingDatagrams struct {
	*fakeDatagrams
	once sync.Once
}

func (d *forgingDatagrams) Receive(b []byte) (n int, got dataplane.Datagram, err error) {
	d.once.Do(func() { err = errors.New("not an address of the pod") })
	if err != nil {
		return 0, got, err
	}
	return d.fakeDatagrams.Receive(b)
}
