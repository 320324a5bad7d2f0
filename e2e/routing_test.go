package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Where connections go, with real agents: services, other nodes, the same node, the same pod,
// pods without the mesh, and addresses outside the cluster.
func TestConnectionsGoWhereTheyShould(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		s := newShop(t, opts, "--same-node", "tunnel") // one of the ways is a tunnel within a node
		for _, pod := range []*lab.Pod{s.web, s.near, s.db, s.plain} {
			serve(t, pod, portEcho, echo)
		}
		for name, test := range map[string]func(*testing.T, *shop){
			"to another node, encrypted":               otherNode,
			"on one node, encrypted":                   sameNode,
			"to a service":                             toService,
			"to a service without a ready endpoint":    toNobody,
			"from a pod to itself by its service":      hairpin,
			"to a pod without the mesh, in clear":      toPlainPod,
			"out of the cluster, in clear":             outOfCluster,
			"to an address that nobody has":            toNobodysAddress,
			"to a pod that becomes known meanwhile":    toLatePod,
			"from a pod without the mesh, in clear":    fromPlainPod,
			"to a service's port that it does not say": toUnknownPort,
		} {
			t.Run(name, func(t *testing.T) { test(t, s) })
		}
	})
}

// crossing captures a link of a host while a message goes from one pod to another, and
// returns whether it was seen in clear, and how many packets of tunnels were.
func crossing(t *testing.T, host *lab.Host, link string, from *lab.Pod, to netip.AddrPort) (clear bool, tunnels int) {
	t.Helper()
	capture, err := host.Capture(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	defer capture.Close()
	message := nonce()
	if err := ask(t.Context(), from, to, message); err != nil {
		t.Fatal(err)
	}
	if clear, err = capture.Contains(t.Context(), message); err == nil {
		tunnels, err = capture.CountPort(t.Context(), dataplane.PortTunnel)
	}
	dropped, dropErr := capture.Dropped(t.Context())
	if err != nil || dropErr != nil || dropped > 0 {
		t.Fatalf("the capture proves nothing: %v, %v, %d packets missed", err, dropErr, dropped)
	}
	return clear, tunnels
}

func otherNode(t *testing.T, s *shop) {
	clear, tunnels := crossing(t, s.Fabric(), "node2", s.web, s.db.AddrPort(portEcho))
	if clear || tunnels == 0 {
		t.Errorf("in clear: %v; packets of tunnels: %d", clear, tunnels)
	}
}

func sameNode(t *testing.T, s *shop) {
	clear, tunnels := crossing(t, s.Node(1).Host, s.near.HostEnd(), s.web, s.near.AddrPort(portEcho))
	if clear || tunnels == 0 {
		t.Errorf("in clear: %v; packets of tunnels: %d", clear, tunnels)
	}
}

func (s *shop) service(t *testing.T, name string, selector map[string]string) netip.AddrPort {
	t.Helper()
	service, err := s.AddService(lab.ServiceSpec{
		Namespace: "shop", Name: name, Selector: selector, Ports: []lab.ServicePort{{Port: 80, Target: portName}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.RemoveService(service); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "service "+name+" known to both agents", func() error {
		for node := range s.Nodes() {
			services, err := s.client(node + 1).Services(t.Context())
			if err != nil {
				return err
			}
			if !strings.Contains(fmt.Sprint(services), name) {
				return fmt.Errorf("not to node%d", node+1)
			}
		}
		return nil
	})
	return netip.AddrPortFrom(service.VIPs[0], 80)
}

// whoAnswers connects and returns what the other side said, after it checked that the client
// believes itself connected to what it asked for.
func whoAnswers(from *lab.Pod, to netip.AddrPort) (string, error) {
	conn, err := plug(from, to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if peer, err := peerName(conn); err != nil || peer != to {
		return "", errors.Join(fmt.Errorf("getpeername is %v, want %v", peer, to), err)
	}
	said, err := io.ReadAll(conn)
	return string(said), err
}

func (s *shop) sayNames(t *testing.T, pods ...*lab.Pod) {
	for _, pod := range pods {
		serve(t, pod, portName, func(conn *net.TCPConn) {
			_, _ = fmt.Fprintf(conn, "%s to %s", pod.Name.Name, conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
		})
	}
}

func toService(t *testing.T, s *shop) {
	s.sayNames(t, s.db, s.near)
	for _, pod := range []*lab.Pod{s.db, s.near} {
		if err := s.SetPodLabel(pod, "tier", "back"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetPodReady(s.near, false); err != nil { // so that it is never chosen
		t.Fatal(err)
	}
	vip := s.service(t, "back", map[string]string{"tier": "back"})
	for range 20 {
		if said, err := whoAnswers(s.web, vip); err != nil || said != "db to "+s.web.Addr().String() {
			t.Fatalf("%q answered, and %v", said, err)
		}
	}
	flow := s.flow(1, "a connection to the service", func(f admin.Flow) bool {
		return f.Event == admin.FlowClose && f.Service == "back.shop.svc.cluster.local"
	})
	if flow.Protocol != dataplane.ProtocolHBONE || flow.Destination.Addr != s.db.AddrPort(portName) {
		t.Errorf("the record is %+v", flow)
	}
	// Ready again, it has its share.
	if err := s.SetPodReady(s.near, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an answer of the endpoint that became ready", func() error {
		said, err := whoAnswers(s.web, vip)
		if err == nil && said != "near to "+s.web.Addr().String() {
			err = fmt.Errorf("%q answered", said)
		}
		return err
	})
}

func toNobody(t *testing.T, s *shop) {
	if err := refused(s.web, s.service(t, "nobody", map[string]string{"app": "nobody"})); err != nil {
		t.Error(err)
	}
}

func toUnknownPort(t *testing.T, s *shop) {
	vip := s.service(t, "portless", map[string]string{"app": "db"})
	if err := refused(s.web, netip.AddrPortFrom(vip.Addr(), 81)); err != nil {
		t.Error(err)
	}
}

func hairpin(t *testing.T, s *shop) {
	s.sayNames(t, s.web)
	vip := s.service(t, "self", map[string]string{"app": "web"})
	if said, err := whoAnswers(s.web, vip); err != nil || said != "web to "+s.web.Addr().String() {
		t.Errorf("%q answered, and %v", said, err)
	}
}

// plainOpened is how many connections in clear an agent counted as a reporter.
func (s *shop) plainOpened(node int, reporter string, labels ...string) float64 {
	return s.scrape(node).sum("istio_tcp_connections_opened_total",
		append(labels, "reporter", reporter, "connection_security_policy", "unknown")...)
}

func toPlainPod(t *testing.T, s *shop) {
	labels := []string{"source_workload", "web", "destination_workload", "plain"}
	before := s.plainOpened(1, "source", labels...)
	clear, tunnels := crossing(t, s.Fabric(), "node2", s.web, s.plain.AddrPort(portEcho))
	if !clear || tunnels != 0 {
		t.Errorf("in clear: %v; packets of tunnels: %d", clear, tunnels)
	}
	if opened := s.plainOpened(1, "source", labels...) - before; opened != 1 {
		t.Errorf("%v connections were counted as plain", opened)
	}
}

func fromPlainPod(t *testing.T, s *shop) {
	labels := []string{"source_workload", "plain", "source_principal", "unknown", "destination_workload", "db"}
	before := s.plainOpened(2, "destination", labels...)
	if err := ask(t.Context(), s.plain, s.db.AddrPort(portEcho), nonce()); err != nil {
		t.Fatal(err)
	}
	if opened := s.plainOpened(2, "destination", labels...) - before; opened != 1 {
		t.Errorf("%v connections were counted as plain", opened)
	}
}

func outOfCluster(t *testing.T, s *shop) {
	l, err := s.Control().Listen(portEcho)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.AcceptTCP()
		if err == nil {
			echo(conn)
			_ = conn.Close()
		}
	}()
	before := s.plainOpened(1, "source", "destination_workload", "unknown")
	if err := ask(t.Context(), s.web, s.Control().AddrPort(portEcho), nonce()); err != nil {
		t.Fatal(err)
	}
	if opened := s.plainOpened(1, "source", "destination_workload", "unknown") - before; opened != 1 {
		t.Errorf("%v connections were counted as plain", opened)
	}
}

// farAddr is in node2's pod range, and no pod's.
func (s *shop) farAddr() netip.Addr {
	b := s.db.Addr().AsSlice()
	b[len(b)-1] = 250
	far, _ := netip.AddrFromSlice(b)
	return far
}

func toNobodysAddress(t *testing.T, s *shop) {
	far := netip.AddrPortFrom(s.farAddr(), portEcho)
	if err := refused(s.web, far); err != nil {
		t.Error(err)
	}
	flow := s.flow(1, "the refused connection", func(f admin.Flow) bool { return f.Destination.Addr == far })
	if flow.Event != admin.FlowFailed || flow.Flags != "NO_ROUTE" || !strings.Contains(flow.Cause, "not even after") {
		t.Errorf("the record is %+v", flow)
	}
}

// toLatePod connects to a pod of which the agent hears while the connection waits.
func toLatePod(t *testing.T, s *shop) {
	late := s.podIn("outside", "late", 2)
	defer func() {
		if err := s.RemovePod(late); err != nil {
			t.Error(err)
		}
	}()
	serve(t, late, portEcho, echo)
	if err := s.DeleteFile("pod-outside-late.yaml"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is forgotten", func() error {
		workloads, err := s.client(1).Workloads(t.Context())
		if err == nil && strings.Contains(fmt.Sprint(workloads), late.Addr().String()) {
			err = fmt.Errorf("%s is still known", late)
		}
		return err
	})
	conn := dialFrom(t, s.web, late.AddrPort(portEcho)) // accepted, by the agent
	if err := s.SetPodReady(late, true); err != nil {   // writes its YAML again
		t.Fatal(err)
	}
	if err := (steady{conn}).use(); err != nil {
		t.Error(err)
	}
}
