package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// agentSelector selects the agents' pods, and agentContainer is theirs that has the programs.
const (
	agentSelector  = "app.kubernetes.io/part-of=raceway,app.kubernetes.io/component=agent"
	agentContainer = "agent"
)

// Agent is the agent of one node.
type Agent struct {
	Node string
	Pod  string
	// Trouble says why it cannot be asked, "" when it can.
	Trouble string
}

// Agents lists the agent of each node that has one, by node. Of two that an upgrade runs side
// by side it is the newer, once that is ready.
func (c *Cluster) Agents(ctx context.Context) ([]Agent, error) {
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return nil, fmt.Errorf("look for agents in namespace %s: %w", c.Namespace, err)
	}
	best := make(map[string]*corev1.Pod)
	for i := range pods.Items {
		pod := &pods.Items[i]
		if node := pod.Spec.NodeName; node != "" && (best[node] == nil || betterAgent(pod, best[node])) {
			best[node] = pod
		}
	}
	agents := make([]Agent, 0, len(best))
	for node, pod := range best {
		agents = append(agents, Agent{Node: node, Pod: pod.Name, Trouble: trouble(pod)})
	}
	slices.SortFunc(agents, func(a, b Agent) int { return cmp.Compare(a.Node, b.Node) })
	if len(agents) == 0 {
		return nil, fmt.Errorf("namespace %s has no pod of an agent: is Raceway installed there? --system-namespace says where else to look", c.Namespace)
	}
	return agents, nil
}

// MayAsk returns an error if this user may not run a command in the agents' pods, which each
// of them would say otherwise.
func (c *Cluster) MayAsk(ctx context.Context) error {
	review, err := c.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: c.Namespace, Verb: "create", Resource: "pods", Subresource: "exec",
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("ask whether you may ask the agents: %w", err)
	}
	if !review.Status.Allowed {
		return fmt.Errorf("you may not create pods/exec in namespace %s, and so ask no agent: have somebody bind you to a Role that allows it", c.Namespace)
	}
	return nil
}

func betterAgent(a, b *corev1.Pod) bool {
	if isReady := ready(a); isReady != ready(b) {
		return isReady // one that crashes runs as well, for a moment
	}
	if runs := trouble(a) == ""; runs != (trouble(b) == "") {
		return runs
	}
	if going := a.DeletionTimestamp != nil; going != (b.DeletionTimestamp != nil) {
		return !going
	}
	return a.CreationTimestamp.After(b.CreationTimestamp.Time)
}

// trouble says why a pod's agent cannot be asked.
func trouble(pod *corev1.Pod) string {
	for _, s := range pod.Status.ContainerStatuses {
		switch {
		case s.Name != agentContainer || s.State.Running != nil:
		case s.State.Waiting != nil:
			return reason(s.State.Waiting.Reason, s.State.Waiting.Message)
		case s.State.Terminated != nil:
			return reason(s.State.Terminated.Reason, s.State.Terminated.Message)
		}
	}
	if pod.Status.Phase == corev1.PodRunning {
		return ""
	}
	return reason(string(pod.Status.Phase), pod.Status.Message)
}

func reason(word, text string) string {
	if text == "" {
		return word
	}
	return word + ": " + text
}
