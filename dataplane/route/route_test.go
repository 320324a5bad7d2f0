package route

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ipFamily makes the addresses of one IP family, so that every case runs in both.
type ipFamily struct {
	name   string
	format string // of an address in the block that its first number names
	pods   string
}

var families = []ipFamily{
	{"v4", "10.%d.0.%d", "10.1.0.0/16"},
	{"v6", "fd00:%x::%x", "fd00:1::/32"},
}

func (f ipFamily) addr(block, host int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf(f.format, block, host))
}

// Blocks of addresses.
const (
	podBlock     = 1
	vipBlock     = 2
	nodeBlock    = 3
	outsideBlock = 4
)

func (f ipFamily) pod(host int) netip.Addr { return f.addr(podBlock, host) }

var shop = dataplane.Name{Namespace: "shop", Name: "web"}

func pod(f ipFamily, host int, node string) dataplane.Workload {
	return dataplane.Workload{
		UID: fmt.Sprintf("p%d", host), Name: dataplane.Name{Namespace: "shop", Name: fmt.Sprintf("web-%d", host)}, ServiceAccount: "web",
		Node: node, Addrs: []netip.Addr{f.pod(host)}, Phase: dataplane.PodRunning, Ready: true,
	}
}

func endpoint(f ipFamily, host int, node string) dataplane.Endpoint {
	return dataplane.Endpoint{Addr: f.pod(host), WorkloadUID: fmt.Sprintf("p%d", host), Node: node, Ready: true, Serving: true, Ports: map[string]uint16{"http": 8080}}
}

// world is three pods on three nodes in two zones, all captured, behind one service.
func world(f ipFamily) dataplane.Contents {
	c := dataplane.Contents{
		TrustDomain: "cluster.local",
		Namespaces:  []dataplane.Namespace{{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}}},
		Captured:    map[string]bool{"p1": true, "p2": true, "p3": true},
		Services: []dataplane.Service{{
			Name: shop, Addrs: []netip.Addr{f.addr(vipBlock, 1)}, Ports: []dataplane.ServicePort{{Name: "http", Port: 80}},
		}},
	}
	for i, zone := range []string{"z1", "z1", "z2"} {
		node := fmt.Sprintf("n%d", i+1)
		c.Nodes = append(c.Nodes, dataplane.Node{Name: node, Zone: zone, Addrs: []netip.Addr{f.addr(nodeBlock, i+1)}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(f.pods)}})
		c.Workloads = append(c.Workloads, pod(f, i+1, node))
		c.Services[0].Endpoints = append(c.Services[0].Endpoints, endpoint(f, i+1, node))
	}
	return c
}

// service changes the one service.
func service(change func(*dataplane.Service)) func(*dataplane.Contents, ipFamily) {
	return func(c *dataplane.Contents, _ ipFamily) { change(&c.Services[0]) }
}

func terminating(serving bool) func(*dataplane.Endpoint) {
	return func(e *dataplane.Endpoint) { e.Ready, e.Serving, e.Terminating = false, serving, true }
}

func unready(e *dataplane.Endpoint) { e.Ready, e.Serving = false, false }

func each(s *dataplane.Service, change func(*dataplane.Endpoint), hosts ...int) {
	for _, h := range hosts {
		change(&s.Endpoints[h-1])
	}
}

func TestServiceChoosesAmong(t *testing.T) {
	cases := []struct {
		name    string
		world   func(*dataplane.Contents, ipFamily)
		node    string // of the source; default n1
		exclude []int
		want    []int  // pods that may be chosen
		reason  string // when none may
		spare   int    // alternates beside the chosen one
	}{
		{name: "all ready endpoints", want: []int{1, 2, 3}, spare: 2},
		{name: "ready ones only", world: service(func(s *dataplane.Service) { each(s, unready, 1) }), want: []int{2, 3}, spare: 1},
		{name: "ready ones before terminating", world: service(func(s *dataplane.Service) { each(s, terminating(true), 1, 2) }), want: []int{3}},
		{name: "serving and terminating when none is ready", world: service(func(s *dataplane.Service) {
			each(s, unready, 1)
			each(s, terminating(true), 2)
			each(s, terminating(false), 3)
		}), want: []int{2}},
		{name: "none when none serves", world: service(func(s *dataplane.Service) { each(s, unready, 1, 2, 3) }), reason: "service shop/web has no ready endpoint"},
		{name: "none that serves without being ready or terminating", world: service(func(s *dataplane.Service) {
			each(s, func(e *dataplane.Endpoint) { e.Ready = false }, 1, 2, 3)
		}), reason: "no ready endpoint"},
		{name: "all when not ready ones are published", world: service(func(s *dataplane.Service) {
			each(s, unready, 1, 2, 3)
			s.PublishNotReady = true
		}), want: []int{1, 2, 3}, spare: 2},
		{name: "none when there are none", world: service(func(s *dataplane.Service) { s.Endpoints = nil }), reason: "service shop/web has no endpoints"},
		{name: "those with the port", world: service(func(s *dataplane.Service) { s.Endpoints[0].Ports = map[string]uint16{"grpc": 1} }), want: []int{2, 3}, spare: 1},
		{name: "none of another family", world: service(func(s *dataplane.Service) {
			each(s, func(e *dataplane.Endpoint) {
				if e.Addr.Is4() {
					e.Addr, e.WorkloadUID = netip.MustParseAddr("fd00:1::99"), ""
				} else {
					e.Addr, e.WorkloadUID = netip.MustParseAddr("10.1.0.99"), ""
				}
			}, 1, 2, 3)
		}), reason: "endpoint for port 80"},
		{name: "the others after a failure", exclude: []int{2}, want: []int{1, 3}, spare: 1},
		{name: "none when all were tried", exclude: []int{1, 2, 3}, reason: "every endpoint of service shop/web was tried"},

		{name: "the node's with Local", world: service(func(s *dataplane.Service) { s.InternalTraffic = dataplane.TrafficLocal }), node: "n2", want: []int{2}},
		{name: "none with Local on an empty node", world: service(func(s *dataplane.Service) { s.InternalTraffic = dataplane.TrafficLocal }), node: "n9", reason: `no endpoint on node "n9", and its internalTrafficPolicy is Local`},
		{name: "none with Local and no ready one on the node", world: service(func(s *dataplane.Service) {
			s.InternalTraffic = dataplane.TrafficLocal
			each(s, unready, 1)
		}), reason: `no ready endpoint on node "n1", and its internalTrafficPolicy is Local`},
		{name: "the node's terminating one with Local", world: service(func(s *dataplane.Service) {
			s.InternalTraffic = dataplane.TrafficLocal
			each(s, terminating(true), 1)
		}), want: []int{1}},
		{name: "none with Local after the only one failed", world: service(func(s *dataplane.Service) { s.InternalTraffic = dataplane.TrafficLocal }), exclude: []int{1}, reason: "was tried"},

		{name: "the same zone", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferSameZone }), want: []int{1, 2}, spare: 2},
		{name: "the same zone by its older name", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferClose }), want: []int{1, 2}, spare: 2},
		{name: "the endpoint's own zone before its node's", world: service(func(s *dataplane.Service) {
			s.Distribution = dataplane.PreferSameZone
			s.Endpoints[2].Zone, s.Endpoints[1].Zone = "z1", "z2"
		}), want: []int{1, 3}, spare: 2},
		{name: "all when the zone has none", world: service(func(s *dataplane.Service) {
			s.Distribution = dataplane.PreferSameZone
			each(s, unready, 3)
		}), node: "n3", want: []int{1, 2}, spare: 1},
		{name: "all when the node's zone is unknown", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferSameZone }), node: "n9", want: []int{1, 2, 3}, spare: 2},
		{name: "the same node", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferSameNode }), want: []int{1}, spare: 2},
		{name: "the same zone when the node has none", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferSameNode }), exclude: []int{1}, want: []int{2}, spare: 1},
		{name: "all when node and zone have none", world: service(func(s *dataplane.Service) { s.Distribution = dataplane.PreferSameNode }), exclude: []int{1, 2}, want: []int{3}},
		{name: "any with a distribution it does not know", world: service(func(s *dataplane.Service) { s.Distribution = "PreferMoon" }), want: []int{1, 2, 3}, spare: 2},

		{name: "no endpoint whose pod has finished", world: func(c *dataplane.Contents, _ ipFamily) { c.Workloads[0].Phase = dataplane.PodFailed }, want: []int{2, 3}, spare: 1},
		{name: "no endpoint whose address is another pod's", world: func(c *dataplane.Contents, f ipFamily) {
			c.Services[0].Endpoints[0].Addr = f.pod(3)
		}, want: []int{2, 3}, spare: 1},
		{name: "no endpoint of an unknown pod at another's address", world: func(c *dataplane.Contents, f ipFamily) {
			c.Services[0].Endpoints[0].WorkloadUID = "unheard-of"
		}, want: []int{2, 3}, spare: 1},
	}
	for _, tc := range cases {
		for _, f := range families {
			t.Run(tc.name+"/"+f.name, func(t *testing.T) {
				contents := world(f)
				if tc.world != nil {
					tc.world(&contents, f)
				}
				flow := Flow{Source: &dataplane.Workload{Node: "n1"}, Node: tc.node, Dst: netip.AddrPortFrom(f.addr(vipBlock, 1), 80)}
				for _, host := range tc.exclude {
					flow.Exclude = append(flow.Exclude, netip.AddrPortFrom(f.pod(host), 8080))
				}
				choices := len(tc.want)
				var got []netip.AddrPort
				for i := range max(choices, 1) {
					d := Decide(dataplane.NewSnapshot(contents), flow, func(n int) int {
						if n != choices {
							t.Errorf("a choice among %d, want %d", n, choices)
						}
						return min(i, n-1)
					})
					if d.Service == nil || d.Service.Name != shop {
						t.Errorf("service is %v", d.Service)
					}
					if choices == 0 {
						if d.Action != Refuse || !strings.Contains(d.Reason, tc.reason) || d.Target.IsValid() {
							t.Errorf("%+v, want a refusal: %s", d, tc.reason)
						}
						continue
					}
					if d.Action != Tunnel || d.Alternates != tc.spare || d.Workload == nil || d.Workload.Identity.ServiceAccount != "web" {
						t.Errorf("%+v, want a tunnel with %d alternates", d, tc.spare)
					}
					got = append(got, d.Target)
				}
				var want []netip.AddrPort
				for _, host := range tc.want {
					want = append(want, netip.AddrPortFrom(f.pod(host), 8080))
				}
				if !slices.Equal(got, want) {
					t.Errorf("chose %v, want %v", got, want)
				}
			})
		}
	}
}

func TestDestination(t *testing.T) {
	cases := []struct {
		name   string
		world  func(*dataplane.Contents, ipFamily)
		source *dataplane.Workload
		block  int // of the destination
		host   int
		port   uint16
		tried  bool
		want   Action
		reason string
	}{
		{name: "captured pod", block: podBlock, host: 1, port: 5000, want: Tunnel, reason: "shop/web-1 is captured"},
		{name: "the source's own pod", source: &dataplane.Workload{UID: "p1"}, block: podBlock, host: 1, port: 5000, want: Tunnel, reason: "captured"},
		{name: "captured pod that terminates", world: func(c *dataplane.Contents, _ ipFamily) { c.Workloads[0].Terminating = true }, block: podBlock, host: 1, port: 5000, want: Tunnel, reason: "captured"},
		{name: "pod tried before", block: podBlock, host: 1, port: 5000, tried: true, want: Refuse, reason: "no other address"},
		{name: "enrolled pod that is not captured", world: func(c *dataplane.Contents, _ ipFamily) { delete(c.Captured, "p1") }, block: podBlock, host: 1, port: 5000, want: Passthrough, reason: `enrolled, but the agent of node "n1" has not`},
		{name: "enrolled pod that may be captured by now", world: func(c *dataplane.Contents, _ ipFamily) { c.Stale = true; delete(c.Captured, "p1") }, block: podBlock, host: 1, port: 5000, want: Wait, reason: "whether it is captured by now is not known"},
		{name: "captured pod of what was known last", world: func(c *dataplane.Contents, _ ipFamily) { c.Stale = true }, block: podBlock, host: 1, port: 5000, want: Tunnel, reason: "captured"},
		{name: "pod that is not enrolled", world: func(c *dataplane.Contents, _ ipFamily) { c.Captured, c.Namespaces = nil, nil }, block: podBlock, host: 1, port: 5000, want: Passthrough, reason: "shop/web-1 is not enrolled"},
		{name: "outbound port of a captured pod", block: podBlock, host: 1, port: dataplane.PortOutbound, want: Refuse, reason: "port 15001 of shop/web-1"},
		{name: "inbound port of a captured pod", block: podBlock, host: 1, port: dataplane.PortInbound, want: Refuse, reason: "port 15006 of shop/web-1"},
		{name: "tunnel port of a captured pod", block: podBlock, host: 1, port: dataplane.PortTunnel, want: Refuse, reason: "port 15008 of shop/web-1"},
		{name: "the same port of a pod that is not captured", world: func(c *dataplane.Contents, _ ipFamily) { c.Captured = nil }, block: podBlock, host: 1, port: dataplane.PortTunnel, want: Passthrough, reason: "enrolled"},
		{name: "service port that leads to the tunnel port", world: func(c *dataplane.Contents, _ ipFamily) {
			for i := range c.Services[0].Endpoints {
				c.Services[0].Endpoints[i].Ports = map[string]uint16{"http": dataplane.PortTunnel}
			}
		}, block: vipBlock, host: 1, port: 80, want: Refuse, reason: "belongs to the data plane"},
		{name: "pod on another network", world: func(c *dataplane.Contents, _ ipFamily) { c.Workloads[0].Network = "west" }, block: podBlock, host: 1, port: 5000, want: Refuse, reason: `on the network "west" and this pod on local`},
		{name: "pod on the source's network", source: &dataplane.Workload{Network: "west"}, world: func(c *dataplane.Contents, _ ipFamily) { c.Workloads[0].Network = "west" }, block: podBlock, host: 1, port: 5000, want: Tunnel, reason: "captured"},
		{name: "plain pod on another network", world: func(c *dataplane.Contents, _ ipFamily) { c.Captured, c.Workloads[0].Network = nil, "west" }, block: podBlock, host: 1, port: 5000, want: Refuse, reason: "between networks"},
		{name: "service without the port", block: vipBlock, host: 1, port: 81, want: Refuse, reason: "service shop/web has no TCP port 81"},
		{name: "unknown address in a pod range", block: podBlock, host: 77, port: 80, want: Wait, reason: "no pod with that address is known"},
		{name: "finished pod's address", world: func(c *dataplane.Contents, _ ipFamily) { c.Workloads[0].Phase = dataplane.PodSucceeded }, block: podBlock, host: 1, port: 80, want: Wait, reason: "no pod"},
		{name: "endpoint of a pod that is not known yet", world: func(c *dataplane.Contents, f ipFamily) {
			c.Services[0].Endpoints = []dataplane.Endpoint{endpoint(f, 77, "n1")}
		}, block: vipBlock, host: 1, port: 80, want: Wait, reason: "not known yet"},
		{name: "endpoint outside the cluster", world: func(c *dataplane.Contents, f ipFamily) {
			e := endpoint(f, 1, "")
			e.Addr, e.WorkloadUID = f.addr(outsideBlock, 1), ""
			c.Services[0].Endpoints = []dataplane.Endpoint{e}
		}, block: vipBlock, host: 1, port: 80, want: Passthrough, reason: "outside the cluster"},
		{name: "endpoint that is another service's cluster IP", world: func(c *dataplane.Contents, f ipFamily) {
			c.Services = append(c.Services, dataplane.Service{Name: dataplane.Name{Namespace: "shop", Name: "db"}, Addrs: []netip.Addr{f.addr(vipBlock, 2)}})
			e := endpoint(f, 1, "")
			e.Addr, e.WorkloadUID = f.addr(vipBlock, 2), ""
			c.Services[0].Endpoints = []dataplane.Endpoint{e}
		}, block: vipBlock, host: 1, port: 80, want: Refuse, reason: "the cluster IP of service shop/db"},
		{name: "endpoint written by hand that is a captured pod", world: func(c *dataplane.Contents, f ipFamily) {
			c.Services[0].Endpoints[0].WorkloadUID = ""
			c.Services[0].Endpoints = c.Services[0].Endpoints[:1]
		}, block: vipBlock, host: 1, port: 80, want: Tunnel, reason: "captured"},
		{name: "hostNetwork pod behind a service", world: func(c *dataplane.Contents, f ipFamily) {
			c.Workloads[0].HostNetwork, c.Workloads[0].Addrs = true, []netip.Addr{f.addr(nodeBlock, 1)}
			c.Services[0].Endpoints[0].Addr = f.addr(nodeBlock, 1)
			c.Services[0].Endpoints = c.Services[0].Endpoints[:1]
		}, block: vipBlock, host: 1, port: 80, want: Passthrough, reason: "node's own network"},
		{name: "node", block: nodeBlock, host: 2, port: 10250, want: Passthrough, reason: "address of node n2"},
		{name: "node inside a pod range", world: func(c *dataplane.Contents, f ipFamily) { c.Nodes[0].Addrs = []netip.Addr{f.pod(200)} }, block: podBlock, host: 200, port: 10250, want: Passthrough, reason: "address of node n1"},
		{name: "node port", world: nodePort(""), block: nodeBlock, host: 2, port: 30080, want: Tunnel, reason: "service shop/web chose"},
		{name: "node port of nobody", world: nodePort(""), block: nodeBlock, host: 2, port: 30081, want: Passthrough, reason: "address of node n2"},
		{name: "node port of an address that is no node's", world: nodePort(""), block: outsideBlock, host: 9, port: 30080, want: Passthrough, reason: "outside the cluster"},
		{name: "node port of a node without an endpoint, Local", world: func(c *dataplane.Contents, f ipFamily) {
			nodePort(dataplane.TrafficLocal)(c, f)
			c.Services[0].Endpoints = c.Services[0].Endpoints[1:2]
		}, block: nodeBlock, host: 1, port: 30080, want: Tunnel, reason: "shop/web-2 is captured"},
		{name: "external address", world: external(outsideBlock, 9), block: outsideBlock, host: 9, port: 80, want: Tunnel, reason: "service shop/web chose"},
		{name: "port of an external address that is not the service's", world: external(outsideBlock, 9), block: outsideBlock, host: 9, port: 443, want: Passthrough, reason: "outside the cluster"},
		{name: "port of a node that a service has as its external address", world: external(nodeBlock, 2), block: nodeBlock, host: 2, port: 10250, want: Passthrough, reason: "address of node n2"},
		{name: "node port there", world: func(c *dataplane.Contents, f ipFamily) {
			external(nodeBlock, 2)(c, f)
			nodePort("")(c, f)
		}, block: nodeBlock, host: 2, port: 30080, want: Tunnel, reason: "service shop/web chose"},
		{name: "external address that two services share", world: func(c *dataplane.Contents, f ipFamily) {
			external(outsideBlock, 9)(c, f)
			other := c.Services[0]
			other.Name.Name, other.Addrs, other.Ports = "a", nil, []dataplane.ServicePort{{Name: "http", Port: 443}}
			c.Services = append(c.Services, other)
		}, block: outsideBlock, host: 9, port: 80, want: Tunnel, reason: "service shop/web chose"},
		{name: "outside", block: outsideBlock, host: 9, port: 443, want: Passthrough, reason: "outside the cluster"},
	}
	for _, tc := range cases {
		for _, f := range families {
			t.Run(tc.name+"/"+f.name, func(t *testing.T) {
				contents := world(f)
				if tc.world != nil {
					tc.world(&contents, f)
				}
				dst := netip.AddrPortFrom(f.addr(tc.block, tc.host), tc.port)
				flow := Flow{Source: tc.source, Node: "n1", Dst: dst}
				if tc.tried {
					flow.Exclude = []netip.AddrPort{dst}
				}
				d := Decide(dataplane.NewSnapshot(contents), flow, nil)
				if d.Action != tc.want || !strings.Contains(d.Reason, tc.reason) {
					t.Errorf("%v (%s), want %v (…%s…)", d.Action, d.Reason, tc.want, tc.reason)
				}
				if tc.want == Tunnel && d.Workload == nil {
					t.Error("a tunnel to no workload")
				}
				if d.Service == nil && d.Target != dst {
					t.Errorf("target is %v, want %v", d.Target, dst)
				}
			})
		}
	}
}

// external gives the service an address outside the cluster.
func external(block, host int) func(*dataplane.Contents, ipFamily) {
	return func(c *dataplane.Contents, f ipFamily) {
		c.Services[0].External = []netip.Addr{f.addr(block, host)}
	}
}

// nodePort gives the service a port on every node, and a policy that is for its cluster IP.
func nodePort(policy dataplane.TrafficPolicy) func(*dataplane.Contents, ipFamily) {
	return func(c *dataplane.Contents, _ ipFamily) {
		c.Services[0].Ports[0].NodePort, c.Services[0].InternalTraffic = 30080, policy
	}
}

func TestClientsWithAffinityKeepToOneEndpoint(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			contents := world(f)
			contents.Services[0].SessionAffinity = true
			s := dataplane.NewSnapshot(contents)
			never := func(int) int { t.Fatal("the choice was left to chance"); return 0 }
			clients := make(map[netip.AddrPort]int) // by the endpoint that they got
			for host := range 300 {
				client := &dataplane.Workload{Addrs: []netip.Addr{f.addr(outsideBlock, 1+host%250), f.addr(5+host/250, 1)}}
				flow := Flow{Source: client, Node: "n1", Dst: netip.AddrPortFrom(f.addr(vipBlock, 1), 80)}
				first := Decide(s, flow, never)
				if again := Decide(s, flow, never); again.Target != first.Target {
					t.Fatalf("a client got %v, then %v", first.Target, again.Target)
				}
				clients[first.Target]++
				flow.Exclude = []netip.AddrPort{first.Target}
				if other := Decide(s, flow, never); other.Target == first.Target || other.Action != Tunnel {
					t.Fatalf("after %v failed: %v %v", first.Target, other.Action, other.Target)
				}
			}
			if len(clients) != 3 {
				t.Fatalf("clients went to %d of 3 endpoints", len(clients))
			}
			for target, n := range clients {
				if n < 50 {
					t.Errorf("%v got %d of 300 clients", target, n)
				}
			}
		})
	}
}

func TestAffinityOfAnUnknownClientIsLeftToChance(t *testing.T) {
	contents := world(families[0])
	contents.Services[0].SessionAffinity = true
	d := Decide(dataplane.NewSnapshot(contents), Flow{Dst: netip.AddrPortFrom(families[0].addr(vipBlock, 1), 80)}, func(n int) int { return n - 1 })
	if d.Action != Tunnel {
		t.Errorf("%+v", d)
	}
}

func TestMappedDestinationIsUnmapped(t *testing.T) {
	s := dataplane.NewSnapshot(world(families[0]))
	d := Decide(s, Flow{Dst: netip.MustParseAddrPort("[::ffff:10.1.0.1]:80")}, nil)
	if d.Action != Tunnel || d.Target != netip.MustParseAddrPort("10.1.0.1:80") {
		t.Errorf("%+v", d)
	}
}

func TestNothingIsDecidedWithoutASnapshot(t *testing.T) {
	d := Decide(nil, Flow{Dst: netip.MustParseAddrPort("192.0.2.1:80")}, nil)
	if d.Action != Wait || d.Reason == "" {
		t.Errorf("%+v", d)
	}
}

func TestFlowWithoutDestinationIsRefused(t *testing.T) {
	if d := Decide(dataplane.NewSnapshot(dataplane.Contents{}), Flow{}, nil); d.Action != Refuse || d.Reason == "" {
		t.Errorf("%+v", d)
	}
}

func TestActionsAreWords(t *testing.T) {
	text, err := json.Marshal([]Action{Refuse, Tunnel, Passthrough, Wait})
	if err != nil || string(text) != `["refuse","tunnel","passthrough","wait"]` {
		t.Errorf("%s, %v", text, err)
	}
}

// FuzzDecide: whatever the flow, the decision has a reason, and no captured pod is ever
// reached in clear.
func FuzzDecide(f *testing.F) {
	f.Add([]byte{10, 1, 0, 1}, uint16(80), uint8(0), "n1")
	f.Add([]byte{10, 2, 0, 1}, uint16(80), uint8(7), "n2")
	f.Add(netip.MustParseAddr("fd00:1::1").AsSlice(), uint16(15008), uint8(1), "")
	f.Fuzz(func(t *testing.T, raw []byte, port uint16, captured uint8, node string) {
		addr, _ := netip.AddrFromSlice(raw)
		fam := families[1]
		if addr.Unmap().Is4() {
			fam = families[0]
		}
		contents := world(fam)
		for i, uid := range []string{"p1", "p2", "p3"} {
			contents.Captured[uid] = captured&(1<<i) != 0
		}
		s := dataplane.NewSnapshot(contents)
		flow := Flow{Node: node, Dst: netip.AddrPortFrom(addr, port)}
		for range 5 {
			d := Decide(s, flow, nil)
			if d.Reason == "" {
				t.Fatalf("%+v has no reason", d)
			}
			if w := s.WorkloadAt(d.Target.Addr()); w != nil && w.Captured && d.Action == Passthrough {
				t.Fatalf("%+v reaches a captured pod in clear", d)
			}
			if !d.Target.IsValid() || slices.Contains(flow.Exclude, d.Target) {
				return
			}
			flow.Exclude = append(flow.Exclude, d.Target)
		}
	})
}

func BenchmarkDecideService(b *testing.B) {
	contents := world(families[0])
	for host := 4; host < 104; host++ {
		contents.Workloads = append(contents.Workloads, pod(families[0], host, "n1"))
		contents.Services[0].Endpoints = append(contents.Services[0].Endpoints, endpoint(families[0], host, "n1"))
	}
	s := dataplane.NewSnapshot(contents)
	flow := Flow{Node: "n1", Dst: netip.MustParseAddrPort("10.2.0.1:80")}
	b.ReportAllocs()
	for b.Loop() {
		Decide(s, flow, nil)
	}
}

// UDP goes in a tunnel to who published that it takes it, and never by a TCP port's endpoint.
func TestUDPGoesToWhoTakesIt(t *testing.T) {
	pod := func(uid, addr string) dataplane.Workload {
		return dataplane.Workload{UID: uid, Name: dataplane.Name{Namespace: "shop", Name: uid}, Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Phase: dataplane.PodRunning}
	}
	vip := netip.MustParseAddr("10.96.0.1")
	s := dataplane.NewSnapshot(dataplane.Contents{
		Workloads: []dataplane.Workload{pod("takes", "10.0.0.1"), pod("not", "10.0.0.2")},
		Services: []dataplane.Service{{
			Name: dataplane.Name{Namespace: "shop", Name: "dns"}, Addrs: []netip.Addr{vip},
			Ports: []dataplane.ServicePort{{Name: "tcp", Port: 53}, {Name: "web", Port: 80}}, UDPPorts: []dataplane.ServicePort{{Name: "udp", Port: 53}},
			Endpoints: []dataplane.Endpoint{{
				Addr: netip.MustParseAddr("10.0.0.2"), WorkloadUID: "not", Ready: true, Ports: map[string]uint16{"tcp": 1, "udp": 5353},
			}, {
				Addr: netip.MustParseAddr("10.0.0.1"), WorkloadUID: "takes", Ready: true, Ports: map[string]uint16{"tcp": 1, "udp": 5353, "web": 2},
			}},
			External: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		}},
		Captured: map[string]bool{"takes": true, "not": true},
		UDP:      map[string]bool{"takes": true},
	})
	for _, c := range []struct {
		dst    string
		action Action
		target string
	}{
		{"10.0.0.1:9", Tunnel, "10.0.0.1:9"},
		{"10.0.0.2:9", Passthrough, "10.0.0.2:9"},
		{"10.96.0.1:53", Tunnel, "10.0.0.1:5353"},
		{"10.96.0.1:80", Refuse, ""},
		{"192.0.2.1:80", Passthrough, "192.0.2.1:80"},
	} {
		d := Decide(s, Flow{Dst: netip.MustParseAddrPort(c.dst), UDP: true}, func(int) int { return 0 })
		if d.Action != c.action || c.target != "" && d.Target.String() != c.target {
			t.Errorf("%s: %v %v (%s), want %v %s", c.dst, d.Action, d.Target, d.Reason, c.action, c.target)
		}
	}
}
