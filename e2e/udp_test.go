package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// UDP is readable on the link before the pods are enrolled and not after, both agents name both
// identities, a pod outside the mesh is spoken to in clear at any time, and nothing leaves in
// clear while an agent is dead.
func TestUDPIsTunnelled(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		c := newCluster(t, opts)
		web, db, plain := c.pod("web", 1), c.pod("db", 2), c.podIn("outside", "plain", 2)
		echoUDP(t, db, 9)
		echoUDP(t, plain, 9)
		c.start()
		link, err := c.Capture(t.Context(), c.Node(1))
		if err != nil {
			t.Fatal(err)
		}
		ask := func(to netip.AddrPort, payload string) {
			t.Helper()
			if err := askUDP(web, to, payload, patience); err != nil {
				t.Fatalf("ask %s: %v", payload, err)
			}
		}
		seen := func(payload string) bool {
			t.Helper()
			found, err := link.Contains(t.Context(), []byte(payload))
			if err != nil {
				t.Fatal(err)
			}
			return found
		}
		ask(db.AddrPort(9), "before the enrolment")
		if !seen("before the enrolment") {
			t.Error("what was sent before the enrolment was not seen on the link: the search proves nothing")
		}

		c.enrol(web, db)
		awaitUDP(t, c, web, db.AddrPort(9))
		for i := range 100 {
			ask(db.AddrPort(9), fmt.Sprint("in the tunnel ", i))
			ask(plain.AddrPort(9), fmt.Sprint("to who is outside ", i))
		}
		if seen("in the tunnel") {
			t.Error("UDP between captured pods is readable on the link")
		}
		if !seen("to who is outside") {
			t.Error("UDP to a pod outside the mesh did not go in clear")
		}
		for _, n := range c.Nodes() {
			flows := udpFlows(t, c, n)
			if len(flows) == 0 {
				t.Errorf("agent of %s lists no flow of UDP", n.Name)
				continue
			}
			if f := flows[0]; f.Source.Identity.ServiceAccount != "web" || f.Destination.Identity.ServiceAccount != "db" {
				t.Errorf("agent of %s names %v and %v", n.Name, f.Source.Identity, f.Destination.Identity)
			}
		}

		agent := c.Agent(c.Node(1))
		if err := agent.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := askUDP(web, db.AddrPort(9), "while nobody serves", 200*time.Millisecond); err == nil {
			t.Error("a peer answered while the agent is dead")
		}
		ask(plain.AddrPort(9), "outside needs no agent")
		if seen("while nobody serves") {
			t.Error("UDP for a peer left in clear while the agent is dead")
		}
		if _, err := agent.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		awaitUDP(t, c, web, db.AddrPort(9))
		ask(db.AddrPort(9), "in the tunnel again")
		if seen("in the tunnel") {
			t.Error("UDP between captured pods is readable on the link")
		}
	})
}

// echoUDP answers what it is sent at the port, until the test ends.
func echoUDP(t *testing.T, pod *lab.Pod, port uint16) {
	t.Helper()
	var conn *net.UDPConn
	err := pod.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = conn.WriteToUDPAddrPort(buf[:n], from) // a client that does not wait has gone
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
}

// askUDP is exchangeUDP from a socket of its own.
func askUDP(pod *lab.Pod, to netip.AddrPort, payload string, bound time.Duration) error {
	conn, err := dialUDP(pod, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	return exchangeUDP(conn, payload, bound)
}

// dialUDP makes a connected socket in the pod.
func dialUDP(pod *lab.Pod, to netip.AddrPort) (conn *net.UDPConn, err error) {
	err = pod.Do(func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	return conn, err
}

// exchangeUDP sends payload, again each second, and waits for the same back. Other answers may be
// late ones to what was asked before.
func exchangeUDP(conn *net.UDPConn, payload string, bound time.Duration) error {
	buf := make([]byte, 65536)
	var other error
	for end := time.Now().Add(bound); ; {
		if _, err := conn.Write([]byte(payload)); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(min(time.Second, bound))); err != nil {
			return err
		}
		n, err := conn.Read(buf)
		for ; err == nil && string(buf[:n]) != payload; n, err = conn.Read(buf) {
			other = fmt.Errorf("another answer has %d bytes and begins with %q", n, buf[:min(n, 32)])
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			return errors.Join(err, other)
		}
	}
}

// awaitUDP waits until what the pod says to a peer goes in a tunnel.
func awaitUDP(t *testing.T, c *cluster, pod *lab.Pod, to netip.AddrPort) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		_ = askUDP(pod, to, "settling", time.Second) // in clear, in a tunnel, or in neither yet
		if len(udpFlows(t, c, c.Node(1))) > 0 {
			return
		}
	}
	t.Fatal("UDP is not tunnelled")
}

// udpPair is two pods whose agents tunnel UDP, and the link between their nodes. Nobody is
// enrolled yet:
//
//	node1: web ── link ── fabric ── node2: db (echoes at portEcho)
type udpPair struct {
	*cluster
	web, db *lab.Pod
	link    *lab.Capture
}

// newUDPPair makes db with annotations, and starts agents with args.
func newUDPPair(t *testing.T, opts lab.Options, annotations map[string]string, args ...string) *udpPair {
	t.Helper()
	c := newCluster(t, opts)
	db, err := c.AddPod(lab.PodSpec{Namespace: "shop", Name: "db", Node: 2, ServiceAccount: "db", Annotations: annotations})
	if err != nil {
		t.Fatal(err)
	}
	p := &udpPair{cluster: c, web: c.pod("web", 1), db: db}
	echoUDP(t, p.db, portEcho)
	c.start(args...)
	if p.link, err = c.Capture(t.Context(), c.Node(1)); err != nil {
		t.Fatal(err)
	}
	return p
}

// protect enrols both pods and waits until their UDP goes in tunnels.
func (p *udpPair) protect() {
	p.t.Helper()
	p.enrol(p.web, p.db)
	awaitUDP(p.t, p.cluster, p.web, p.db.AddrPort(portEcho))
}

// conceals runs an application in clear, and then in tunnels: the link must show it, and then
// not any more.
func (p *udpPair) conceals(shown func() bool, run func()) {
	p.t.Helper()
	run()
	if !shown() {
		p.t.Error("the application was not seen on the link in clear: the search proves nothing")
	}
	p.protect()
	if err := p.link.Reset(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	run()
	if shown() {
		p.t.Error("the application is in clear on the link")
	}
	if dropped, err := p.link.Dropped(p.t.Context()); err != nil || dropped > 0 {
		p.t.Errorf("the capture lost %d packets, and %v", dropped, err)
	}
}

// readable tells whether the link shows a text, port whether it shows datagrams of a port.
func (p *udpPair) readable(text []byte) func() bool {
	return func() bool {
		found, err := p.link.Contains(p.t.Context(), text)
		if err != nil {
			p.t.Fatal(err)
		}
		return found
	}
}

func (p *udpPair) port(number uint16) func() bool {
	return func() bool {
		n, err := p.link.CountDatagrams(p.t.Context(), number)
		if err != nil {
			p.t.Fatal(err)
		}
		return n > 0
	}
}

// udpFlows lists what an agent carries of UDP.
func udpFlows(t *testing.T, c *cluster, n *lab.Node) []admin.Connection {
	t.Helper()
	flows, err := c.Agent(n).UDPFlows(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return flows
}
