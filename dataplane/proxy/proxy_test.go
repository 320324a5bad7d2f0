package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
)

// unused is an address of pod where nothing listens.
func (w *world) unused(pod *fakePod) netip.AddrPort { return netip.AddrPortFrom(pod.addr, 1) }

func TestTunnelTellsWhoTalksToWhom(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	w.publish(func(c *dataplane.Contents) { c.Services = []dataplane.Service{service(w, "db", app)} })
	c := w.dial(w.nodes[0], w.web, netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), 80))
	sendText(t, c, "hello")
	receive(t, c, "hello")
	for i, n := range w.nodes {
		eventually(t, "the bytes are counted", func() bool {
			conns := n.telemetry.Connections()
			return len(conns) == 1 && conns[0].Received == 5
		})
		conns := n.telemetry.Connections()
		got := conns[0]
		got.ID, got.Opened, got.RTTMicros, got.Retransmits = "", time.Time{}, 0, 0
		want := admin.Connection{
			Direction: [...]string{"outbound", "inbound"}[i], Protocol: dataplane.ProtocolHBONE,
			Source:      admin.Peer{Addr: addrPort(c.LocalAddr()), Workload: "web", Namespace: "shop", Identity: workloadID("web")},
			Destination: admin.Peer{Addr: app, Workload: "db", Namespace: "shop", Identity: workloadID("db")},
			Service:     "db.shop.svc.cluster.local", Sent: 5, Received: 5,
			Tunnel: netip.AddrPortFrom(w.db.addr, dataplane.PortTunnel),
		}
		if got != want {
			t.Errorf("node %d:\n got %+v\nwant %+v", i+1, got, want)
		}
	}
	if got := w.db.apps[0]; got != addrPort(c.LocalAddr()) {
		t.Errorf("the application was reached as %s, want as the client %s", got, c.LocalAddr())
	}
	if n := w.web.dialedPlain(); n != 0 {
		t.Errorf("%d plain dials", n)
	}
}

func service(w *world, name string, targets ...netip.AddrPort) dataplane.Service {
	s := dataplane.Service{
		Name: dataplane.Name{Namespace: "shop", Name: name}, Host: name + ".shop.svc.cluster.local",
		Addrs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Ports: []dataplane.ServicePort{{Name: "tcp", Port: 80}},
	}
	for _, target := range targets {
		uid := ""
		for _, pod := range []*fakePod{w.web, w.db} {
			if pod.addr == target.Addr() {
				uid = pod.uid
			}
		}
		s.Endpoints = append(s.Endpoints, dataplane.Endpoint{
			Addr: target.Addr(), WorkloadUID: uid, Ready: true, Serving: true, Ports: map[string]uint16{"tcp": target.Port()},
		})
	}
	return s
}

func TestWhatCannotBeReachedIsAReset(t *testing.T) {
	deny := func(c *dataplane.Contents) { c.Authorizations = []dataplane.AuthorizationPolicy{denyAll("db")} }
	for name, c := range map[string]struct {
		target  func(w *world) netip.AddrPort
		prepare func(w *world)
		event   admin.FlowEvent
		flags   telemetry.Flags
		cause   string
	}{
		"application port is closed": {
			target: func(w *world) netip.AddrPort { return w.unused(w.db) },
			event:  admin.FlowFailed, flags: telemetry.FlagsConnect, cause: "503",
		},
		"policy denies": {
			target:  func(w *world) netip.AddrPort { return w.listen(w.db.addr, echo) },
			prepare: func(w *world) { w.publish(deny) },
			event:   admin.FlowDenied, flags: telemetry.FlagsDeny, cause: "401",
		},
		"peer does not accept tunnels": {
			target:  func(w *world) netip.AddrPort { return w.listen(w.db.addr, echo) },
			prepare: func(w *world) { w.web.breakTunnels(func(string) error { return syscall.ECONNREFUSED }) },
			event:   admin.FlowFailed, flags: telemetry.FlagsConnect, cause: "nothing accepts tunnels",
		},
		"peer has another identity": {
			target: func(w *world) netip.AddrPort { return w.listen(w.db.addr, echo) },
			prepare: func(w *world) {
				w.publish(func(c *dataplane.Contents) { c.Workloads[1].ServiceAccount = "somebody" })
			},
			event: admin.FlowFailed, flags: telemetry.FlagsTLS, cause: "somebody",
		},
		"plain destination is closed": {
			target: func(*world) netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:1") },
			event:  admin.FlowFailed, flags: telemetry.FlagsConnect, cause: "connection refused",
		},
		"port of the data plane": {
			target: func(w *world) netip.AddrPort { return netip.AddrPortFrom(w.db.addr, dataplane.PortTunnel) },
			event:  admin.FlowFailed, flags: telemetry.FlagsRoute, cause: "belongs to the data plane",
		},
		"address that nobody knows": {
			target: func(w *world) netip.AddrPort { return netip.AddrPortFrom(w.db.addr.Next(), 80) },
			event:  admin.FlowFailed, flags: telemetry.FlagsRoute, cause: "not even after 100ms",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			target := c.target(w)
			if c.prepare != nil {
				c.prepare(w)
			}
			wantReset(t, w.dial(w.nodes[0], w.web, target))
			f := w.nodes[0].event(t, c.event)
			if f.Flags != string(c.flags) || !strings.Contains(f.Cause, c.cause) {
				t.Errorf("flags %s, cause %q; want %s and %q", f.Flags, f.Cause, c.flags, c.cause)
			}
			if n := w.web.dialedPlain(); n != 0 && name != "plain destination is closed" {
				t.Errorf("%d plain dials: a tunnel never falls back", n)
			}
			if open := w.nodes[0].events(admin.FlowOpen); len(open) != 0 {
				t.Errorf("%d connections were open", len(open))
			}
			eventually(t, "nothing is live", func() bool { return w.nodes[0].Live("web") == 0 && w.nodes[1].Live("db") == 0 })
		})
	}
}

func TestAnotherEndpointIsTried(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	dead := netip.AddrPortFrom(w.db.addr, 1)
	w.publish(func(c *dataplane.Contents) { c.Services = []dataplane.Service{service(w, "db", app, dead)} })
	for range 20 { // the dead one is first in half of them
		c := w.dial(w.nodes[0], w.web, netip.MustParseAddrPort("10.96.0.1:80"))
		sendText(t, c, "hello")
		receive(t, c, "hello")
		_ = c.Close()
	}
	if failed := w.nodes[0].events(admin.FlowFailed); len(failed) != 0 {
		t.Errorf("%d connections failed", len(failed))
	}
}

func TestDenialIsFinal(t *testing.T) {
	w := newWorld(t)
	app, other := w.listen(w.db.addr, echo), w.listen(w.db.addr, echo)
	w.publish(func(c *dataplane.Contents) {
		c.Services = []dataplane.Service{service(w, "db", app, other)}
		c.Authorizations = []dataplane.AuthorizationPolicy{denyAll("db")}
	})
	wantReset(t, w.dial(w.nodes[0], w.web, netip.MustParseAddrPort("10.96.0.1:80")))
	w.nodes[0].event(t, admin.FlowDenied)
	w.nodes[1].event(t, admin.FlowDenied)
	if n := len(w.nodes[1].events(admin.FlowDenied)); n != 1 {
		t.Errorf("the peer was asked %d times, want once", n)
	}
}

func TestFailedTunnelNeverFallsBackToAPlainEndpoint(t *testing.T) {
	w := newWorld(t)
	plain := w.listen(netip.MustParseAddr("127.0.0.1"), echo)
	w.publish(func(c *dataplane.Contents) {
		c.Services = []dataplane.Service{service(w, "db", netip.AddrPortFrom(w.db.addr, 1), plain)}
	})
	for range 20 {
		c := w.dial(w.nodes[0], w.web, netip.MustParseAddrPort("10.96.0.1:80"))
		before := w.web.dialedPlain()
		// One that failed may be reset before anything is written.
		_, err := io.WriteString(c, "hello")
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 5))
		}
		if err != nil && w.web.dialedPlain() != before {
			t.Fatal("a plain dial followed a tunnel that failed")
		}
		_ = c.Close()
	}
	tunnelled := w.nodes[0].events(admin.FlowFailed)
	if len(tunnelled) == 0 {
		t.Error("no connection chose the endpoint with the tunnel: the test proves nothing")
	}
	for _, f := range tunnelled {
		if f.Protocol != dataplane.ProtocolHBONE && !strings.Contains(f.Cause, "503") {
			t.Errorf("failed as %s: %s", f.Protocol, f.Cause)
		}
	}
}

func TestUnknownAddressWorksWhenItIsDiscoveredMeanwhile(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.DiscoveryWait = 10 * time.Second })
	addr := w.db.addr.Next()
	app := w.listen(addr, echo)
	c := w.dial(w.nodes[0], w.web, app)
	sendText(t, c, "hello") // it waits with the connection
	time.Sleep(20 * time.Millisecond)
	w.publish(func(c *dataplane.Contents) {
		late := w.db.workload("node2")
		late.UID, late.Addrs = "late", []netip.Addr{addr}
		c.Workloads = append(c.Workloads, late)
	})
	receive(t, c, "hello")
}

func TestConnectionsBeyondALimitAreReset(t *testing.T) {
	for name, c := range map[string]struct {
		limits Limits
		limit  string
	}{
		"pod":     {Limits{PodConnections: 2}, limitPodConnections},
		"node":    {Limits{NodeConnections: 2}, limitNodeConnections},
		"pending": {Limits{PodPending: 2}, limitPodPending},
		// In clear each takes two.
		"files":             {Limits{PodFiles: 5}, limitPodFiles},
		"files of the node": {Limits{NodeFiles: 5}, limitNodeFiles},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(cfg *Config) { cfg.Limits = c.limits; cfg.DiscoveryWait = 10 * time.Second })
			target := w.listen(netip.MustParseAddr("127.0.0.1"), echo)
			if c.limit == limitPodPending {
				target = netip.AddrPortFrom(w.db.addr.Next(), 80)
			}
			for range 2 {
				conn := w.dial(w.nodes[0], w.web, target)
				if c.limit != limitPodPending {
					sendText(t, conn, "x")
					receive(t, conn, "x")
				}
			}
			eventually(t, "both are there", func() bool { return w.nodes[0].Live("web") == 2 })
			wantReset(t, w.dial(w.nodes[0], w.web, target))
			f := w.nodes[0].event(t, admin.FlowFailed)
			if f.Flags != string(telemetry.FlagsLimit) || !strings.Contains(f.Cause, c.limit) {
				t.Errorf("flags %s, cause %q", f.Flags, f.Cause)
			}
			if n := w.nodes[0].Live("web"); n != 2 {
				t.Errorf("%d live, want 2", n)
			}
			// Another pod of the node has its own bound.
			if c.limit == limitNodeConnections || c.limit == limitNodeFiles {
				return
			}
			other := newFakePod(t, "db", netip.MustParseAddr(w.web.addr.String()).Next().Next().Next().String())
			w.serve(w.nodes[0], other)
			conn := w.nodes[0].dial(t, other.outbound, other.addr, w.listen(netip.MustParseAddr("127.0.0.1"), echo))
			sendText(t, conn, "x")
			receive(t, conn, "x")
		})
	}
}

func TestTunnelledConnectionTakesOneFileAtEachEnd(t *testing.T) {
	w := newWorld(t, func(cfg *Config) { cfg.Limits = Limits{PodFiles: 3} })
	app := w.listen(w.db.addr, echo)
	for round := range 2 { // what they took is given back
		var conns []*net.TCPConn
		for range 3 {
			c := w.dial(w.nodes[0], w.web, app)
			sendText(t, c, "x")
			receive(t, c, "x")
			conns = append(conns, c)
		}
		wantReset(t, w.dial(w.nodes[0], w.web, app))
		for _, c := range conns {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "nothing is live", func() bool { return w.nodes[0].Live("web")+w.nodes[1].Live("db") == 0 })
		for i, n := range w.nodes {
			if used := n.files.used.Load(); used != 0 {
				t.Errorf("round %d: node %d has %d files left", round, i, used)
			}
		}
	}
}

func TestDrainLetsConnectionsEndAndForceCutsThem(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	extra := newFakePod(t, "web", w.web.addr.Next().Next().Next().String())
	drain, cut, done := w.serve(w.nodes[0], extra)
	ends, stays := w.nodes[0].dial(t, extra.outbound, extra.addr, app), w.nodes[0].dial(t, extra.outbound, extra.addr, app)
	for _, c := range []*net.TCPConn{ends, stays} {
		sendText(t, c, "x")
		receive(t, c, "x")
	}
	drain()
	sendText(t, ends, "more")
	receive(t, ends, "more")
	if err := ends.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, ends, "")
	eventually(t, "one is left", func() bool { return w.nodes[0].Live("web") == 1 })
	select {
	case <-done:
		t.Fatal("serving ended before its last connection")
	case <-time.After(20 * time.Millisecond):
	}
	cut()
	wantReset(t, stays)
	<-done
	if f := w.nodes[0].events(admin.FlowClose)[1]; f.Flags != string(telemetry.FlagsDrained) {
		t.Errorf("flags %s (%s)", f.Flags, f.Cause)
	}
}

func TestDrainOfTheServerLetsTunnelsEnd(t *testing.T) {
	w := newWorld(t)
	// A pod of its own, served and drained apart from the world's.
	pod := newFakePod(t, "extra", w.db.addr.Next().Next().String())
	w.publish(func(c *dataplane.Contents) {
		extra := pod.workload("node2")
		extra.ServiceAccount = "db"
		c.Workloads = append(c.Workloads, extra)
		c.Captured["extra"] = true
	})
	drain, _, done := w.serve(w.nodes[1], pod)
	c := w.dial(w.nodes[0], w.web, w.listen(pod.addr, echo))
	sendText(t, c, "x")
	receive(t, c, "x")
	drain()
	time.Sleep(20 * time.Millisecond)
	sendText(t, c, "more")
	receive(t, c, "more")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, c, "")
	<-done
}

func TestListenersServeAgainAfterADrain(t *testing.T) {
	w := newWorld(t)
	pod := newFakePod(t, "web", w.web.addr.Next().Next().Next().String())
	target := w.listen(netip.MustParseAddr("127.0.0.1"), echo)
	for range 2 {
		drain, _, done := w.serve(w.nodes[0], pod)
		c := w.nodes[0].dial(t, pod.outbound, pod.addr, target)
		sendText(t, c, "x")
		receive(t, c, "x")
		_ = c.Close()
		drain()
		<-done
	}
}

// failing is a listener that runs out of descriptors for a while.
type failing struct {
	*netns.Listener
	failures int
	at       []time.Duration
	start    time.Time
}

func (l *failing) SetDeadline(time.Time) error { return nil }

func (l *failing) AcceptConn() (*netns.Conn, error) {
	l.at = append(l.at, time.Since(l.start))
	if len(l.at) > l.failures {
		return nil, net.ErrClosed
	}
	return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
}

func TestAcceptBacksOffWhenDescriptorsRunOut(t *testing.T) {
	w := newWorld(t)
	s := w.nodes[0].newServedPod(w.web, &w.contents.Workloads[0])
	synctest.Test(t, func(t *testing.T) {
		l := &failing{failures: 12, start: time.Now()}
		err := s.accept(t.Context(), t.Context(), l, nil)
		if !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
		want := []time.Duration{0, 5, 15, 35, 75, 155, 315, 635, 1275, 2275, 3275, 4275, 5275}
		for i := range want {
			if want[i] *= time.Millisecond; l.at[i] != want[i] {
				t.Errorf("attempt %d after %v, want after %v", i, l.at[i], want[i])
			}
		}
	})
}

func (l *failing) Addr() net.Addr { return &net.TCPAddr{} }

// peer opens tunnels to db as web would, with requests that a proxy of ours would not make.
func (w *world) peer() *hbone.Client {
	w.t.Helper()
	s := &servedPod{Proxy: w.nodes[0].Proxy, pod: w.web, identity: workloadID("web")}
	c := hbone.NewClient(hbone.ClientConfig{Dial: s.dialTunnel, TLS: s.clientTLS, Transport: h2.Client{}})
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestTunnelRequestsAreChecked(t *testing.T) {
	for name, c := range map[string]struct {
		authority func(w *world, app netip.AddrPort) string
		change    func(c *dataplane.Contents)
		status    int
	}{
		"good":                   {func(_ *world, app netip.AddrPort) string { return app.String() }, nil, 200},
		"host name":              {func(_ *world, app netip.AddrPort) string { return fmt.Sprintf("db.shop:%d", app.Port()) }, nil, 400},
		"another pod's address":  {func(w *world, app netip.AddrPort) string { return fmt.Sprintf("%s:%d", w.web.addr, app.Port()) }, nil, 400},
		"loopback":               {func(_ *world, app netip.AddrPort) string { return fmt.Sprintf("127.0.0.1:%d", app.Port()) }, nil, 400},
		"outbound port":          {func(w *world, _ netip.AddrPort) string { return w.db.addr.String() + ":15001" }, nil, 400},
		"inbound port":           {func(w *world, _ netip.AddrPort) string { return w.db.addr.String() + ":15006" }, nil, 400},
		"tunnel port":            {func(w *world, _ netip.AddrPort) string { return w.db.addr.String() + ":15008" }, nil, 400},
		"own port before policy": {func(w *world, _ netip.AddrPort) string { return w.db.addr.String() + ":15008" }, denyChange, 400},
		"policy":                 {func(_ *world, app netip.AddrPort) string { return app.String() }, denyChange, 401},
		"policy before unknown pod": {
			func(_ *world, app netip.AddrPort) string { return app.String() },
			func(c *dataplane.Contents) { denyChange(c); c.Workloads[1].Node = "node3" }, 401,
		},
		"unknown pod": {
			func(_ *world, app netip.AddrPort) string { return app.String() },
			func(c *dataplane.Contents) { c.Workloads = c.Workloads[:1] }, 503,
		},
		"pod of another node": {
			func(_ *world, app netip.AddrPort) string { return app.String() },
			func(c *dataplane.Contents) { c.Workloads[1].Node = "node3" }, 503,
		},
		"closed port": {func(w *world, _ netip.AddrPort) string { return w.unused(w.db).String() }, nil, 503},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			app := w.listen(w.db.addr, echo)
			if c.change != nil {
				w.publish(c.change)
			}
			tunnel, err := w.peer().Open(t.Context(), w.key(), &hbone.Request{Authority: c.authority(w, app)})
			var status *hbone.StatusError
			switch {
			case err == nil:
				status = &hbone.StatusError{Status: 200}
				_ = tunnel.Close()
			case !errors.As(err, &status):
				t.Fatal(err)
			}
			if status.Status != c.status {
				t.Errorf("answer %d, want %d", status.Status, c.status)
			}
		})
	}
}

func (w *world) key() hbone.Key {
	return hbone.Key{
		Source: workloadID("web").String(), Peer: workloadID("db").String(),
		Remote: netip.AddrPortFrom(w.db.addr, dataplane.PortTunnel), Local: w.web.addr,
	}
}

func TestForwardedAddressIsBelievedForTheTunnelsOwnHostAlone(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	peer := w.peer()
	for i, c := range []struct {
		forwarded string
		believed  bool
	}{
		{netip.AddrPortFrom(w.web.addr, 4711).String(), true},
		{"10.9.9.9:4711", false},
		{"", false},
	} {
		r := &hbone.Request{Authority: app.String()}
		if c.forwarded != "" {
			r.Forwarded.For = netip.MustParseAddrPort(c.forwarded)
		}
		tunnel, err := peer.Open(t.Context(), w.key(), r)
		if err != nil {
			t.Fatal(err)
		}
		_ = tunnel.Close()
		got := w.db.apps[i]
		if got.Addr() != w.web.addr || (got.Port() == 4711) != c.believed {
			t.Errorf("forwarded %q: the application was reached as %s", c.forwarded, got)
		}
	}
}

func TestLostTunnelIsAResetOnBothSides(t *testing.T) {
	w := newWorld(t)
	var conns sync.Map
	w.web.breakTunnels(nil)
	server := make(chan error, 1)
	app := w.listen(w.db.addr, func(c *net.TCPConn) {
		_, err := io.WriteString(c, "part")
		if err == nil {
			_, err = io.Copy(io.Discard, c)
		}
		server <- err
	})
	c := w.dial(w.nodes[0], w.web, app)
	receive(t, c, "part")
	for _, f := range w.nodes[0].serving("web")[0].liveFlows() {
		conns.Store(f, f.tunnelConn(w.nodes[0].serving("web")[0]).Raw)
	}
	conns.Range(func(_, raw any) bool { _ = raw.(net.Conn).Close(); return true }) // the network between the nodes breaks
	wantReset(t, c)
	if err := <-server; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server's read ended with %v, want a reset", err)
	}
}

func TestPodThatIsNotKnownYetIsServedOnceItIs(t *testing.T) {
	w := newWorld(t)
	pod := newFakePod(t, "late", w.db.addr.Next().Next().Next().String())
	w.serve(w.nodes[0], pod)
	c := w.nodes[0].dial(t, pod.outbound, pod.addr, w.listen(netip.MustParseAddr("127.0.0.1"), echo))
	sendText(t, c, "x")
	w.publish(func(c *dataplane.Contents) { c.Workloads = append(c.Workloads, pod.workload("node1")) })
	receive(t, c, "x")
	if err := w.nodes[0].ServePod(canceled(t), context.Background(), newFakePod(t, "never", w.db.addr.Next().String())); err != nil {
		t.Errorf("serving a pod that never became known: %v", err)
	}
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
