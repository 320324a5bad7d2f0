package samenode_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

// world has pods web, near and away of namespace shop, and other of namespace bank; away is on
// another node. Service back has near and away behind it.
func world(change func(*dataplane.Contents)) dataplane.Contents {
	pod := func(namespace, name, node string, addrs ...string) dataplane.Workload {
		w := dataplane.Workload{
			UID: name, Name: dataplane.Name{Namespace: namespace, Name: name}, ServiceAccount: name, Node: node,
			Labels: map[string]string{"app": name}, Phase: dataplane.PodRunning, Ready: true,
		}
		for _, a := range addrs {
			w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
		}
		return w
	}
	endpoint := func(uid, addr, node string) dataplane.Endpoint {
		return dataplane.Endpoint{Addr: netip.MustParseAddr(addr), WorkloadUID: uid, Node: node, Ready: true, Serving: true, Ports: map[string]uint16{"": 8080}}
	}
	c := dataplane.Contents{
		TrustDomain: "cluster.local", RootNamespace: "istio-system",
		Namespaces: []dataplane.Namespace{{Name: "shop"}, {Name: "bank"}},
		Nodes: []dataplane.Node{
			{Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.1")}},
			{Name: "n2", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.2")}},
		},
		Workloads: []dataplane.Workload{
			pod("shop", "web", "n1", "10.1.0.1", "fd00::1"), pod("shop", "near", "n1", "10.1.0.2", "fd00::2"),
			pod("shop", "away", "n2", "10.2.0.1"), pod("bank", "other", "n1", "10.1.0.3"),
		},
		Services: []dataplane.Service{{
			Name: dataplane.Name{Namespace: "shop", Name: "back"}, Addrs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
			External:  []netip.Addr{netip.MustParseAddr("203.0.113.1")},
			Ports:     []dataplane.ServicePort{{Port: 80, NodePort: 30080}},
			Endpoints: []dataplane.Endpoint{endpoint("near", "10.1.0.2", "n1"), endpoint("away", "10.2.0.1", "n2"), endpoint("web", "10.1.0.1", "n1")},
		}},
		Captured: map[string]bool{"web": true, "near": true, "away": true, "other": true},
	}
	if change != nil {
		change(&c)
	}
	return c
}

func label(namespace, mode string) func(*dataplane.Contents) {
	return func(c *dataplane.Contents) {
		i := slices.IndexFunc(c.Namespaces, func(n dataplane.Namespace) bool { return n.Name == namespace })
		c.Namespaces[i].Labels = map[string]string{dataplane.SameNodeLabel: mode}
	}
}

func strict(mode dataplane.MTLSMode, ports map[uint16]dataplane.MTLSMode) func(*dataplane.Contents) {
	return func(c *dataplane.Contents) {
		p := dataplane.PeerAuthentication{Name: dataplane.Name{Namespace: "shop", Name: "strict"}, Mode: mode, PortModes: ports}
		if ports != nil {
			p.Selector = map[string]string{"app": "near"}
		}
		c.Authentications = append(c.Authentications, p)
	}
}

func policy(action dataplane.PolicyAction, dryRun bool, source dataplane.PolicySource) func(*dataplane.Contents) {
	return func(c *dataplane.Contents) {
		c.Authorizations = append(c.Authorizations, dataplane.AuthorizationPolicy{
			Name: dataplane.Name{Namespace: "shop", Name: "p"}, Action: action, DryRun: dryRun, Selector: map[string]string{"app": "near"},
			Rules: []dataplane.PolicyRule{{From: []dataplane.PolicySource{source}}},
		})
	}
}

func all(changes ...func(*dataplane.Contents)) func(*dataplane.Contents) {
	return func(c *dataplane.Contents) {
		for _, change := range changes {
			change(c)
		}
	}
}

func TestDecide(t *testing.T) {
	web := dataplane.PolicySource{Principals: []string{"cluster.local/ns/shop/sa/web"}}
	service := func(change func(*dataplane.Service)) func(*dataplane.Contents) {
		return func(c *dataplane.Contents) { change(&c.Services[0]) }
	}
	for _, test := range []struct {
		name   string
		change func(*dataplane.Contents)
		mode   dataplane.SameNodeMode
		from   string // default web
		to     string
		total  int
		local  string // of the endpoints
		out    []string
	}{
		{name: "pod", to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "pod, IPv6", to: "[fd00::2]:8080", total: 1, local: "[fd00::2]:8080"},
		{name: "v4-mapped", to: "[::ffff:10.1.0.2]:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "pod of another namespace", to: "10.1.0.3:1", total: 1, local: "10.1.0.3:1"},
		{name: "pod of another node", to: "10.2.0.1:8080", total: 1},
		{name: "pod without the address family", from: "other", to: "[fd00::2]:8080", total: 1},
		{name: "port of the data plane", to: "10.1.0.2:15008", total: 1},
		{name: "nobody", to: "10.1.0.9:80"},
		{name: "node", to: "192.168.0.1:22"},
		{name: "service, with the source and a pod elsewhere behind it", to: "10.96.0.1:80", total: 3, local: "10.1.0.2:8080"},
		{name: "service's unknown port", to: "10.96.0.1:81"},
		{name: "service's external address", to: "203.0.113.1:80"},
		{name: "node port", to: "192.168.0.1:30080"},
		{name: "session affinity", change: service(func(s *dataplane.Service) { s.SessionAffinity = true }), to: "10.96.0.1:80"},
		{name: "local traffic only", change: service(func(s *dataplane.Service) { s.InternalTraffic = dataplane.TrafficLocal }), to: "10.96.0.1:80", total: 2, local: "10.1.0.2:8080"},
		{name: "not ready", change: service(func(s *dataplane.Service) { s.Endpoints[0].Ready = false }), to: "10.96.0.1:80", total: 2},
		{name: "not captured", change: func(c *dataplane.Contents) { delete(c.Captured, "near") }, to: "10.1.0.2:8080", total: 1},
		{name: "capture not complete", out: []string{"near"}, to: "10.1.0.2:8080", total: 1},
		{name: "source's capture not complete", out: []string{"web"}, to: "10.1.0.2:8080"},
		{name: "state of yesterday", change: func(c *dataplane.Contents) { c.Stale = true }, to: "10.1.0.2:8080"},
		{name: "another network", change: func(c *dataplane.Contents) { c.Workloads[1].Network = "far" }, to: "10.1.0.2:8080", total: 1},

		{name: "denied", change: policy(dataplane.ActionDeny, false, web), to: "10.1.0.2:8080", total: 1},
		{name: "denied to another", change: policy(dataplane.ActionDeny, false, web), from: "other", to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "denied in a dry run", change: policy(dataplane.ActionDeny, true, web), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "allowed", change: policy(dataplane.ActionAllow, false, web), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "not among the allowed", change: policy(dataplane.ActionAllow, false, web), from: "other", to: "10.1.0.2:8080", total: 1},
		{
			name: "denied from one of the source's addresses", to: "10.1.0.2:8080", total: 1,
			change: all(policy(dataplane.ActionDeny, false, dataplane.PolicySource{IPBlocks: []netip.Prefix{netip.MustParsePrefix("10.1.0.99/32")}}),
				func(c *dataplane.Contents) {
					c.Workloads[0].Addrs = append(c.Workloads[0].Addrs, netip.MustParseAddr("10.1.0.99"))
				}),
		},

		{name: "STRICT", change: strict(dataplane.MTLSStrict, nil), to: "10.1.0.2:8080", total: 1},
		{name: "STRICT for the source alone", change: strict(dataplane.MTLSStrict, nil), to: "10.1.0.3:1", total: 1, local: "10.1.0.3:1"},
		{name: "STRICT on the port", change: strict("", map[uint16]dataplane.MTLSMode{8080: dataplane.MTLSStrict}), to: "10.1.0.2:8080", total: 1},
		{name: "STRICT on another port", change: strict("", map[uint16]dataplane.MTLSMode{1: dataplane.MTLSStrict}), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "STRICT, and the mesh says kernel", mode: "kernel", change: strict(dataplane.MTLSStrict, nil), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "STRICT, and the destination says kernel", change: all(strict(dataplane.MTLSStrict, nil), label("shop", "kernel")), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "STRICT, and the source alone says kernel", change: all(strict(dataplane.MTLSStrict, nil), label("bank", "kernel")), from: "other", to: "10.1.0.2:8080", total: 1},
		{name: "mesh says tunnel", mode: "tunnel", to: "10.1.0.2:8080", total: 1},
		{name: "mesh says tunnel, both ends kernel", mode: "tunnel", change: label("shop", "kernel"), to: "10.1.0.2:8080", total: 1, local: "10.1.0.2:8080"},
		{name: "mesh says tunnel, one end kernel", mode: "tunnel", change: label("shop", "kernel"), to: "10.1.0.3:1", total: 1},
		{name: "source says tunnel", change: label("shop", "tunnel"), to: "10.1.0.3:1", total: 1},
		{name: "destination says tunnel", change: label("bank", "tunnel"), to: "10.1.0.3:1", total: 1},
		{name: "tunnel wins over kernel", change: all(label("bank", "tunnel"), label("shop", "kernel")), to: "10.1.0.3:1", total: 1},
		{name: "a label that is no mode", change: label("bank", "kernal"), to: "10.1.0.3:1", total: 1},
		{name: "an empty label", change: label("bank", ""), to: "10.1.0.3:1", total: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := dataplane.NewSnapshot(world(test.change))
			j := &samenode.Judge{
				Node: "n1", Mode: test.mode, Snapshot: s, Rules: authz.NewSet(s).Rules,
				InForce: func(uid string) bool { return !slices.Contains(test.out, uid) },
			}
			from := test.from
			if from == "" {
				from = "web"
			}
			v := j.Decide(s.Workload(from), netip.MustParseAddrPort(test.to))
			var local []string
			for _, e := range v.Local {
				local = append(local, e.At.String())
			}
			if got := strings.Join(local, " "); got != test.local || v.Total != test.total {
				t.Errorf("%d endpoints, by the kernel %q; want %d, %q", v.Total, got, test.total, test.local)
			}
		})
	}
}

func TestIssuesNameLabelsThatAreNoModes(t *testing.T) {
	for value, complains := range map[string]bool{"kernel": false, "tunnel": false, "": true, "Kernel": true} {
		issues := samenode.Issues(dataplane.NewSnapshot(world(label("bank", value))))
		if complains != (len(issues) == 1 && strings.Contains(issues[0], "namespace bank")) {
			t.Errorf("%q: %q", value, issues)
		}
	}
	if issues := samenode.Issues(dataplane.NewSnapshot(world(nil))); len(issues) > 0 {
		t.Errorf("without labels: %q", issues)
	}
}
