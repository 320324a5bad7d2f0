package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// Preview says of each pod of a namespace whether it would be captured if the namespace had
// the label, and which NetworkPolicy would be in the way of its tunnels.
func (c *Cluster) Preview(ctx context.Context, namespace string) ([]admin.Finding, error) {
	if _, err := c.client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{}); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, &admin.Error{Status: 404, Message: fmt.Sprintf("there is no namespace %q", namespace)}
		}
		return nil, fmt.Errorf("read namespace %s: %w", namespace, err)
	}
	pods, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the pods of namespace %s: %w", namespace, err)
	}
	policies, err := c.client.NetworkingV1().NetworkPolicies(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the NetworkPolicies of namespace %s: %w", namespace, err)
	}
	var findings []admin.Finding
	for i := range pods.Items {
		pod := &pods.Items[i]
		subject := pod.Namespace + "/" + pod.Name
		if why := notCaptured(pod); why != "" {
			findings = append(findings, admin.Finding{Subject: subject, Check: "would be captured", OK: true, Detail: "no: " + why})
			continue
		}
		findings = append(findings, admin.Finding{Subject: subject, Check: "would be captured", OK: true, Detail: "yes"})
		for _, f := range blockers(pod, policies.Items) {
			f.Subject = subject
			findings = append(findings, f)
		}
	}
	return findings, nil
}

// notCaptured says why a pod would be left alone, "" when it would not.
func notCaptured(pod *corev1.Pod) string {
	mode, labelled := pod.Labels[dataplane.ModeLabel]
	switch {
	case pod.Spec.HostNetwork:
		return "it is in the network of its node (hostNetwork)"
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return "it has finished"
	case labelled && mode != dataplane.ModeAmbient:
		return "its label " + dataplane.ModeLabel + "=" + mode + " opts out"
	}
	return ""
}

// blockers are the NetworkPolicies that keep tunnels from a pod, or a pod from tunnels. A pod
// that policies select gets what any of them allows.
func blockers(pod *corev1.Pod, policies []networkingv1.NetworkPolicy) []admin.Finding {
	var findings []admin.Finding
	for _, d := range []struct {
		direction networkingv1.PolicyType
		what      string
		allows    func(*networkingv1.NetworkPolicySpec) bool
	}{
		{networkingv1.PolicyTypeIngress, "tunnels to it", allowsTunnelsIn},
		{networkingv1.PolicyTypeEgress, "its tunnels to others", allowsTunnelsOut},
	} {
		var selecting []string
		allowed := false
		for i := range policies {
			spec := &policies[i].Spec
			if !selects(spec, pod) || !slices.Contains(directions(spec), d.direction) {
				continue
			}
			selecting = append(selecting, policies[i].Name)
			allowed = allowed || d.allows(spec)
		}
		if len(selecting) > 0 && !allowed {
			findings = append(findings, admin.Finding{
				Check: "NetworkPolicy", Detail: fmt.Sprintf("%s would be blocked by %s: allow %s of TCP port %d",
					d.what, strings.Join(selecting, ", "), strings.ToLower(string(d.direction)), dataplane.PortTunnel),
			})
		}
	}
	return findings
}

func selects(spec *networkingv1.NetworkPolicySpec, pod *corev1.Pod) bool {
	selector, err := metav1.LabelSelectorAsSelector(&spec.PodSelector)
	return err == nil && selector.Matches(labels.Set(pod.Labels))
}

// directions are those that a policy restricts, defaulted as the API server does.
func directions(spec *networkingv1.NetworkPolicySpec) []networkingv1.PolicyType {
	if len(spec.PolicyTypes) > 0 {
		return spec.PolicyTypes
	}
	if len(spec.Egress) > 0 {
		return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	}
	return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
}

func allowsTunnelsIn(spec *networkingv1.NetworkPolicySpec) bool {
	return slices.ContainsFunc(spec.Ingress, func(r networkingv1.NetworkPolicyIngressRule) bool { return hasTunnelPort(r.Ports) })
}

func allowsTunnelsOut(spec *networkingv1.NetworkPolicySpec) bool {
	return slices.ContainsFunc(spec.Egress, func(r networkingv1.NetworkPolicyEgressRule) bool { return hasTunnelPort(r.Ports) })
}

// hasTunnelPort reports whether ports, of which none means all, include that of tunnels. A
// name is one of the application's ports.
func hasTunnelPort(ports []networkingv1.NetworkPolicyPort) bool {
	if len(ports) == 0 {
		return true
	}
	return slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		switch {
		case p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP:
			return false
		case p.Port == nil:
			return true
		case p.EndPort != nil:
			return p.Port.IntVal <= dataplane.PortTunnel && dataplane.PortTunnel <= *p.EndPort
		}
		return p.Port.IntVal == dataplane.PortTunnel
	})
}
