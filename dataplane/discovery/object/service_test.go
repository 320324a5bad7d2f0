package object

import (
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestService(t *testing.T) {
	cases := []struct {
		name, spec string
		want       dataplane.Service
	}{
		{
			"dual stack with a UDP port",
			`{clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7, "fd00::7"], internalTrafficPolicy: Local, trafficDistribution: PreferClose,
			  ports: [{name: dns, port: 53, protocol: UDP}, {name: http, port: 80, protocol: TCP, targetPort: web}, {name: sctp, port: 9, protocol: SCTP}]}`,
			dataplane.Service{
				Addrs:           addrs("10.96.0.7", "fd00::7"),
				Ports:           []dataplane.ServicePort{{Name: "http", Port: 80}},
				UDPPorts:        []dataplane.ServicePort{{Name: "dns", Port: 53}},
				InternalTraffic: dataplane.TrafficLocal,
				Distribution:    dataplane.PreferClose,
			},
		},
		{
			"headless",
			`{clusterIP: None, clusterIPs: [None], publishNotReadyAddresses: true, ports: [{port: 3306}]}`,
			dataplane.Service{Addrs: addrs(), Ports: []dataplane.ServicePort{{Port: 3306}}, PublishNotReady: true},
		},
		{
			"external name, whatever else it says",
			`{type: ExternalName, externalName: db.example.org, clusterIP: 10.96.0.9, externalIPs: [192.0.2.9]}`,
			dataplane.Service{Addrs: addrs()},
		},
		{
			"external addresses beside its own",
			`{clusterIP: 10.96.0.7, externalIPs: [192.0.2.9, 10.96.0.7]}`,
			dataplane.Service{Addrs: addrs("10.96.0.7"), External: addrs("192.0.2.9")},
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			all, _ := set(t, `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: `+c.spec+`}`).Contents(Mesh{})
			got := all.Services[0]
			c.want.Name, c.want.Host = dataplane.Name{Namespace: "shop", Name: "web"}, "web.shop.svc.cluster.local"
			if len(got.Addrs)+len(c.want.Addrs) == 0 {
				got.Addrs, c.want.Addrs = nil, nil
			}
			equal(t, "service", got, c.want)
		})
	}
}

func TestLoadBalancerAddresses(t *testing.T) {
	c := contents(t, `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.7, type: LoadBalancer},
	  status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: VIP}, {ip: 192.0.2.3, ipMode: Proxy}, {hostname: lb.example.org}]}}}`)
	equal(t, "cluster IPs", c.Services[0].Addrs, addrs("10.96.0.7"))
	equal(t, "external addresses", c.Services[0].External, addrs("192.0.2.1", "192.0.2.2"))
}

// Whoever may write a Service must not draw to it what is meant for a pod or another service.
func TestExternalAddressCannotTakeAnother(t *testing.T) {
	c, conflicts := set(t,
		`{apiVersion: v1, kind: Service, metadata: {name: a-thief}, spec: {clusterIP: 10.96.0.1, externalIPs: [10.96.0.2, 10.244.1.5, 192.0.2.1, 192.0.2.2]}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: victim}, spec: {clusterIP: 10.96.0.2, externalIPs: [192.0.2.2]},
		  status: {loadBalancer: {ingress: [{ip: 192.0.2.2}]}}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: victim}, status: {phase: Running, podIP: 10.244.1.5}}`).Contents(Mesh{})
	equal(t, "addresses", c.Services[0].Addrs, addrs("10.96.0.1"))
	equal(t, "external addresses", c.Services[0].External, addrs("192.0.2.1"))
	equal(t, "those of the victim", c.Services[1].External, addrs("192.0.2.2"))
	equal(t, "conflicts", len(conflicts), 3)
}

const webService = `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
  spec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: metrics, port: 90, targetPort: prom}]}}`

// pod writes a Pod of shop with the label app=web.
func webPod(name, rest string) string {
	return `{apiVersion: v1, kind: Pod, metadata: {name: ` + name + `, namespace: shop, uid: u-` + name + `, labels: {app: web}}, ` + rest + `}`
}

func TestEndpointSlices(t *testing.T) {
	c := contents(t, webService,
		`{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}}`,
		webPod("a", `spec: {nodeName: n1}, status: {phase: Running, podIPs: [{ip: 10.244.1.5}, {ip: "fd00:1::5"}]}`),
		`{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop}, spec: {nodeName: n2}, status: {phase: Running, podIP: 10.244.2.6}}`,
		`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}, {name: dns, port: 53, protocol: UDP}, {name: metrics, port: 9090}]
endpoints:
- addresses: [10.244.1.5]
  conditions: {ready: true, serving: true, terminating: false}
  nodeName: n1
  targetRef: {kind: Pod, name: a, namespace: shop, uid: u-a}
- addresses: [10.244.2.6]
  conditions: {ready: false, serving: true, terminating: true}
  zone: z2
  targetRef: {kind: Pod, name: b, namespace: shop, uid: other-than-derived}
- addresses: [192.0.2.50]
`, `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-2, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints:
- addresses: ["fd00:1::5"]
  conditions: {ready: false}
  targetRef: {kind: Pod, name: a}
`, `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-3, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: FQDN
endpoints: [{addresses: [web.example.org]}]
`, `
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: other, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.9.9.9]}]
`)
	both := map[string]uint16{"http": 8080, "metrics": 9090, "dns": 53}
	derived := derivedUID(dataplane.Name{Namespace: "shop", Name: "b"})
	equal(t, "endpoints", c.Services[0].Endpoints, []dataplane.Endpoint{
		{Addr: addrs("10.244.1.5")[0], WorkloadUID: "u-a", Node: "n1", Zone: "z1", Ready: true, Serving: true, Ports: both},
		{Addr: addrs("10.244.2.6")[0], WorkloadUID: derived, Node: "n2", Zone: "z2", Serving: true, Terminating: true, Ports: both},
		{Addr: addrs("192.0.2.50")[0], Ready: true, Serving: true, Ports: both},
		{Addr: addrs("fd00:1::5")[0], WorkloadUID: "u-a", Node: "n1", Zone: "z1", Ports: map[string]uint16{"http": 8080}},
	})
}

func TestSliceOfAnEarlierPodOrAForeignAddress(t *testing.T) {
	cases := []struct{ name, ref, want string }{
		{"the pod itself", `{kind: Pod, name: a, uid: u-a}`, "u-a"},
		{"its predecessor of the same name", `{kind: Pod, name: a, uid: u-old}`, "u-old"},
		{"a pod that has another address", `{kind: Pod, name: far, uid: u-far}`, "u-far"},
		{"a pod of the host's network that has another address", `{kind: Pod, name: host, uid: u-host}`, ""},
		{"a pod that is not known", `{kind: Pod, name: gone, uid: u-gone}`, "u-gone"},
		{"a node", `{kind: Node, name: a}`, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			all := contents(t, webService,
				webPod("a", `status: {phase: Running, podIP: 10.244.1.5}`),
				webPod("host", `spec: {hostNetwork: true}, status: {phase: Running, podIP: 192.0.2.1}`),
				webPod("far", `status: {phase: Running, podIP: 10.244.1.99}`),
				`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: w, namespace: shop, labels: {kubernetes.io/service-name: web}},
				  addressType: IPv4, endpoints: [{addresses: [10.244.1.5], targetRef: `+c.ref+`}]}`)
			equal(t, "workload", all.Services[0].Endpoints[0].WorkloadUID, c.want)
		})
	}
}

func TestAddressInTwoSlices(t *testing.T) {
	slice := func(name, condition, port string) string {
		return `{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: ` + name + `, namespace: shop, labels: {kubernetes.io/service-name: web}},
		  addressType: IPv4, ports: [{name: ` + port + `, port: 1}], endpoints: [{addresses: [10.244.1.5], conditions: {ready: ` + condition + `}}]}`
	}
	for _, order := range [][2]string{{"true", "false"}, {"false", "true"}} {
		c := contents(t, webService, slice("a", order[0], "http"), slice("b", order[1], "metrics"))
		equal(t, "endpoints", c.Services[0].Endpoints, []dataplane.Endpoint{{
			Addr: addrs("10.244.1.5")[0], Ready: true, Serving: true, Ports: map[string]uint16{"http": 1, "metrics": 1},
		}})
	}
}

func TestEndpointsWithoutSlices(t *testing.T) {
	const ready = `conditions: [{type: Ready, status: "True"}]`
	const prom = `containers: [{name: c, ports: [{name: prom, containerPort: 9100}, {name: prom, containerPort: 1}]}]`
	pods := []string{
		`{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}}`,
		webPod("a", `spec: {nodeName: n1, `+prom+`}, status: {phase: Running, `+ready+`, podIPs: [{ip: 10.244.1.5}, {ip: "fd00:1::5"}]}`),
		webPod("b", `spec: {nodeName: n1}, status: {phase: Running, podIPs: [{ip: 10.244.1.6}]}`),
		webPod("finished", `status: {phase: Succeeded, `+ready+`, podIP: 10.244.1.7}`),
		webPod("addressless", `status: {phase: Pending}`),
		`{apiVersion: v1, kind: Pod, metadata: {name: elsewhere, labels: {app: web}}, status: {phase: Running, podIP: 10.244.1.8}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: other, namespace: shop, labels: {app: db}}, status: {phase: Running, podIP: 10.244.1.9}}`,
	}
	a := dataplane.Endpoint{
		Addr: addrs("10.244.1.5")[0], WorkloadUID: "u-a", Node: "n1", Zone: "z1", Ready: true, Serving: true,
		Ports: map[string]uint16{"http": 8080, "metrics": 9100},
	}
	b := dataplane.Endpoint{
		Addr: addrs("10.244.1.6")[0], WorkloadUID: "u-b", Node: "n1", Zone: "z1", Ports: map[string]uint16{"http": 8080},
	}

	c := contents(t, append(pods, webService)...)
	equal(t, "endpoints of the cluster IP's family", c.Services[0].Endpoints, []dataplane.Endpoint{a, b})

	c = contents(t, append(pods, webService, `{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice,
	  metadata: {name: w, namespace: shop, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, endpoints: null}`)...)
	equal(t, "endpoints with an empty slice", len(c.Services[0].Endpoints), 0)

	c = contents(t, append(pods, `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
	  spec: {clusterIP: None, ipFamilies: [IPv6], selector: {app: web}, ports: [{port: 80}]}}`)...)
	equal(t, "IPv6 endpoints of a headless service", c.Services[0].Endpoints, []dataplane.Endpoint{{
		Addr: addrs("fd00:1::5")[0], WorkloadUID: "u-a", Node: "n1", Zone: "z1", Ready: true, Serving: true, Ports: map[string]uint16{"": 80},
	}})

	c = contents(t, append(pods, `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
	  spec: {clusterIP: 10.96.0.7, publishNotReadyAddresses: true, selector: {app: web}, ports: [{port: 80, targetPort: prom}]}}`)...)
	equal(t, "a pod without the named port is no endpoint", len(c.Services[0].Endpoints), 1)

	c = contents(t, append(pods, `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
	  spec: {clusterIP: 10.96.0.7, publishNotReadyAddresses: true, selector: {app: web}, ports: [{port: 80}]}}`)...)
	equal(t, "a pod that is not ready is published as ready", c.Services[0].Endpoints[1].Ready, true)

	c = contents(t, append(pods, `{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.7}}`)...)
	equal(t, "endpoints without a selector", len(c.Services[0].Endpoints), 0)
}

func TestTerminatingPodServesButIsNotReady(t *testing.T) {
	c := contents(t, webService, `{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: web}, deletionTimestamp: "2026-11-02T10:00:00Z"},
	  status: {phase: Running, podIP: 10.244.1.5, conditions: [{type: Ready, status: "True"}]}}`)
	e := c.Services[0].Endpoints[0]
	if e.Ready || !e.Serving || !e.Terminating {
		t.Errorf("endpoint = %+v", e)
	}
}

func TestNamedPortOfASidecarContainer(t *testing.T) {
	c := contents(t, webService, webPod("a", `spec: {containers: [{name: c, ports: [{name: prom, containerPort: 53, protocol: UDP}]}],
	  initContainers: [{name: once, ports: [{name: prom, containerPort: 1}]}, {name: always, restartPolicy: Always, ports: [{name: prom, containerPort: 9200}]}]},
	  status: {phase: Running, podIP: 10.244.1.5}`))
	equal(t, "ports", c.Services[0].Endpoints[0].Ports, map[string]uint16{"http": 8080, "metrics": 9200})
}
