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
