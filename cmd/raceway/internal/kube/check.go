package kube

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/version"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// What an installation needs. ValidatingAdmissionPolicy is generally available since
// Kubernetes 1.30, which also names the node in a pod's token; SO_NETNS_COOKIE is in Linux
// since 5.14.
const (
	minKubernetes = "1.30"
	minKernel     = "5.14"
)

const clusterSubject = "cluster"

// Check says what the cluster will and will not allow, before an installation and after it.
func (c *Cluster) Check(ctx context.Context) ([]admin.Finding, error) {
	running, err := c.client.Discovery().ServerVersion()
	if err != nil {
		return nil, fmt.Errorf("ask the API server: %w", err)
	}
	findings := []admin.Finding{atLeast(clusterSubject, "Kubernetes", running.GitVersion, minKubernetes)}
	for _, look := range []func(context.Context) ([]admin.Finding, error){
		c.checkNodes, c.checkPolicyKinds, c.checkCNI, c.checkInstallation, c.checkNetworkPolicies,
	} {
		found, err := look(ctx)
		if err != nil {
			return findings, err
		}
		findings = append(findings, found...)
	}
	return findings, nil
}

func atLeast(subject, what, have, want string) admin.Finding {
	f := admin.Finding{Subject: subject, Check: what + " " + have, OK: true}
	v, err := version.ParseGeneric(have)
	if err != nil {
		f.OK, f.Detail = false, fmt.Sprintf("%q is not a version", have)
	} else if v.LessThan(version.MustParseGeneric(want)) {
		f.OK, f.Detail = false, fmt.Sprintf("%s %s or newer is needed", what, want)
	}
	return f
}

func (c *Cluster) checkNodes(ctx context.Context) ([]admin.Finding, error) {
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	var findings []admin.Finding
	for i := range nodes.Items {
		node := &nodes.Items[i]
		if os := node.Status.NodeInfo.OperatingSystem; os != "linux" {
			findings = append(findings, admin.Finding{Subject: "node " + node.Name, Check: "operating system", OK: true, Detail: os + ": its pods are left alone"})
			continue
		}
		findings = append(findings, atLeast("node "+node.Name, "kernel", node.Status.NodeInfo.KernelVersion, minKernel))
	}
	return findings, nil
}

// policyKinds are the kinds that policies are written as.
func policyKinds() []schema.GroupVersionResource {
	return []schema.GroupVersionResource{
		{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"},
		{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"},
	}
}

func (c *Cluster) checkPolicyKinds(ctx context.Context) ([]admin.Finding, error) {
	var findings []admin.Finding
	for _, k := range policyKinds() {
		f := admin.Finding{Subject: clusterSubject, Check: k.Resource, OK: true}
		switch _, err := c.dynamic.Resource(k).List(ctx, metav1.ListOptions{Limit: 1}); {
		case apierrors.IsNotFound(err):
			f.Detail = "the cluster has no such kind, so no such policy: the chart of the CRDs adds it"
		case err != nil:
			return nil, fmt.Errorf("list %s: %w", k.Resource, err)
		}
		findings = append(findings, f)
	}
	return findings, nil
}

// checkCNI looks for CNIs that do not take another plugin beside theirs.
func (c *Cluster) checkCNI(ctx context.Context) ([]admin.Finding, error) {
	const namespace, name, key = "kube-system", "cilium-config", "cni-exclusive"
	config, err := c.client.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", namespace, name, err)
	}
	f := admin.Finding{Subject: clusterSubject, Check: "CNI cilium", OK: true}
	if config.Data[key] != "false" {
		f.OK, f.Detail = false, "Cilium takes other plugins out of its CNI configuration: set its Helm value cni.exclusive=false"
	}
	return []admin.Finding{f}, nil
}

// checkNetworkPolicies looks for those that keep tunnels from pods that are captured.
func (c *Cluster) checkNetworkPolicies(ctx context.Context) ([]admin.Finding, error) {
	all, err := c.client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list NetworkPolicies: %w", err)
	}
	policies := make(map[string][]networkingv1.NetworkPolicy)
	for _, p := range all.Items {
		policies[p.Namespace] = append(policies[p.Namespace], p)
	}
	var findings []admin.Finding
	for _, namespace := range slices.Sorted(maps.Keys(policies)) {
		pods, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("list the pods of namespace %s: %w", namespace, err)
		}
		for i := range pods.Items {
			pod := &pods.Items[i]
			if pod.Annotations[dataplane.RedirectionAnnotation] != dataplane.RedirectionEnabled {
				continue
			}
			for _, f := range blockers(pod, policies[namespace]) {
				f.Subject = namespace + "/" + pod.Name
				findings = append(findings, f)
			}
		}
	}
	return findings, nil
}

// Installed reports whether the cluster has agents at all.
func (c *Cluster) Installed(ctx context.Context) (bool, error) {
	sets, err := c.client.AppsV1().DaemonSets(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	return err == nil && len(sets.Items) > 0, err
}

func (c *Cluster) checkInstallation(ctx context.Context) ([]admin.Finding, error) {
	set, err := c.client.AppsV1().DaemonSets(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return nil, fmt.Errorf("list the DaemonSets of namespace %s: %w", c.Namespace, err)
	}
	if len(set.Items) == 0 {
		return []admin.Finding{{Subject: clusterSubject, Check: "installation", OK: true, Detail: "Raceway is not installed in namespace " + c.Namespace}}, nil
	}
	status := set.Items[0].Status
	f := admin.Finding{Subject: clusterSubject, Check: fmt.Sprintf("agents: %d of %d ready", status.NumberReady, status.DesiredNumberScheduled), OK: true}
	if status.NumberReady < status.DesiredNumberScheduled {
		f.OK, f.Detail = false, c.unready(ctx)
	}
	findings := []admin.Finding{f}
	if f.OK && status.UpdatedNumberScheduled < status.DesiredNumberScheduled {
		findings = append(findings, c.checkRollout(ctx, status))
	}
	authorities, err := c.client.AppsV1().Deployments(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=raceway,app.kubernetes.io/component=ca"})
	if err != nil {
		return nil, fmt.Errorf("list the Deployments of namespace %s: %w", c.Namespace, err)
	}
	for i := range authorities.Items {
		d := &authorities.Items[i]
		f := admin.Finding{Subject: clusterSubject, Check: fmt.Sprintf("CA: %d of %d ready", d.Status.ReadyReplicas, d.Status.Replicas), OK: d.Status.ReadyReplicas > 0}
		if !f.OK {
			f.Detail = "no certificate is signed or renewed: look at the pods of Deployment " + d.Name
		}
		findings = append(findings, f)
	}
	return findings, nil
}

// checkRollout looks at the agents that are to come in the place of those that run.
func (c *Cluster) checkRollout(ctx context.Context, status appsv1.DaemonSetStatus) admin.Finding {
	f := admin.Finding{
		Subject: clusterSubject, OK: true, Detail: "it is under way",
		Check: fmt.Sprintf("rollout: %d of %d agents are new", status.UpdatedNumberScheduled, status.DesiredNumberScheduled),
	}
	if list := c.unready(ctx); strings.Contains(list, "BackOff") || strings.Contains(list, "Error") {
		f.OK, f.Detail = false, "the new agents do not start, and the earlier ones go on: "+list
	}
	return f
}

// unready names the agents that are not ready.
func (c *Cluster) unready(ctx context.Context) string {
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return err.Error()
	}
	var list []string
	for i := range pods.Items {
		pod := &pods.Items[i]
		if ready(pod) {
			continue
		}
		why := trouble(pod)
		if why == "" {
			why = "runs, and is not ready"
		}
		list = append(list, fmt.Sprintf("node %s: pod %s: %s", pod.Spec.NodeName, pod.Name, why))
	}
	return strings.Join(list, "; ")
}

func ready(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
