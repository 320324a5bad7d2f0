package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// way is how a request is made, and who answers it: the same with and without the mesh.
type way struct {
	name string
	// from is a pod as namespace/name, a node, or "outside".
	from string
	url  string
	// want are the pods that answer, every one of them now and then; none: nobody may.
	want []string
	// some need not be all of them: resolvers of headless names have a favourite.
	some bool
	// sticky wants one of them to answer always.
	sticky bool
	// source wants the pod's own address to be what the server sees.
	source bool
	// tunnelled is what the mesh makes of it, where it goes from one node to the other.
	tunnelled bool
}

// answer is that of the tests' application.
type answer struct{ Pod, Node, Peer string }

const hostNetwork = "  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet\n"

// tries are enough that each of two servers answers.
const tries = 20

// servicesOf are of all kinds. The arguments: namespace, address of server2, address outside.
const servicesOf = `---
apiVersion: v1
kind: Service
metadata: {name: nodeport, namespace: %[1]s}
spec: {type: NodePort, selector: {role: server}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: %[1]s}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: server2}, ports: [{port: 80, targetPort: 8080, nodePort: 30081}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: %[1]s}
spec: {type: LoadBalancer, selector: {role: server}, externalIPs: [203.0.113.20], ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: %[1]s}
spec: {type: ExternalName, externalName: server.%[1]s.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: %[1]s}
spec: {sessionAffinity: ClientIP, selector: {role: server}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: early, namespace: %[1]s}
spec: {publishNotReadyAddresses: true, selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: patient, namespace: %[1]s}
spec: {selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: ending, namespace: %[1]s}
spec: {selector: {app: ending}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: byhand, namespace: %[1]s}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: byhand-1, namespace: %[1]s, labels: {kubernetes.io/service-name: byhand}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [%[2]s], conditions: {ready: true}}]
---
apiVersion: v1
kind: Service
metadata: {name: faraway, namespace: %[1]s}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: faraway-1, namespace: %[1]s, labels: {kubernetes.io/service-name: faraway}}
addressType: IPv4
ports: [{name: http, port: 18090}]
endpoints: [{addresses: [%[3]s], conditions: {ready: true}}]
`

// TestConnectionsGoAsWithoutTheMesh asks in all ways that Kubernetes has before the label and
// after it.
func TestConnectionsGoAsWithoutTheMesh(t *testing.T) {
	w := onMesh(t)
	const ns, machines = "ways", "machines"
	w.namespace(t, ns)
	w.namespace(t, machines)
	w.kubectl(t, "label", "--overwrite", "namespace", machines, "pod-security.kubernetes.io/enforce=privileged")
	outside := w.serveOutside(t)
	w.apply(t, fmt.Sprintf(serverService, ns))
	server := func(node int) pod {
		return pod{name: fmt.Sprintf("server%d", node), node: node, args: []string{"serve"}, labels: map[string]string{"role": "server"}}
	}
	w.run(t, ns, server(1), server(2),
		pod{name: "client", node: 1, args: []string{"serve"}},
		pod{name: "ending", node: 2, args: []string{"serve"}, extra: "    lifecycle: {preStop: {sleep: {seconds: 500}}}\n", spec: "  terminationGracePeriodSeconds: 600\n"})
	w.run(t, machines,
		pod{name: "machine1", node: 1, args: []string{"serve"}, spec: hostNetwork},
		pod{name: "machine2", node: 2, args: []string{"serve"}, spec: hostNetwork},
		pod{name: "porter", node: 2, args: []string{"serve"}, extra: "    ports: [{containerPort: 8080, hostPort: 18080}]\n"})
	w.apply(t, pod{
		name: "unready", node: 2, args: []string{"serve"}, extra: "    readinessProbe: {tcpSocket: {port: 1}}\n",
	}.manifest(ns))
	w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.phase}=Running", "pod/unready", "--timeout=90s")
	w.apply(t, fmt.Sprintf(servicesOf, ns, w.podIP(t, ns, "server2"), outside))
	w.kubectl(t, "-n", ns, "patch", "service", "balanced", "--subresource=status", "--type=merge",
		`-p={"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.10"}]}}}`)
	w.kubectl(t, "-n", ns, "delete", "pod", "ending", "--wait=false")
	t.Cleanup(func() {
		out, err := w.Kubectl(context.WithoutCancel(t.Context()), "-n", ns, "delete", "pod", "ending", "--force", "--grace-period=0")
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})

	node1, node2 := w.Node(1).Addrs[0].String(), w.Node(2).Addrs[0].String()
	both, first, second := []string{"server1", "server2"}, []string{"server1"}, []string{"server2"}
	server2, porter := w.podIP(t, ns, "server2"), w.podIP(t, machines, "porter")
	const client, machine, outsider = ns + "/client", machines + "/machine1", "outside"
	ways := []way{
		{name: "pod", from: client, url: server2 + ":8080", want: second, source: true, tunnelled: true},
		{name: "pod on the same node", from: client, url: w.host(t, ns, "server1") + ":8080", want: first, source: true},
		{name: "itself", from: client, url: w.host(t, ns, "client") + ":8080", want: []string{"client"}},
		{name: "its loopback interface", from: client, url: "localhost:8080", want: []string{"client"}},
		{name: "cluster IP", from: client, url: "server", want: both, source: true, tunnelled: true},
		{name: "full name", from: client, url: "server." + ns + ".svc.cluster.local", want: both, tunnelled: true},
		{name: "headless", from: client, url: "headless:8080", want: both, some: true, tunnelled: true},
		{name: "ExternalName", from: client, url: "alias", want: both, tunnelled: true},
		{name: "endpoint by hand", from: client, url: "byhand", want: second, tunnelled: true},
		{name: "endpoint by hand, outside", from: client, url: "faraway", want: []string{outsider}},
		{name: "address outside", from: client, url: outside + ":18090", want: []string{outsider}},
		{name: "session affinity", from: client, url: "sticky", want: both, sticky: true, tunnelled: true},
		{name: "not ready, and published", from: client, url: "early", want: []string{"unready"}, tunnelled: true},
		{name: "not ready", from: client, url: "patient"},
		{name: "terminating, and nobody else", from: client, url: "ending", want: []string{"ending"}, tunnelled: true},
		{name: "node port of its node", from: client, url: node1 + ":30080", want: both, tunnelled: true},
		{name: "node port of another node", from: client, url: node2 + ":30080", want: both, tunnelled: true},
		{name: "node port Local", from: client, url: node2 + ":30081", want: second, tunnelled: true},
		{name: "node port Local of its node, which has no endpoint", from: client, url: node1 + ":30081", want: second, tunnelled: true},
		{name: "load balancer", from: client, url: "203.0.113.10", want: both, tunnelled: true},
		{name: "external IP", from: client, url: "203.0.113.20", want: both, tunnelled: true},
		{name: "host network", from: client, url: node2 + ":8080", want: []string{"node2"}},
		{name: "host network of its node", from: client, url: node1 + ":8080", want: []string{"node1"}},
		{name: "host port", from: client, url: node2 + ":18080", want: []string{"porter"}},
		{name: "pod with a host port", from: client, url: porter + ":8080", want: []string{"porter"}, tunnelled: true},
		{name: "from the host network", from: machine, url: server2 + ":8080", want: second},
		{name: "from the host network, cluster IP", from: machine, url: "server." + ns, want: both},
		{name: "from the host network, node port", from: machine, url: node1 + ":30080", want: both},
		{name: "from a node", from: "node1", url: server2 + ":8080", want: second},
		{name: "from a node, host port", from: "node2", url: node2 + ":18080", want: []string{"porter"}},
		{name: "from outside, node port", from: outsider, url: node1 + ":30080", want: both},
		{name: "from outside, node port Local", from: outsider, url: node2 + ":30081", want: second},
		{name: "from outside, host port", from: outsider, url: node2 + ":18080", want: []string{"porter"}},
	}
	wire := w.wire(t, 2)
	everyWay := func(meshed bool) func(*testing.T) {
		return func(t *testing.T) {
			for _, way := range ways {
				t.Run(way.name, func(t *testing.T) {
					t.Parallel()
					way.tunnelled = way.tunnelled && meshed
					w.try(t, way, func(text string) bool { clear, _ := seen(t, wire, text); return clear })
				})
			}
		}
	}
	// kube-proxy takes a moment for each service.
	for _, way := range ways {
		if len(way.want) > 0 {
			eventually(t, way.name, func() error {
				_, err := w.ask(t, way.from, "http://"+way.url+"/")
				return err
			})
		}
	}
	t.Run("without", everyWay(false))
	w.kubectl(t, "label", "namespace", ns, machines, enrolled)
	w.captured(t, ns, true, "client", "server1", "server2", "unready", "ending")
	w.captured(t, machines, true, "porter")
	w.captured(t, machines, false, "machine1", "machine2")
	t.Run("with", everyWay(true))
}

// try asks until everybody who is to answer has.
func (w *world) try(t *testing.T, way way, inClear func(text string) bool) {
	t.Helper()
	if len(way.want) == 0 {
		for range 2 {
			if got, err := w.ask(t, way.from, "http://"+way.url+"/"); err == nil {
				t.Errorf("%s answered", got.Pod)
			}
		}
		return
	}
	met := make(map[string]bool)
	for range tries {
		text := needle()
		got, err := w.ask(t, way.from, "http://"+way.url+"/"+text)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(way.want, got.Pod) {
			t.Fatalf("%s answered; want %v", got.Pod, way.want)
		}
		met[got.Pod] = true
		peer, err := netip.ParseAddrPort(got.Peer)
		if namespace, name, isPod := strings.Cut(way.from, "/"); way.source && isPod && (err != nil || peer.Addr().Unmap().String() != w.podIP(t, namespace, name)) {
			t.Errorf("the server saw %s (%v)", got.Peer, err)
		}
		if crosses := got.Node == "node2" && !strings.HasPrefix(way.from, "node2"); crosses && inClear(text) == way.tunnelled {
			t.Errorf("tunnelled: %v", !way.tunnelled)
		}
		if done := way.some || len(met) == len(way.want); done && !way.sticky {
			return
		}
		if way.sticky && len(met) > 1 {
			t.Fatalf("%v answered", met)
		}
	}
	if !way.sticky {
		t.Errorf("only %v answered %d requests", slices.Collect(maps.Keys(met)), tries)
	}
}

// ask asks from a pod, a node or outside.
func (w *world) ask(t *testing.T, from, url string) (answer, error) {
	t.Helper()
	var (
		body string
		err  error
		got  answer
	)
	namespace, name, isPod := strings.Cut(from, "/")
	switch {
	case isPod:
		body, err = w.exec(t.Context(), namespace, name, "get", "-timeout", "15s", url)
	case from == "outside":
		body, err = get(t, w.Administrator(), url)
	default:
		at := slices.IndexFunc(w.Nodes(), func(n *cluster.Node) bool { return n.Name == from })
		body, err = get(t, w.Nodes()[at].Namespace(), url)
	}
	if err == nil {
		err = json.Unmarshal([]byte(body), &got)
	}
	return got, err
}

// get makes a request from any network namespace to an address.
func get(t *testing.T, from *netns.Namespace, url string) (_ string, err error) {
	t.Helper()
	client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return nil, err
			}
			return from.Dial(ctx, netns.DialConfig{Remote: to})
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// serveOutside answers on port 18090 of a machine that is no node, and returns its address.
func (w *world) serveOutside(t *testing.T) string {
	t.Helper()
	api, err := url.Parse(w.RESTConfig().Host)
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddr(api.Hostname())
	l, err := w.Administrator().Listen(netns.ListenConfig{Addr: netip.AddrPortFrom(address, 18090)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(answer{Pod: "outside", Peer: r.RemoteAddr}) // whoever asked has gone
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() { _ = server.Close(); serving.Wait() })
	return address.String()
}
