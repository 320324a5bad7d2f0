package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/raceway-mesh/raceway/dataplane"
)

// The mesh's configuration, and how it tells the agents to let go of their pods. An agent
// that has nothing left on its node says so on its own pod.
const (
	meshConfig         = "raceway"
	releasedKey        = "released"
	releasedAnnotation = "raceway.dev/released"
)

// releasePoll is how often agents that are on their way are looked at.
const releasePoll = time.Second

// Released is how the agents took it.
type Released struct {
	Done []string // nodes on which nothing is left
	// Off are nodes that are not ready: nobody on them answers, and their CNI plugin lets go
	// when they come back.
	Off []string
	// Silent are nodes that should have answered and did not in time, and why.
	Silent map[string]string
}

// Release tells every agent to release its pods and to leave nothing on its node, and waits
// until all that can answer did or ctx ends. progress is told when their number changes.
func (c *Cluster) Release(ctx context.Context, progress func(done, of int)) (Released, error) {
	patch := map[string]any{"data": map[string]string{releasedKey: "true"}}
	if err := c.patchMeshConfig(ctx, patch); err != nil {
		return Released{}, err
	}
	var state Released
	reported := -1
	err := wait.PollUntilContextCancel(ctx, releasePoll, true, func(ctx context.Context) (bool, error) {
		now, err := c.released(ctx)
		if err != nil {
			return false, fmt.Errorf("look at the agents: %w", err)
		}
		state = now
		if len(state.Done) != reported {
			reported = len(state.Done)
			progress(reported, reported+len(state.Silent))
		}
		return len(state.Silent) == 0, nil
	})
	if ctx.Err() != nil && reported >= 0 {
		return state, nil // Silent says who did not answer
	}
	return state, err
}

func (c *Cluster) patchMeshConfig(ctx context.Context, patch any) error {
	data, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().ConfigMaps(c.Namespace).Patch(ctx, meshConfig, types.MergePatchType, data, metav1.PatchOptions{FieldManager: "raceway"})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("there is no ConfigMap %s/%s: Raceway is not installed there; --system-namespace says where else to look", c.Namespace, meshConfig)
	}
	if err != nil {
		return fmt.Errorf("tell the agents to release their pods: %w", err)
	}
	return nil
}

func (c *Cluster) released(ctx context.Context) (Released, error) {
	ready, err := c.readyNodes(ctx)
	if err != nil {
		return Released{}, err
	}
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return Released{}, err
	}
	state := Released{Silent: make(map[string]string)}
	for i := range pods.Items {
		pod := &pods.Items[i]
		node := pod.Spec.NodeName
		switch {
		case node == "":
		case pod.Annotations[releasedAnnotation] == "true":
			state.Done = append(state.Done, node)
		case !ready[node]:
			state.Off = append(state.Off, node)
		default:
			why := trouble(pod)
			if why == "" {
				why = "its agent has not finished: look at the log of pod " + pod.Name
			}
			state.Silent[node] = why
		}
	}
	for _, node := range state.Done {
		delete(state.Silent, node) // of two that an upgrade runs there, one is enough
	}
	return state, nil
}

// readyNodes are those whose kubelet answers.
func (c *Cluster) readyNodes(ctx context.Context) (map[string]bool, error) {
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	ready := make(map[string]bool)
	for i := range nodes.Items {
		for _, condition := range nodes.Items[i].Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
				ready[nodes.Items[i].Name] = true
			}
		}
	}
	return ready, nil
}

// ForgetCapture takes the mark of a capture off the pods of nodes whose agent did not: no
// agent will.
func (c *Cluster) ForgetCapture(ctx context.Context, nodes []string) error {
	for _, node := range nodes {
		pods, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			return fmt.Errorf("list the pods of node %s: %w", node, err)
		}
		for i := range pods.Items {
			if err := c.forgetCapture(ctx, &pods.Items[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Cluster) forgetCapture(ctx context.Context, pod *corev1.Pod) error {
	if _, marked := pod.Annotations[dataplane.RedirectionAnnotation]; !marked {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{dataplane.RedirectionAnnotation: nil}}})
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "raceway"})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("take annotation %s off pod %s/%s: %w", dataplane.RedirectionAnnotation, pod.Namespace, pod.Name, err)
	}
	return nil
}
