package object

import (
	"encoding/json"
	"testing"
)

// What is kept of an object reads as the object did: nothing is lost over a restart.
func TestEncodedObjectsReadTheSame(t *testing.T) {
	for _, text := range []string{
		`{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {a: b}}}`,
		`{apiVersion: v1, kind: Namespace, metadata: {name: bare}}`,
		`{apiVersion: v1, kind: Node, metadata: {name: node-1, labels: {topology.kubernetes.io/zone: z, topology.kubernetes.io/region: r}},
		  spec: {podCIDRs: [10.0.0.0/24, "fd00::/64"]}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: ExternalIP, address: "2001:db8::1"}]}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: bare}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: web-5c-x, namespace: shop, uid: u-1, deletionTimestamp: "2026-01-01T00:00:00Z",
		  labels: {pod-template-hash: 5c, topology.istio.io/network: far}, annotations: {raceway.dev/netns: /run/netns/x},
		  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5c, controller: true, uid: x}]},
		  spec: {serviceAccountName: web, nodeName: node-1, containers: [{name: c, ports: [{name: http, containerPort: 80}, {name: admin, containerPort: 81}]}]},
		  status: {phase: Running, podIP: 10.0.0.5, podIPs: [{ip: 10.0.0.5}, {ip: "fd00::5"}], conditions: [{type: Ready, status: "True"}]}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: backup-29000000-x, namespace: shop, uid: u-2,
		  ownerReferences: [{apiVersion: batch/v1, kind: Job, name: backup-29000000, controller: true, uid: x}]},
		  spec: {hostNetwork: true}, status: {phase: Succeeded}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: etcd-n, namespace: kube-system, uid: u-3,
		  annotations: {kubernetes.io/config.hash: 0a1b, kubernetes.io/config.mirror: 0a1b},
		  ownerReferences: [{apiVersion: v1, kind: Node, name: node-1, controller: true, uid: x}]}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop}, spec: {type: LoadBalancer, selector: {app: db}, clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9, "fd00::9"],
		  ports: [{name: sql, port: 3306, targetPort: sql, nodePort: 30306}, {port: 80, targetPort: 8080}, {port: 53, protocol: UDP}, {name: same, port: 81}],
		  externalIPs: [192.0.2.9], internalTrafficPolicy: Local, externalTrafficPolicy: Local, sessionAffinity: ClientIP, trafficDistribution: PreferClose,
		  publishNotReadyAddresses: true}, status: {loadBalancer: {ingress: [{ip: 192.0.2.10}]}}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: headless}, spec: {clusterIP: None, ports: [{port: 80}]}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: alias}, spec: {type: ExternalName, externalName: example.org}}`,
		`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}, addressType: IPv4,
		  ports: [{name: sql, port: 3306}, {port: 80}], endpoints: [
		    {addresses: [10.0.0.5, 10.0.0.6], nodeName: node-1, zone: z, targetRef: {kind: Pod, name: web, namespace: shop, uid: u}},
		    {addresses: [10.0.0.7], conditions: {ready: false, serving: true, terminating: true}}]}`,
		`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: loose}, addressType: FQDN, endpoints: [{addresses: [example.org]}]}`,
	} {
		o := decode(t, text)
		raw, err := json.Marshal(o.Encode())
		if err != nil {
			t.Fatal(err)
		}
		var typ TypeMeta
		if err := json.Unmarshal(raw, &typ); err != nil {
			t.Fatal(err)
		}
		again, err := Decode(typ, raw)
		if err != nil {
			t.Fatalf("%s: %v", o.Key, err)
		}
		equal(t, o.Key.String(), again, o)
	}
}

func TestPoliciesAreNotEncoded(t *testing.T) {
	o := decode(t, `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p}, spec: {}}`)
	if o.Encode() != nil {
		t.Error("a policy was encoded from what was understood of it")
	}
}

func TestOnlyMirrorPodsHaveAStaticHash(t *testing.T) {
	o := decode(t, `{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {kubernetes.io/config.hash: 0a1b}}}`)
	if w, _ := o.Workload(); w.StaticHash != "" {
		t.Errorf("a pod that is no mirror has the hash %q", w.StaticHash)
	}
}
