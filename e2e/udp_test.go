package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
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
		c.start("--experimental-udp")
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

// askUDP sends payload from a socket of its own, again each second, and waits for the same back.
func askUDP(pod *lab.Pod, to netip.AddrPort, payload string, bound time.Duration) error {
	var conn *net.UDPConn
	err := pod.Do(func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	buf := make([]byte, 65536)
	for end := time.Now().Add(bound); ; {
		if _, err := conn.Write([]byte(payload)); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(min(time.Second, bound))); err != nil {
			return err
		}
		n, err := conn.Read(buf)
		if err == nil && string(buf[:n]) != payload {
			return fmt.Errorf("the answer is %q", buf[:n])
		}
		if err == nil || time.Now().After(end) {
			return err
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

// udpFlows lists what an agent carries of UDP.
func udpFlows(t *testing.T, c *cluster, n *lab.Node) []admin.Connection {
	t.Helper()
	all, err := c.Agent(n).Client().Connections(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var flows []admin.Connection
	for _, conn := range all {
		if conn.Protocol == dataplane.ProtocolHBONEUDP {
			flows = append(flows, conn)
		}
	}
	return flows
}
