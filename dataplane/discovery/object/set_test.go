package object

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"unsafe"

	"github.com/raceway-mesh/raceway/dataplane"
)

// What a Set keeps of its last Contents must never show: after any history they are those of
// a Set that was given the same objects just now.
func TestContentsDoNotDependOnHistory(t *testing.T) {
	for seed := range uint64(8) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		s, mesh := new(Set), Mesh{}
		there := make(map[Key]Object)
		for step := range 400 {
			o := randomObject(t, rnd)
			if rnd.IntN(3) == 0 {
				_, want := there[o.Key]
				if got := s.Delete(o.Key); got != want {
					t.Fatalf("seed %d, step %d: Delete(%s) = %v", seed, step, o.Key, got)
				}
				delete(there, o.Key)
			} else {
				s.Put(o)
				there[o.Key] = o
			}
			if rnd.IntN(50) == 0 {
				mesh.ClusterDomain = []string{"", "corp.local"}[rnd.IntN(2)]
			}
			if rnd.IntN(2) == 0 {
				continue
			}
			fresh := new(Set)
			for _, o := range there {
				fresh.Put(o)
			}
			got, gotConflicts := s.Contents(mesh)
			want, wantConflicts := fresh.Contents(mesh)
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("seed %d, step %d, after %s:\n%+v\nwant\n%+v", seed, step, o.Key, got, want)
			}
			if !reflect.DeepEqual(gotConflicts, wantConflicts) {
				t.Fatalf("seed %d, step %d, after %s: conflicts\n%v\nwant\n%v", seed, step, o.Key, gotConflicts, wantConflicts)
			}
			if got, want := s.Keys(), fresh.Keys(); !reflect.DeepEqual(got, want) {
				t.Fatalf("seed %d, step %d: keys\n%v\nwant\n%v", seed, step, got, want)
			}
		}
		for key := range there {
			s.Delete(key)
		}
		if len(s.uids) > 0 || s.twice != 0 || len(s.labels.maps) > 0 || len(s.ports.maps) > 0 {
			t.Errorf("seed %d: an empty set holds %d UIDs, %d of them twice, %d labels, %d ports",
				seed, len(s.uids), s.twice, len(s.labels.maps), len(s.ports.maps))
		}
	}
}

// randomObject is one of few, so that they meet.
func randomObject(t *testing.T, rnd *rand.Rand) Object {
	t.Helper()
	pick := func(list ...string) string { return list[rnd.IntN(len(list))] }
	pod, uid, addr := pick("a", "b", "c", "d", "e", "f"), pick("u1", "u2", "u3", "u4", "u5", "u6", "u7", "u8", "u9", ""), pick("10.0.0.1", "10.0.0.2", "10.0.0.3")
	doc := ""
	switch rnd.IntN(8) {
	case 0:
		doc = fmt.Sprintf(`{apiVersion: v1, kind: Node, metadata: {name: %s, labels: {topology.kubernetes.io/zone: %s, x: "%s"}}}`,
			pick("n1", "n2"), pick("z1", "z2"), pick("1", "2"))
	case 1:
		doc = fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {clusterIP: %s, selector: %s, externalIPs: [%s],
			ports: [{name: http, port: 80, targetPort: %s}]}, status: {loadBalancer: {ingress: [%s]}}}`,
			pick("s1", "s2"), pick("10.96.0.1", "10.96.0.2"), pick("{}", "{app: x}"), pick("", "", "1.1.1.1", addr), pick("http", "8080"), pick("", "", "{ip: 1.1.1.1}"))
	case 2, 3:
		doc = fmt.Sprintf(`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
			metadata: {name: %s, labels: {kubernetes.io/service-name: %s}}, ports: [{name: http, port: 8080}],
			endpoints: [{addresses: [%s], targetRef: {kind: Pod, name: %s, uid: "%s"}, nodeName: %s}, {addresses: [10.0.0.9], targetRef: {kind: Pod, name: %s}}]}`,
			pick("e1", "e2", "e3"), pick("s1", "s2"), addr, pod, uid, pick("n1", "null"), pick("d", "e", "f"))
	case 4:
		doc = fmt.Sprintf(`{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: %s}, spec: {mtls: {mode: %s}}}`,
			pick("p1", "p2"), pick("STRICT", "PERMISSIVE"))
	default:
		doc = fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, uid: "%s", labels: {app: %s}},
			spec: {nodeName: %s, hostNetwork: %s, containers: [{name: c, ports: [{name: http, containerPort: %s}]}]},
			status: {phase: Running, podIP: %s, conditions: [{type: Ready, status: "%s"}]}}`,
			pod, uid, pick("x", "z"), pick("n1", "n2"), pick("true", "false"), pick("80", "90"), addr, pick("True", "False"))
	}
	return decode(t, doc)
}

func TestPodsOfOneDeploymentShareTheirLabels(t *testing.T) {
	s := set(t,
		`{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: web, tier: "1"}}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: b, labels: {tier: "1", app: web}}}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: c, labels: {app: 'web"tier', "1": ""}}}`)
	c, _ := s.Contents(Mesh{})
	at := func(i int) unsafe.Pointer { return reflect.ValueOf(c.Workloads[i].Labels).UnsafePointer() }
	if at(0) != at(1) {
		t.Error("equal labels are held twice")
	}
	if at(0) == at(2) || len(c.Workloads[2].Labels) != 2 {
		t.Errorf("other labels are taken for equal: %v", c.Workloads[2].Labels)
	}
}

// A service that does not change is not built again: that is what a change of one pod costs
// in a large cluster.
func TestServicesAreBuiltWhenTheyChange(t *testing.T) {
	s := set(t,
		`{apiVersion: v1, kind: Pod, metadata: {name: a, uid: ua}, status: {phase: Running, podIP: 10.0.0.1}}`,
		`{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}}`,
		`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {name: web-1, labels: {kubernetes.io/service-name: web}},
		  ports: [{port: 80}], endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: a}}]}`)
	endpoints := func() *dataplane.Endpoint {
		c, _ := s.Contents(Mesh{})
		return &c.Services[0].Endpoints[0]
	}
	first := endpoints()
	s.Put(decode(t, `{apiVersion: v1, kind: Pod, metadata: {name: a, uid: ua, labels: {x: z}}, status: {phase: Running, podIP: 10.0.0.1}}`))
	if endpoints() != first {
		t.Error("a pod's labels had its service built again")
	}
	s.Put(decode(t, `{apiVersion: v1, kind: Pod, metadata: {name: a, uid: ub}, status: {phase: Running, podIP: 10.0.0.1}}`))
	if second := endpoints(); second == first || second.WorkloadUID != "ub" || first.WorkloadUID != "ua" {
		t.Errorf("with another pod: %+v, was %+v", second, first)
	}
}
