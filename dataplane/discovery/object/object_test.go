package object

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// try decodes one YAML document.
func try(t testing.TB, text string) (Object, error) {
	t.Helper()
	raw, err := yaml.YAMLToJSONStrict([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var typ TypeMeta
	if err := yaml.Unmarshal(raw, &typ); err != nil {
		t.Fatal(err)
	}
	return Decode(typ, raw)
}

func decode(t testing.TB, text string) Object {
	t.Helper()
	o, err := try(t, text)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// contents decodes documents and converts all of them, without any conflict.
func contents(t testing.TB, docs ...string) dataplane.Contents {
	t.Helper()
	c, conflicts := set(t, docs...).Contents(Mesh{})
	if len(conflicts) > 0 {
		t.Errorf("conflicts: %v", conflicts)
	}
	return c
}

func set(t testing.TB, docs ...string) *Set {
	t.Helper()
	s := new(Set)
	for _, doc := range docs {
		s.Put(decode(t, doc))
	}
	return s
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func equal(t testing.TB, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func TestDecodeRefusesAndIgnores(t *testing.T) {
	cases := []struct {
		name, text, want string // want "" is ErrIgnored
	}{
		{"a workload controller", `{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}`, ""},
		{"another core kind", `{apiVersion: v1, kind: ConfigMap, metadata: {name: web}}`, ""},
		{"another group's Service", `{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: web}}`, ""},
		{"a policy of requests", `{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: jwt}}`, ""},
		{"a misspelt policy", `{apiVersion: security.istio.io/v1, kind: AuthorisationPolicy, metadata: {name: p}}`, "no such kind"},
		{"a policy of the future", `{apiVersion: security.istio.io/v2, kind: AuthorizationPolicy, metadata: {name: p}}`, "version v2 is not understood"},
		{"an old EndpointSlice", `{apiVersion: discovery.k8s.io/v1beta1, kind: EndpointSlice, metadata: {name: web}}`, "version v1beta1 is not understood"},
		{"no name", `{apiVersion: v1, kind: Pod, metadata: {generateName: web-}}`, "metadata.name is missing"},
		{"a name that could change an identity", `{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: a/sa/b}}`, "metadata.namespace"},
		{"a name with capitals", `{apiVersion: v1, kind: Namespace, metadata: {name: Shop}}`, "metadata.name"},
		{"a service account that could change an identity", `{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {serviceAccountName: "a/b"}}`, "spec.serviceAccountName"},
		{"a UID that is a path", `{apiVersion: v1, kind: Pod, metadata: {name: web, uid: ../../etc}}`, "metadata.uid"},
		{"a UID without end", `{apiVersion: v1, kind: Pod, metadata: {name: web, uid: ` + strings.Repeat("a", 200) + `}}`, "longer than 128"},
		{"a pod IP that is none", `{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIPs: [{ip: 10.0.0.300}]}}`, `"10.0.0.300" is not an IP address`},
		{"a pod IP with a zone", `{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIP: "fe80::1%eth0"}}`, "IPv6 zone"},
		{"a field of another type", `{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {hostNetwork: "yes"}}`, "hostNetwork"},
		{"a pod CIDR that is none", `{apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDRs: [10.0.0.0/33]}}`, "spec.podCIDRs"},
		{"a node address that is none", `{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: n1}]}}`, "status.addresses"},
		{"a cluster IP that is none", `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: none}}`, "spec.clusterIPs"},
		{"a service port out of range", `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 70000}]}}`, "spec.ports[0].port: 70000"},
		{"a target port out of range", `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80, targetPort: -1}]}}`, "targetPort: -1"},
		{"an endpoint that is no address", `{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web}, endpoints: [{addresses: [a.example]}]}`, "endpoints[0].addresses"},
		{"an endpoint port out of range", `{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web}, ports: [{port: 0}]}`, "ports[0].port: 0"},
		{"a policy whose annotation is no text", `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, annotations: {istio.io/dry-run: true}}}`, "metadata"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o, err := try(t, c.text)
			switch {
			case err == nil:
				t.Fatalf("decoded %v", o.Key)
			case c.want == "" && !errors.Is(err, ErrIgnored):
				t.Errorf("error = %v, want it ignored", err)
			case c.want != "" && (errors.Is(err, ErrIgnored) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error = %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestSetTellsWhetherSomethingChanged(t *testing.T) {
	const web = `{apiVersion: v1, kind: Pod, metadata: {name: web, resourceVersion: "1"}, spec: {nodeName: n1}}`
	s := new(Set)
	if !s.Put(decode(t, web)) {
		t.Error("a new object changed nothing")
	}
	if s.Put(decode(t, strings.Replace(web, `"1"`, `"2"`, 1))) {
		t.Error("a new resourceVersion changed something")
	}
	if !s.Put(decode(t, strings.Replace(web, "n1", "n2", 1))) {
		t.Error("another node changed nothing")
	}
	key := Key{Kind: KindPod, Name: dataplane.Name{Namespace: "default", Name: "web"}}
	equal(t, "keys", s.Keys(), []Key{key})
	if !s.Delete(key) || s.Delete(key) {
		t.Error("Delete does not say whether there was one")
	}
	c, _ := s.Contents(Mesh{})
	equal(t, "workloads", len(c.Workloads), 0)
}

func TestContentsCarriesTheMesh(t *testing.T) {
	s := set(t,
		`{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}}`)
	c, _ := s.Contents(Mesh{TrustDomain: "td", RootNamespace: "root", ClusterDomain: "corp.local", Cluster: "east"})
	equal(t, "trust domain", c.TrustDomain, "td")
	equal(t, "root namespace", c.RootNamespace, "root")
	equal(t, "cluster", c.Workloads[0].Cluster, "east")
	equal(t, "host", c.Services[0].Host, "web.shop.svc.corp.local")
	c, _ = s.Contents(Mesh{})
	equal(t, "default host", c.Services[0].Host, "web.shop.svc.cluster.local")
}

// A snapshot owns its contents: what it writes into them must not reach the set.
func TestContentsAreFresh(t *testing.T) {
	s := set(t, `{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIP: 10.0.0.1}}`)
	first, _ := s.Contents(Mesh{TrustDomain: "a"})
	dataplane.NewSnapshot(first)
	second, _ := s.Contents(Mesh{TrustDomain: "b"})
	if id := second.Workloads[0].Identity; !id.IsZero() {
		t.Errorf("identity = %v before the snapshot", id)
	}
}

func TestNamespaceAndNode(t *testing.T) {
	c := contents(t, `
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {raceway.dev/dataplane-mode: ambient}
status: {phase: Active}
`, `
apiVersion: v1
kind: Node
metadata:
  name: n1
  labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}
spec:
  podCIDR: 10.244.1.0/24
  podCIDRs: [10.244.1.0/24, "fd00:1::5/64"]
status:
  addresses:
  - {address: 192.0.2.1, type: InternalIP}
  - {address: "::ffff:192.0.2.1", type: InternalIP}
  - {address: "2001:db8::1", type: ExternalIP}
  - {address: n1, type: Hostname}
`, `{apiVersion: v1, kind: Node, metadata: {name: n2}, spec: {podCIDR: 10.244.2.0/24}}`)
	equal(t, "namespaces", c.Namespaces, []dataplane.Namespace{
		{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}},
	})
	equal(t, "nodes", c.Nodes, []dataplane.Node{
		{
			Name: "n1", Region: "eu", Zone: "eu-1", Addrs: addrs("192.0.2.1", "2001:db8::1"),
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		},
		{Name: "n2", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}},
	})
}
