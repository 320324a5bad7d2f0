package object

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/raceway-mesh/raceway/dataplane"
)

// FromNamespace converts a Namespace.
func FromNamespace(in *corev1.Namespace) (Object, error) {
	name, err := clusterName(&in.ObjectMeta)
	if err != nil {
		return Object{}, err
	}
	return Object{
		Key:   Key{Kind: KindNamespace, Name: name},
		value: dataplane.Namespace{Name: name.Name, Labels: in.Labels},
	}, nil
}

// FromNode converts a Node.
func FromNode(in *corev1.Node) (Object, error) {
	name, err := clusterName(&in.ObjectMeta)
	if err != nil {
		return Object{}, err
	}
	out := dataplane.Node{
		Name:   name.Name,
		Region: in.Labels[corev1.LabelTopologyRegion],
		Zone:   in.Labels[corev1.LabelTopologyZone],
	}
	for _, addr := range in.Status.Addresses {
		if addr.Type != corev1.NodeInternalIP && addr.Type != corev1.NodeExternalIP {
			continue
		}
		a, err := parseAddr("status.addresses", addr.Address)
		if err != nil {
			return Object{}, err
		}
		out.Addrs = appendAddr(out.Addrs, a)
	}
	cidrs := in.Spec.PodCIDRs
	if len(cidrs) == 0 && in.Spec.PodCIDR != "" {
		cidrs = []string{in.Spec.PodCIDR}
	}
	for _, cidr := range cidrs {
		p, err := parsePrefix("spec.podCIDRs", cidr)
		if err != nil {
			return Object{}, err
		}
		out.PodCIDRs = append(out.PodCIDRs, p)
	}
	return Object{Key: Key{Kind: KindNode, Name: name}, value: out}, nil
}
