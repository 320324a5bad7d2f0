package object

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Encode returns an API object that a From function turns into o again: what is left of the
// original after all that the data plane does not read. Policies do not go this way, since
// what could not be read of them is not kept; it returns nil.
func (o Object) Encode() any {
	switch v := o.value.(type) {
	case dataplane.Namespace:
		return &corev1.Namespace{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: string(KindNamespace)},
			ObjectMeta: metav1.ObjectMeta{Name: v.Name, Labels: v.Labels},
		}
	case dataplane.Node:
		return encodeNode(o.Key.Name.Name, v)
	case pod:
		return encodePod(v)
	case service:
		return encodeService(v)
	case endpointSlice:
		return encodeSlice(o.Key.Name, v)
	default:
		return nil
	}
}

func encodeNode(name string, n dataplane.Node) *corev1.Node {
	out := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: string(KindNode)},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}},
	}
	for label, value := range map[string]string{corev1.LabelTopologyRegion: n.Region, corev1.LabelTopologyZone: n.Zone} {
		if value != "" {
			out.Labels[label] = value
		}
	}
	for _, a := range n.Addrs {
		out.Status.Addresses = append(out.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	for _, p := range n.PodCIDRs {
		out.Spec.PodCIDRs = append(out.Spec.PodCIDRs, p.String())
	}
	return out
}

func encodePod(p pod) *corev1.Pod {
	out := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: string(KindPod)},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Name.Namespace, Name: p.Name.Name, UID: types.UID(p.UID), Labels: p.Labels,
			Annotations: map[string]string{},
		},
		Spec:   corev1.PodSpec{ServiceAccountName: p.ServiceAccount, NodeName: p.Node, HostNetwork: p.HostNetwork},
		Status: corev1.PodStatus{Phase: corev1.PodPhase(p.Phase)},
	}
	if p.uidDerived {
		out.UID = ""
	}
	if p.NetNS != "" {
		out.Annotations[dataplane.NetNSAnnotation] = p.NetNS
	}
	if p.StaticHash != "" {
		out.Annotations[staticHashAnnotation] = p.StaticHash
		out.Annotations[corev1.MirrorPodAnnotationKey] = p.StaticHash
	}
	if p.Owner != (dataplane.Owner{Kind: "Pod", Name: p.Name.Name}) {
		controls := true
		out.OwnerReferences = []metav1.OwnerReference{{Kind: p.Owner.Kind, Name: p.Owner.Name, Controller: &controls}}
	}
	if p.Terminating {
		when := metav1.Unix(0, 0) // that it is set is all that is read
		out.DeletionTimestamp = &when
	}
	if p.Ready {
		out.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	for _, a := range p.Addrs {
		out.Status.PodIPs = append(out.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if len(p.ports)+len(p.udpPorts) > 0 {
		var c corev1.Container
		for name, port := range p.ports {
			c.Ports = append(c.Ports, corev1.ContainerPort{Name: name, ContainerPort: int32(port)})
		}
		for name, port := range p.udpPorts {
			c.Ports = append(c.Ports, corev1.ContainerPort{Name: name, ContainerPort: int32(port), Protocol: corev1.ProtocolUDP})
		}
		out.Spec.Containers = []corev1.Container{c}
	}
	if len(p.UDPClear) > 0 {
		if out.Annotations == nil {
			out.Annotations = make(map[string]string)
		}
		out.Annotations[dataplane.UDPClearAnnotation] = encodeClearPorts(p.UDPClear)
	}
	return out
}

func encodeClearPorts(ranges []dataplane.PortRange) string {
	parts := make([]string, len(ranges))
	for i, r := range ranges {
		parts[i] = fmt.Sprintf("%d-%d", r.First, r.Last)
	}
	return strings.Join(parts, ",")
}

func encodeService(s service) *corev1.Service {
	out := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: string(KindService)},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Name.Namespace, Name: s.Name.Name},
		Spec: corev1.ServiceSpec{
			Selector:                 s.Selector,
			PublishNotReadyAddresses: s.PublishNotReady,
			ClusterIPs:               addrStrings(s.Addrs),
			ExternalIPs:              addrStrings(s.external),
		},
	}
	for _, a := range addrStrings(s.balanced) {
		out.Status.LoadBalancer.Ingress = append(out.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
	}
	if s.externalName {
		out.Spec.Type = corev1.ServiceTypeExternalName
	}
	if s.SessionAffinity {
		out.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if s.InternalTraffic != "" {
		policy := corev1.ServiceInternalTrafficPolicy(s.InternalTraffic)
		out.Spec.InternalTrafficPolicy = &policy
	}
	if s.Distribution != "" {
		distribution := string(s.Distribution)
		out.Spec.TrafficDistribution = &distribution
	}
	if s.v4 {
		out.Spec.IPFamilies = append(out.Spec.IPFamilies, corev1.IPv4Protocol)
	}
	if s.v6 {
		out.Spec.IPFamilies = append(out.Spec.IPFamilies, corev1.IPv6Protocol)
	}
	for i, p := range s.Ports {
		out.Spec.Ports = append(out.Spec.Ports, encodePort(p, s.targets[i]))
	}
	for i, p := range s.UDPPorts {
		out.Spec.Ports = append(out.Spec.Ports, encodePort(p, s.udpTargets[i]))
	}
	return out
}

func encodePort(p dataplane.ServicePort, t target) corev1.ServicePort {
	port := corev1.ServicePort{Name: p.Name, Port: int32(p.Port), NodePort: int32(p.NodePort), TargetPort: intstr.FromInt32(int32(t.port))}
	if t.named != "" {
		port.TargetPort = intstr.FromString(t.named)
	}
	if t.udp {
		port.Protocol = corev1.ProtocolUDP
	}
	return port
}

func addrStrings(list []netip.Addr) []string {
	var out []string
	for _, a := range list {
		out = append(out, a.String())
	}
	return out
}

func encodeSlice(name dataplane.Name, s endpointSlice) *discoveryv1.EndpointSlice {
	out := &discoveryv1.EndpointSlice{
		TypeMeta:   metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: string(KindEndpointSlice)},
		ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name},
	}
	if s.service.Name != "" {
		out.Labels = map[string]string{serviceNameLabel: s.service.Name}
	}
	if len(s.endpoints) > 0 {
		for name, port := range s.endpoints[0].Ports { // one map for all
			number := int32(port)
			out.Ports = append(out.Ports, discoveryv1.EndpointPort{Name: &name, Port: &number})
		}
	}
	for i := range s.endpoints {
		e := &s.endpoints[i]
		ep := discoveryv1.Endpoint{
			Addresses:  []string{e.Addr.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &e.Ready, Serving: &e.Serving, Terminating: &e.Terminating},
		}
		if e.Node != "" {
			ep.NodeName = &e.Node
		}
		if e.Zone != "" {
			ep.Zone = &e.Zone
		}
		if e.pod != (dataplane.Name{}) {
			ep.TargetRef = &corev1.ObjectReference{Kind: string(KindPod), Namespace: e.pod.Namespace, Name: e.pod.Name, UID: types.UID(e.uid)}
		}
		out.Endpoints = append(out.Endpoints, ep)
	}
	return out
}
