package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
)

// installedSelector selects what an installation is made of.
const installedSelector = "app.kubernetes.io/part-of=raceway"

// kind is a kind of object that the chart makes.
type kind struct {
	schema.GroupVersionResource
	namespaced bool
}

// installedKinds are in the order in which they go: first those that run, then what they need.
func installedKinds() []kind {
	namespaced := func(group, resource string) kind {
		return kind{schema.GroupVersionResource{Group: group, Version: "v1", Resource: resource}, true}
	}
	clusterWide := func(group, resource string) kind {
		return kind{schema.GroupVersionResource{Group: group, Version: "v1", Resource: resource}, false}
	}
	return []kind{
		namespaced("apps", "daemonsets"),
		namespaced("apps", "deployments"),
		namespaced("batch", "jobs"),
		namespaced("policy", "poddisruptionbudgets"),
		namespaced("monitoring.coreos.com", "podmonitors"),
		namespaced("monitoring.coreos.com", "prometheusrules"),
		namespaced("networking.k8s.io", "networkpolicies"),
		namespaced("", "services"),
		clusterWide("admissionregistration.k8s.io", "validatingadmissionpolicybindings"),
		clusterWide("admissionregistration.k8s.io", "validatingadmissionpolicies"),
		clusterWide("rbac.authorization.k8s.io", "clusterrolebindings"),
		clusterWide("rbac.authorization.k8s.io", "clusterroles"),
		namespaced("rbac.authorization.k8s.io", "rolebindings"),
		namespaced("rbac.authorization.k8s.io", "roles"),
		namespaced("", "serviceaccounts"),
		namespaced("", "configmaps"),
		namespaced("coordination.k8s.io", "leases"),
	}
}

// Remove deletes what the installation consists of, once the agents have released their pods;
// the namespace and the CRDs stay, and so do the policies. It returns what it deleted.
func (c *Cluster) Remove(ctx context.Context) (deleted []string, err error) {
	var errs []error
	for _, k := range installedKinds() {
		names, err := c.removeKind(ctx, k, installedSelector)
		deleted = append(deleted, names...)
		errs = append(errs, err)
		if k.Resource == "daemonsets" {
			errs = append(errs, c.waitForAgentsToEnd(ctx))
		}
	}
	secrets := kind{schema.GroupVersionResource{Version: "v1", Resource: "secrets"}, true}
	for _, selector := range []string{
		installedSelector + ",app.kubernetes.io/component!=ca", // its key outlives the installation
		"owner=helm,name=raceway",                              // Helm's record of the release, when Helm installed it
	} {
		names, err := c.removeKind(ctx, secrets, selector)
		deleted = append(deleted, names...)
		errs = append(errs, err)
	}
	return deleted, errors.Join(errs...)
}

func (c *Cluster) removeKind(ctx context.Context, k kind, selector string) (deleted []string, err error) {
	resources := c.dynamic.Resource(k.GroupVersionResource)
	namespace := ""
	if k.namespaced {
		namespace = c.Namespace
	}
	list, err := resources.Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if apierrors.IsNotFound(err) { // the cluster has no such kind
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", k.Resource, err)
	}
	var errs []error
	for i := range list.Items {
		name := list.Items[i].GetName()
		foreground := metav1.DeletePropagationForeground
		err := resources.Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &foreground})
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete %s %s: %w", k.Resource, name, err))
			continue
		}
		deleted = append(deleted, k.Resource+"/"+name)
	}
	return deleted, errors.Join(errs...)
}

// agentsEnd is longer than the time that an agent's pod may take to end.
const agentsEnd = 2 * time.Minute

// waitForAgentsToEnd returns when no agent runs on a node that is there: their rights go next.
func (c *Cluster) waitForAgentsToEnd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, agentsEnd)
	defer cancel()
	err := wait.PollUntilContextCancel(ctx, releasePoll, true, func(ctx context.Context) (bool, error) {
		state, err := c.released(ctx)
		return err == nil && len(state.Done)+len(state.Silent) == 0, err
	})
	if err != nil {
		return fmt.Errorf("wait for the agents to end: %w", err)
	}
	return nil
}
