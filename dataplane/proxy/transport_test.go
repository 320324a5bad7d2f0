package proxy

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/paths"
)

// A connection goes by HTTP/3 where its namespace asks for it and the peer can, and by HTTP/2
// otherwise; both ends say so, and why.
func TestConnectionsGoByTheTransportThatIsAskedFor(t *testing.T) {
	for _, c := range []struct {
		name, label  string
		unpublished  bool // the peer's agent does not say that it takes UDP
		blocked      bool // nothing comes through to the peer's UDP port
		heard        paths.Quality
		out, in, why string
	}{
		{name: "nothing is asked for"},
		{name: "HTTP/2", label: "h2", out: "h2", why: "raceway.dev/transport=h2"},
		{name: "HTTP/3", label: "h3", out: "h3", in: "h3", why: "raceway.dev/transport=h3"},
		{name: "the peer takes none", label: "h3", unpublished: true, out: "h2", why: "does not take its UDP"},
		{name: "blocked", label: "h3", blocked: true, out: "h2", why: "nothing answers at the peer's UDP port 15008"},
		{name: "a path that is not known to lose anything", label: "auto", out: "h2", why: "raceway.dev/transport=auto: lost=0"},
		{
			name: "a path that loses packets", label: "auto", heard: paths.Quality{Segments: 2000, Lost: 40, RTT: 20 * time.Millisecond},
			out: "h3", in: "h3", why: "raceway.dev/transport=auto: lost=40, sent=2000, rtt=20ms",
		},
		{name: "what is no transport", label: "http3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newTransportWorld(t, c.label, c.blocked)
			if c.unpublished {
				u.publish(func(c *dataplane.Contents) { c.UDP = map[string]bool{"web": true} })
			}
			if c.heard != (paths.Quality{}) {
				u.nodes[0].paths.Hear(u.db.addr, c.heard)
			}
			for range 2 { // the first may find out that the port is blocked
				conn := u.dial(u.nodes[0], u.web, u.listen(u.db.addr, echo))
				sendText(t, conn, "hello")
				receive(t, conn, "hello")
				_ = conn.Close()
			}
			for i, want := range []string{c.out, c.in} {
				var last admin.Flow
				eventually(t, "two connections were opened", func() bool {
					opened := u.nodes[i].events(admin.FlowOpen)
					if len(opened) == 2 {
						last = opened[1]
					}
					return len(opened) == 2
				})
				carrier, why, _ := strings.Cut(last.Transport, ": ")
				if carrier != want || i == 0 && !strings.Contains(why, c.why) {
					t.Errorf("agent %d says %q, want %q because of %q", i, last.Transport, want, c.why)
				}
			}
		})
	}
}

// Where nothing comes through to the peer's UDP port, a flow goes by HTTP/2.
func TestUDPGoesByHTTP2WhereItsPortIsBlocked(t *testing.T) {
	u := newTransportWorld(t, "", true)
	app, server := u.open(t)
	answer := fakeDatagram{from: server, to: app, payload: "answer"}
	u.dbUDP.sent <- answer
	if got := u.webUDP.hear(t); got != answer {
		t.Errorf("got %+v, want %+v", got, answer)
	}
}

// newTransportWorld is a world whose pods' UDP is captured and whose tunnels are the real ones.
func newTransportWorld(t *testing.T, label string, blocked bool) *udpWorld {
	t.Helper()
	u := &udpWorld{world: newWorld(t, overQUIC), webUDP: newFakeDatagrams(), dbUDP: newFakeDatagrams()}
	u.webUDP.quic, u.dbUDP.quic = tunnelPort(u.web), tunnelPort(u.db)
	if blocked {
		u.dbUDP.quic = func() (*net.UDPConn, error) { return nil, nil }
	}
	u.publish(func(c *dataplane.Contents) {
		c.UDP = map[string]bool{"web": true, "db": true}
		if label != "" {
			c.Namespaces[0].Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient, dataplane.TransportLabel: label}
		}
	})
	u.serveUDP(u.nodes[0], u.web, u.webUDP)
	u.serveUDP(u.nodes[1], u.db, u.dbUDP)
	return u
}

// A pod that is drained carries its connections over HTTP/3 on, whichever end of them it is, until
// they end or its patience does; new ones go elsewhere.
func TestDrainLetsConnectionsOverHTTP3End(t *testing.T) {
	for i, end := range []string{"client", "server"} {
		t.Run(end, func(t *testing.T) {
			u := newTransportWorld(t, "h3", false)
			n, pod := u.nodes[i], newFakePod(t, "extra", u.db.addr.Next().Next().String())
			u.publish(func(c *dataplane.Contents) {
				extra := pod.workload([]string{"node1", "node2"}[i])
				extra.ServiceAccount = []string{"web", "db"}[i]
				c.Workloads = append(c.Workloads, extra)
				c.Captured["extra"], c.UDP["extra"] = true, true
			})
			drain, cut, done := u.serve(n, pod)
			udp := newFakeDatagrams()
			udp.quic = tunnelPort(pod)
			drainUDP, cutUDP, doneUDP := u.startUDP(n, pod, udp)
			connect := func() *net.TCPConn {
				if end == "client" {
					return u.dial(n, pod, u.listen(u.db.addr, echo))
				}
				return u.dial(u.nodes[0], u.web, u.listen(pod.addr, echo))
			}
			ends, stays := connect(), connect()
			for _, c := range []*net.TCPConn{ends, stays} {
				sendText(t, c, "x")
				receive(t, c, "x")
			}
			if f := n.event(t, admin.FlowOpen); !strings.HasPrefix(f.Transport, "h3") {
				t.Fatalf("it goes by %q", f.Transport)
			}
			drain()
			drainUDP()
			eventually(t, "the pod takes nothing more", func() bool { return n.serving("extra")[0].datagrams() == nil })
			sendText(t, ends, "more")
			receive(t, ends, "more")
			if err := ends.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEOF(t, ends, "")
			eventually(t, "one is left", func() bool { return n.Live("extra") == 1 })
			select {
			case <-done:
				t.Fatal("serving ended before its last connection")
			case <-doneUDP:
				t.Fatal("the serving of UDP ended before its last connection")
			case <-time.After(20 * time.Millisecond):
			}
			sendText(t, stays, "still")
			receive(t, stays, "still")
			cut()
			cutUDP()
			wantReset(t, stays)
			<-done
			<-doneUDP
		})
	}
}
