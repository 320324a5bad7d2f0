package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// oneNode is a shop whose pods web and near are on one node, and near answers.
type oneNode struct {
	*shop
	to netip.AddrPort
}

func newOneNode(t *testing.T, opts lab.Options, args ...string) *oneNode {
	t.Helper()
	s := newShop(t, opts, append([]string{"--flow-interval", "200ms"}, args...)...)
	serve(t, s.near, portEcho, echo)
	return &oneNode{shop: s, to: s.near.AddrPort(portEcho)}
}

// way is how a new connection from web to an address goes now: an outbound one, as the agent
// lists it.
func (o *oneNode) way(to netip.AddrPort) (dataplane.Protocol, steady, admin.Connection, error) {
	o.t.Helper()
	tcp, err := o.web.Dial(o.t.Context(), to)
	if err != nil {
		return "", steady{}, admin.Connection{}, err
	}
	o.t.Cleanup(func() { _ = tcp.Close() })
	conn := steady{tcp}
	if err := conn.use(); err != nil {
		return "", conn, admin.Connection{}, err
	}
	local := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	var found admin.Connection
	eventually(o.t, "the connection is listed", func() error {
		list, err := o.client(1).Connections(o.t.Context())
		if err != nil {
			return err
		}
		for _, c := range list {
			if c.Direction == "outbound" && c.Source.Addr.Port() == local.Port() && c.Source.Workload == "web" {
				found = c
				return nil
			}
		}
		return fmt.Errorf("not among %+v", list)
	})
	return found.Protocol, conn, found, nil
}

// byKernel opens connections until one goes by the kernel: the first one never does.
func (o *oneNode) byKernel(to netip.AddrPort) (steady, admin.Connection) {
	o.t.Helper()
	var live steady
	var listed admin.Connection
	eventually(o.t, "connections go by the kernel", func() error {
		protocol, conn, c, err := o.way(to)
		if err != nil {
			return err
		}
		if protocol != dataplane.ProtocolKernel {
			return errors.Join(fmt.Errorf("it is %s", protocol), conn.Close())
		}
		live, listed = conn, c
		return nil
	})
	return live, listed
}

// tunnelled wants that several connections in a row take the tunnel.
func (o *oneNode) tunnelled(to netip.AddrPort) {
	o.t.Helper()
	for range 3 {
		if protocol, _, _, err := o.way(to); err != nil || protocol != dataplane.ProtocolHBONE {
			o.t.Errorf("a connection is %s, %v; want a tunnel", protocol, err)
		}
	}
}

func TestPodsOfOneNodeTalkByTheKernel(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		o := newOneNode(t, opts)
		_, listed := o.byKernel(o.to)
		if listed.Source.Identity.String() != "spiffe://cluster.local/ns/shop/sa/web" || listed.Destination.Identity.String() != "spiffe://cluster.local/ns/shop/sa/near" {
			t.Errorf("identities: %+v", listed)
		}
		clear, tunnels := crossing(t, o.Node(1).Host, o.near.HostEnd(), o.web, o.to)
		if !clear || tunnels > 0 {
			t.Errorf("in clear: %v; packets of tunnels: %d", clear, tunnels)
		}
		why, err := o.client(1).Why(t.Context(), admin.WhyQuery{Source: "web", Destination: o.to.String()})
		if err != nil || why.Outcome != admin.OutcomeKernel || !strings.Contains(fmt.Sprint(why.Steps), "same node kernel") {
			t.Errorf("why: %+v, %v", why, err)
		}
		checkAgent(t, o.agent(1))
	})
}

func TestTelemetryOfTheKernelsPathIsExact(t *testing.T) {
	o := newOneNode(t, lab.Options{})
	live, _ := o.byKernel(o.to)
	sums := func() (bytes [2][2]int, opened [2]int) {
		now := o.scrape(1)
		for i, reporter := range []string{"source", "destination"} {
			labels := []string{
				"reporter", reporter, "source_workload", "web", "destination_workload", "near", "connection_security_policy", "none",
				"source_principal", "spiffe://cluster.local/ns/shop/sa/web", "destination_principal", "spiffe://cluster.local/ns/shop/sa/near",
			}
			bytes[i] = [2]int{int(now.sum("istio_tcp_sent_bytes_total", labels...)), int(now.sum("istio_tcp_received_bytes_total", labels...))}
			opened[i] = int(now.sum("istio_tcp_connections_opened_total", labels...))
		}
		return bytes, opened
	}
	// What lives reports its bytes.
	one := len(nonce())
	eventually(t, "the live connection's bytes are counted", func() error {
		if bytes, _ := sums(); bytes != [2][2]int{{one, one}, {one, one}} {
			return fmt.Errorf("%v, want %d each way at both reporters", bytes, one)
		}
		return nil
	})
	const finished = 50
	sent := one
	for i := range finished {
		size := i * 1000
		if err := ask(t.Context(), o.web, o.to, random(size)); err != nil {
			t.Fatal(err)
		}
		sent += size
	}
	eventually(t, "all bytes are counted", func() error {
		if bytes, opened := sums(); bytes != [2][2]int{{sent, sent}, {sent, sent}} || opened != [2]int{finished + 1, finished + 1} {
			return fmt.Errorf("%v bytes of %v connections, want %d of %d", bytes, opened, sent, finished+1)
		}
		return nil
	})
	if err := live.use(); err != nil {
		t.Error(err)
	}
	lintMetrics(t, o.cluster)
}

// deny is a policy for near about web.
func (o *oneNode) deny(annotations ...string) {
	o.apply("policy.yaml", strings.ReplaceAll(authorization("no-web", "DENY", "web", annotations...), "app: db", "app: near"))
}

func TestPolicyCutsConnectionsByTheKernel(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		o := newOneNode(t, opts)
		live, _ := o.byKernel(o.to)
		o.deny(dryRun)
		eventually(t, "the live connection is counted in the dry run", func() error {
			n := o.scrape(1).sum("raceway_policy_decisions_total", "policy", "no-web", "outcome", "deny", "dry_run", "true")
			if n < 1 {
				return fmt.Errorf("%v would be denied", n)
			}
			return nil
		})
		if err := live.use(); err != nil {
			t.Error("in a dry run:", err)
		}
		o.deny()
		if err := resetOf(live.TCPConn); err != nil {
			t.Error("the connection that is denied now:", err)
		}
		for range 3 {
			if err := refused(o.web, o.to); err != nil {
				t.Error("a new connection:", err)
			}
		}
		o.flow(1, "the cut connection", func(f admin.Flow) bool {
			return f.Event == admin.FlowClose && f.Flags == "DENY" && f.Protocol == dataplane.ProtocolKernel &&
				strings.Contains(f.Cause, "policy changed: shop/no-web rule 0")
		})
		if err := o.DeleteFile("policy.yaml"); err != nil {
			t.Fatal(err)
		}
		o.byKernel(o.to)
	})
}

// namespace writes shop's label about connections on one node.
func (o *oneNode) namespace(mode string) {
	o.apply("namespace-shop.yaml", fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata:
  name: shop
  uid: ns-shop
  labels: {raceway.dev/dataplane-mode: ambient, raceway.dev/same-node: %q}
`, mode))
}

const strictShop = `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: shop, name: strict}
spec: {mtls: {mode: STRICT}}
`

func TestOperatorsDemandTunnelsOnOneNode(t *testing.T) {
	t.Run("STRICT", func(t *testing.T) {
		o := newOneNode(t, lab.Options{})
		live, _ := o.byKernel(o.to)
		o.apply("strict.yaml", strictShop)
		if err := resetOf(live.TCPConn); err != nil {
			t.Error("a connection that has to be encrypted now:", err)
		}
		o.tunnelled(o.to)
		o.namespace("kernel") // says so explicitly
		o.byKernel(o.to)
	})
	t.Run("namespace", func(t *testing.T) {
		o := newOneNode(t, lab.Options{})
		live, _ := o.byKernel(o.to)
		o.namespace("tunnel")
		if err := resetOf(live.TCPConn); err != nil {
			t.Error("a connection that has to be encrypted now:", err)
		}
		o.tunnelled(o.to)
		o.namespace("kernal")
		o.tunnelled(o.to)
		eventually(t, "the label is complained of", func() error {
			findings, err := o.client(1).Check(t.Context())
			if !strings.Contains(fmt.Sprint(findings), `raceway.dev/same-node is "kernal"`) {
				return errors.Join(fmt.Errorf("%+v", findings), err)
			}
			return nil
		})
		o.namespace("kernel")
		o.byKernel(o.to)
	})
	t.Run("flag", func(t *testing.T) {
		o := newOneNode(t, lab.Options{}, "--same-node", "tunnel")
		o.tunnelled(o.to)
	})
}

// A service with an endpoint on the client's node and one on another: connections are spread
// over both, and the application sees the service.
func TestServiceOnOneNodeAndOthers(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		o := newOneNode(t, opts)
		for _, pod := range []*lab.Pod{o.near, o.db} {
			serve(t, pod, portName, func(conn *net.TCPConn) { _, _ = conn.Write([]byte(pod.Name.Name)) })
			if err := o.SetPodLabel(pod, "tier", "back"); err != nil {
				t.Fatal(err)
			}
		}
		vip := o.service(t, "back", map[string]string{"tier": "back"})
		const all = 200
		seen := make(map[string]int)
		for range all {
			conn := open(t, o.web, vip)
			if got, err := peerName(conn.TCPConn); got != vip || err != nil {
				t.Fatalf("the application sees %s, %v; want the service %s", got, err, vip)
			}
			name := make([]byte, 16)
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			n, err := conn.Read(name)
			if err != nil {
				t.Fatal(err)
			}
			seen[string(name[:n])]++
			_ = conn.Close()
		}
		if seen["near"] < all/4 || seen["db"] < all/4 {
			t.Errorf("of %d connections: %v", all, seen)
		}
		if n := o.scrape(1).sum("istio_tcp_connections_opened_total", "reporter", "source", "destination_workload", "near",
			"connection_security_policy", "none", "destination_service_name", "back"); n < all/4 {
			t.Errorf("%v connections to the service went by the kernel", n)
		}
	})
}

func TestConnectionsByTheKernelOutliveTheAgent(t *testing.T) {
	o := newOneNode(t, lab.Options{})
	live, listed := o.byKernel(o.to)
	if err := o.agent(1).Kill(); err != nil {
		t.Fatal(err)
	}
	if err := live.use(); err != nil {
		t.Error("without an agent:", err)
	}
	if err := refused(o.web, o.to); err != nil {
		t.Error("a new connection without an agent:", err)
	}
	if _, err := o.agent(1).Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next agent lists the connection", func() error {
		list, err := o.client(1).Connections(t.Context())
		if err != nil {
			return err
		}
		for _, c := range list {
			if c.Source.Addr == listed.Source.Addr && c.Protocol == dataplane.ProtocolKernel && c.Sent >= uint64(2*len(nonce())) && c.Source.Workload == "web" {
				return nil
			}
		}
		return fmt.Errorf("not among %+v", list)
	})
	o.byKernel(o.to)
	o.deny()
	if err := resetOf(live.TCPConn); err != nil {
		t.Error("the next agent cuts what policy denies:", err)
	}
}

func TestReleaseSparesConnectionsByTheKernel(t *testing.T) {
	o := newOneNode(t, lab.Options{})
	live, _ := o.byKernel(o.to)
	if err := o.LabelNamespace("shop", ""); err != nil {
		t.Fatal(err)
	}
	o.awaitState(dataplane.CaptureNone, o.web, o.near)
	if err := live.use(); err != nil {
		t.Error("its pods are released:", err)
	}
	o.deny()
	time.Sleep(200 * time.Millisecond) // policy is nobody's business now
	if err := live.use(); err != nil {
		t.Error("a policy for pods that are not captured:", err)
	}
	if err := o.DeleteFile("policy.yaml"); err != nil {
		t.Fatal(err)
	}
	o.enrol(o.web, o.near)
	if err := live.use(); err != nil {
		t.Error("its pods are enrolled again:", err)
	}
	o.byKernel(o.to)
}
