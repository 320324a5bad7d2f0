package object

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/raceway-mesh/raceway/dataplane"
)

// The cluster of the benchmarks: ten pods behind each service, fifty on each node.
const (
	benchPods    = 50_000
	benchBehind  = 10
	benchPerNode = 50
	benchPerNS   = 1_000
)

func benchNamespace(n int) string { return fmt.Sprintf("team-%03d", n/benchPerNS) }

func benchPod(b testing.TB, n int, ready bool) Object {
	app, controls, condition := n/benchBehind, true, corev1.ConditionFalse
	if ready {
		condition = corev1.ConditionTrue
	}
	o, err := FromPod(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: benchNamespace(n), Name: fmt.Sprintf("app-%04d-5d78c9869d-%05d", app, n),
			UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n)),
			Labels: map[string]string{
				"app.kubernetes.io/name": fmt.Sprintf("app-%04d", app), "app.kubernetes.io/part-of": "shop",
				"version": "v1", "pod-template-hash": "5d78c9869d",
			},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: fmt.Sprintf("app-%04d-5d78c9869d", app), Controller: &controls}},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: fmt.Sprintf("app-%04d", app), NodeName: fmt.Sprintf("node-%04d", n/benchPerNode),
			Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: condition}},
			PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)}},
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	return o
}

func benchSet(b testing.TB) *Set {
	s := new(Set)
	put := func(o Object, err error) {
		if err != nil {
			b.Fatal(err)
		}
		s.Put(o)
	}
	for n := 0; n < benchPods; n += benchPerNS {
		put(FromNamespace(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: benchNamespace(n), Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient},
		}}))
	}
	for n := range benchPods / benchPerNode {
		put(FromNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("node-%04d", n), Labels: map[string]string{corev1.LabelTopologyZone: fmt.Sprintf("zone-%d", n%3)},
		}}))
	}
	for n := range benchPods {
		s.Put(benchPod(b, n, true))
	}
	port, name := int32(8080), "http"
	for app := range benchPods / benchBehind {
		meta := metav1.ObjectMeta{Namespace: benchNamespace(app * benchBehind), Name: fmt.Sprintf("app-%04d", app)}
		put(FromService(&corev1.Service{
			ObjectMeta: meta,
			Spec: corev1.ServiceSpec{
				ClusterIP: fmt.Sprintf("10.96.%d.%d", app>>8, app&255),
				Selector:  map[string]string{"app.kubernetes.io/name": meta.Name},
				Ports:     []corev1.ServicePort{{Name: name, Port: 80, TargetPort: intstr.FromString(name)}},
			},
		}))
		meta.Labels = map[string]string{serviceNameLabel: meta.Name}
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4,
			Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		}
		for n := app * benchBehind; n < (app+1)*benchBehind; n++ {
			node, ready := fmt.Sprintf("node-%04d", n/benchPerNode), true
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)},
				Conditions: discoveryv1.EndpointConditions{Ready: &ready}, NodeName: &node,
				TargetRef: &corev1.ObjectReference{
					Kind: "Pod", Namespace: meta.Namespace, Name: fmt.Sprintf("app-%04d-5d78c9869d-%05d", app, n),
					UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n)),
				},
			})
		}
		put(FromEndpointSlice(slice))
	}
	return s
}

// BenchmarkSnapshot is what publishing a change of one pod costs.
func BenchmarkSnapshot(b *testing.B) {
	before := heap()
	s := benchSet(b)
	b.Logf("the set: %d B per pod", (heap()-before)/benchPods)
	var last *dataplane.Snapshot
	ready := false
	b.ReportAllocs()
	n, used := 0, cpuTime(b)
	for b.Loop() {
		s.Put(benchPod(b, n%benchPods, ready))
		contents, _ := s.Contents(Mesh{TrustDomain: "cluster.local"})
		last = dataplane.NewSnapshot(contents)
		n += 7919
		ready = !ready
	}
	// On a machine that is busy with something else, it alone tells.
	b.ReportMetric(float64((cpuTime(b)-used).Milliseconds())/float64(b.N), "cpu-ms/op")
	b.Logf("the set and a snapshot: %d B per pod", (heap()-before)/benchPods)
	runtime.KeepAlive(last)
	runtime.KeepAlive(s)
}

func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
