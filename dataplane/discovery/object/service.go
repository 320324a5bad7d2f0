package object

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/raceway-mesh/raceway/dataplane"
)

// service is a Service whose endpoints and host name are not known yet; Addrs holds its
// cluster IPs alone, and External nothing.
type service struct {
	dataplane.Service
	balanced     []netip.Addr // load balancer ingress, which a controller has written
	external     []netip.Addr // externalIPs, which whoever writes the Service chooses
	externalName bool
	v4, v6       bool     // the IP families of its endpoints
	targets      []target // of Ports
	udpTargets   []target // of UDPPorts
}

// target is where a service port leads on a pod.
type target struct {
	name  string // the service port's
	port  uint16 // 0: by container port
	named string
	udp   bool
}

func (t target) on(p pod) uint16 {
	switch {
	case t.named != "" && t.udp:
		return p.udpPorts[t.named]
	case t.named != "":
		return p.ports[t.named]
	}
	return t.port
}

func (s *service) wants(a netip.Addr) bool {
	return a.Is4() && s.v4 || a.Is6() && s.v6
}

// FromService converts a Service. Its TCP and UDP ports are read.
func FromService(in *corev1.Service) (Object, error) {
	name, err := namespacedName(&in.ObjectMeta)
	if err != nil {
		return Object{}, err
	}
	out := service{
		Service: dataplane.Service{
			Name:            name,
			Selector:        in.Spec.Selector,
			PublishNotReady: in.Spec.PublishNotReadyAddresses,
			SessionAffinity: in.Spec.SessionAffinity == corev1.ServiceAffinityClientIP,
		},
		externalName: in.Spec.Type == corev1.ServiceTypeExternalName,
	}
	if p := in.Spec.InternalTrafficPolicy; p != nil {
		out.InternalTraffic = dataplane.TrafficPolicy(*p)
	}
	if d := in.Spec.TrafficDistribution; d != nil {
		out.Distribution = dataplane.TrafficDistribution(*d)
	}
	if !out.externalName {
		if err := out.readAddrs(in); err != nil {
			return Object{}, err
		}
	}
	if err := out.readPorts(in.Spec.Ports); err != nil {
		return Object{}, err
	}
	out.readFamilies(in.Spec.IPFamilies)
	return Object{Key: Key{Kind: KindService, Name: name}, value: out}, nil
}

func (s *service) readAddrs(in *corev1.Service) error {
	for _, ip := range append([]string{in.Spec.ClusterIP}, in.Spec.ClusterIPs...) {
		if ip == "" || ip == corev1.ClusterIPNone {
			continue
		}
		a, err := parseAddr("spec.clusterIPs", ip)
		if err != nil {
			return err
		}
		s.Addrs = appendAddr(s.Addrs, a)
	}
	for _, ip := range in.Spec.ExternalIPs {
		a, err := parseAddr("spec.externalIPs", ip)
		if err != nil {
			return err
		}
		s.external = appendAddr(s.external, a)
	}
	for _, ingress := range in.Status.LoadBalancer.Ingress {
		// ipMode Proxy asks that traffic go through the load balancer itself.
		if ingress.IP == "" || ingress.IPMode != nil && *ingress.IPMode == corev1.LoadBalancerIPModeProxy {
			continue
		}
		a, err := parseAddr("status.loadBalancer.ingress", ingress.IP)
		if err != nil {
			return err
		}
		s.balanced = appendAddr(s.balanced, a)
	}
	return nil
}

func (s *service) readPorts(ports []corev1.ServicePort) error {
	for i, p := range ports {
		if !isCarried(p.Protocol) {
			continue
		}
		number, err := parsePort(fmt.Sprintf("spec.ports[%d].port", i), p.Port)
		if err != nil {
			return err
		}
		port := dataplane.ServicePort{Name: p.Name, Port: number}
		if p.NodePort != 0 {
			if port.NodePort, err = parsePort(fmt.Sprintf("spec.ports[%d].nodePort", i), p.NodePort); err != nil {
				return err
			}
		}
		t := target{name: p.Name, port: number, udp: isProtocol(p.Protocol, corev1.ProtocolUDP)}
		switch {
		case p.TargetPort.Type == intstr.String && p.TargetPort.StrVal != "":
			t.port, t.named = 0, p.TargetPort.StrVal
		case p.TargetPort.Type == intstr.Int && p.TargetPort.IntVal != 0:
			if t.port, err = parsePort(fmt.Sprintf("spec.ports[%d].targetPort", i), p.TargetPort.IntVal); err != nil {
				return err
			}
		}
		if t.udp {
			s.UDPPorts, s.udpTargets = append(s.UDPPorts, port), append(s.udpTargets, t)
		} else {
			s.Ports, s.targets = append(s.Ports, port), append(s.targets, t)
		}
	}
	return nil
}

// readFamilies falls back to the families of the cluster IPs, and for a headless service
// without any to both.
func (s *service) readFamilies(families []corev1.IPFamily) {
	for _, f := range families {
		s.v4 = s.v4 || f == corev1.IPv4Protocol
		s.v6 = s.v6 || f == corev1.IPv6Protocol
	}
	if s.v4 || s.v6 {
		return
	}
	for _, a := range s.Addrs {
		s.v4 = s.v4 || a.Is4()
		s.v6 = s.v6 || a.Is6()
	}
	if !s.v4 && !s.v6 {
		s.v4, s.v6 = true, true
	}
}

// endpointSlice is an EndpointSlice whose pods are not looked up yet.
type endpointSlice struct {
	service   dataplane.Name
	endpoints []sliceEndpoint
}

type sliceEndpoint struct {
	dataplane.Endpoint
	pod dataplane.Name // zero: not a pod
	uid string         // as the slice has it, "" when it does not say
}

// FromEndpointSlice converts an EndpointSlice. One without a service's label, and one of
// FQDNs, holds no endpoints.
func FromEndpointSlice(in *discoveryv1.EndpointSlice) (Object, error) {
	name, err := namespacedName(&in.ObjectMeta)
	if err != nil {
		return Object{}, err
	}
	out := endpointSlice{service: dataplane.Name{Namespace: name.Namespace, Name: in.Labels[serviceNameLabel]}}
	if in.AddressType != discoveryv1.AddressTypeFQDN {
		ports, err := slicePorts(in.Ports)
		if err != nil {
			return Object{}, err
		}
		for i := range in.Endpoints {
			list, err := sliceEndpoints(&in.Endpoints[i], name.Namespace, ports)
			if err != nil {
				return Object{}, fmt.Errorf("endpoints[%d].%w", i, err)
			}
			out.endpoints = append(out.endpoints, list...)
		}
	}
	return Object{Key: Key{Kind: KindEndpointSlice, Name: name}, value: out}, nil
}

func slicePorts(in []discoveryv1.EndpointPort) (map[string]uint16, error) {
	out := make(map[string]uint16, len(in))
	for i, p := range in {
		if p.Protocol != nil && !isCarried(*p.Protocol) || p.Port == nil {
			continue
		}
		port, err := parsePort(fmt.Sprintf("ports[%d].port", i), *p.Port)
		if err != nil {
			return nil, err
		}
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		out[name] = port
	}
	return out, nil
}

func sliceEndpoints(in *discoveryv1.Endpoint, namespace string, ports map[string]uint16) ([]sliceEndpoint, error) {
	ready := isTrue(in.Conditions.Ready, true)
	ep := sliceEndpoint{Endpoint: dataplane.Endpoint{
		Ready:       ready,
		Serving:     isTrue(in.Conditions.Serving, ready),
		Terminating: isTrue(in.Conditions.Terminating, false),
		Ports:       ports,
	}}
	if in.NodeName != nil {
		ep.Node = intern(*in.NodeName)
	}
	if in.Zone != nil {
		ep.Zone = intern(*in.Zone)
	}
	if ref := in.TargetRef; ref != nil && strings.EqualFold(ref.Kind, string(KindPod)) {
		ep.uid = string(ref.UID)
		if ep.pod = (dataplane.Name{Namespace: intern(ref.Namespace), Name: ref.Name}); ref.Namespace == "" {
			ep.pod.Namespace = namespace
		}
	}
	var out []sliceEndpoint
	for _, s := range in.Addresses {
		a, err := parseAddr("addresses", s)
		if err != nil {
			return nil, err
		}
		ep.Addr = a
		out = append(out, ep)
	}
	return out, nil
}

// isTrue reads a condition; one that is not given means what the API says of it.
func isTrue(condition *bool, otherwise bool) bool {
	if condition == nil {
		return otherwise
	}
	return *condition
}
