package main

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/raceway-mesh/raceway/dataplane"
)

// podsPerNamespace is what teams have.
const podsPerNamespace = 1000

// Objects are of the size that they have in clusters, with what the data plane does not read.

func nodeName(n int) string { return fmt.Sprintf("node-%04d", n) }

// namespaces is how many there are; service s and its pods are in namespace s modulo them.
func (c Config) namespaces() int { return max(1, c.Pods/podsPerNamespace) }

func (c Config) namespaceOf(service int) string {
	return fmt.Sprintf("team-%03d", service%c.namespaces())
}

func (c Config) namespace(n int) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   fmt.Sprintf("team-%03d", n),
		Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient, "team": fmt.Sprint(n)},
	}}
}

func (c Config) node(n int) *corev1.Node {
	cidr := fmt.Sprintf("10.%d.%d.0/24", n>>8, n&255)
	out := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName(n), Labels: map[string]string{
			corev1.LabelTopologyRegion: "region-1", corev1.LabelTopologyZone: fmt.Sprintf("zone-%d", n%3),
			corev1.LabelHostname: nodeName(n), corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64",
		}},
		Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("172.16.%d.%d", n>>8, n&255)},
				{Type: corev1.NodeHostName, Address: nodeName(n)},
			},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}},
		},
	}
	for i := range 20 {
		image := fmt.Sprintf("registry.example/team-%d/application-%d", i, i)
		out.Status.Images = append(out.Status.Images, corev1.ContainerImage{
			Names:     []string{image + "@sha256:" + strings.Repeat("0123456789abcdef", 4), image + ":v1"},
			SizeBytes: 100 << 20,
		})
	}
	return out
}

func (c Config) appOf(pod int) int { return pod % c.Services }

func (c Config) podNode(pod int) int { return pod % c.Nodes }

func (c Config) podAddr(pod int) string {
	node := c.podNode(pod)
	return fmt.Sprintf("10.%d.%d.%d", node>>8, node&255, 2+pod/c.Nodes)
}

func (c Config) pod(n int) *corev1.Pod {
	app, controls := fmt.Sprintf("app-%04d", c.appOf(n)), true
	probe := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http")}}}
	out := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: c.namespaceOf(c.appOf(n)), Name: fmt.Sprintf("%s-5d78c9869d-%05d", app, n),
			Labels: map[string]string{
				"app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/version": "1.2.3",
				"app.kubernetes.io/managed-by": "helm", "pod-template-hash": "5d78c9869d",
			},
			Annotations: map[string]string{
				dataplane.RedirectionAnnotation: dataplane.RedirectionEnabled,
				"prometheus.io/scrape":          "true", "prometheus.io/port": "8080",
				"checksum/config": strings.Repeat("0123456789abcdef", 4),
			},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app + "-5d78c9869d", UID: "00000000-0000-4000-8000-000000000000", Controller: &controls,
			}},
		},
		Spec: corev1.PodSpec{
			NodeName: nodeName(c.podNode(n)),
			Containers: []corev1.Container{{
				Name: "application", Image: "registry.example/shop/" + app + ":1.2.3",
				Ports:     []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {Name: "metrics", ContainerPort: 9090}},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m")}},
				Env:       []corev1.EnvVar{{Name: "DATABASE", Value: "db." + c.namespaceOf(c.appOf(n)) + ":3306"}, {Name: "LOG_LEVEL", Value: "info"}},
				// Kubelets would say so, and nobody is here to.
				ReadinessProbe: probe, LivenessProbe: probe,
			}},
		},
	}
	return out
}

// running is the status that a kubelet writes.
func (c Config) running(n int, ready bool) corev1.PodStatus {
	condition := corev1.ConditionFalse
	if ready {
		condition = corev1.ConditionTrue
	}
	now := metav1.Now()
	status := corev1.PodStatus{
		Phase: corev1.PodRunning, HostIP: fmt.Sprintf("172.16.%d.%d", c.podNode(n)>>8, c.podNode(n)&255),
		PodIP: c.podAddr(n), PodIPs: []corev1.PodIP{{IP: c.podAddr(n)}}, StartTime: &now,
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: "application", Ready: ready, Image: "registry.example/shop/application:1.2.3",
			ImageID:     "registry.example/shop/application@sha256:" + strings.Repeat("0123456789abcdef", 4),
			ContainerID: "containerd://" + strings.Repeat("0123456789abcdef", 4),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		}},
	}
	for _, kind := range []corev1.PodConditionType{corev1.PodScheduled, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
		c := corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: now}
		if kind == corev1.ContainersReady || kind == corev1.PodReady {
			c.Status = condition
		}
		status.Conditions = append(status.Conditions, c)
	}
	return status
}

func (c Config) service(n int) *corev1.Service {
	app := fmt.Sprintf("app-%04d", n)
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: c.namespaceOf(n), Name: app, Labels: map[string]string{"app.kubernetes.io/name": app}},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app.kubernetes.io/name": app},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		},
	}
}

// slice is that of a service, of the pods that it has, as they were made.
func (c Config) slice(n int, pods []*pod) *discoveryv1.EndpointSlice {
	app, port, name, protocol := fmt.Sprintf("app-%04d", n), int32(8080), "http", corev1.ProtocolTCP
	out := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: c.namespaceOf(n), Name: app + "-x7x2k",
			Labels: map[string]string{discoveryv1.LabelServiceName: app, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	for _, p := range pods {
		node, zone, ready, no := nodeName(c.podNode(p.number)), fmt.Sprintf("zone-%d", c.podNode(p.number)%3), p.ready.Load(), false
		out.Endpoints = append(out.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{c.podAddr(p.number)}, NodeName: &node, Zone: &zone,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready, Terminating: &no},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: c.namespaceOf(n), Name: p.name, UID: p.uid},
		})
	}
	return out
}

// policy is, four times of five, an AuthorizationPolicy of one application, else its
// PeerAuthentication.
func (c Config) policy(n int) *unstructured.Unstructured {
	service := n % c.Services
	app := fmt.Sprintf("app-%04d", service)
	spec := map[string]any{"selector": map[string]any{"matchLabels": map[string]any{"app.kubernetes.io/name": app}}}
	kind := "AuthorizationPolicy"
	if n%5 == 4 {
		kind = "PeerAuthentication"
		spec["mtls"] = map[string]any{"mode": "STRICT"}
	} else {
		ns := c.namespaceOf(service)
		spec["rules"] = []any{map[string]any{
			"from": []any{map[string]any{"source": map[string]any{"principals": []any{
				"cluster.local/ns/" + ns + "/sa/web", "cluster.local/ns/" + ns + "/sa/api",
			}}}},
			"to": []any{map[string]any{"operation": map[string]any{"ports": []any{"8080"}}}},
		}}
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": kind,
		"metadata": map[string]any{"namespace": c.namespaceOf(service), "name": fmt.Sprintf("policy-%04d", n)},
		"spec":     spec,
	}}
}
