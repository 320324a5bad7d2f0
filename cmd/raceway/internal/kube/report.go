package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// logLines is how much of each container's log a report has, and logBytes the most of it.
const (
	logLines = 20_000
	logBytes = 16 << 20
)

// File is one file of a report.
type File struct {
	Name string
	Data []byte
}

// reportedKinds are the objects of a report. Secrets are not among them.
func reportedKinds() []schema.GroupVersionResource {
	return append([]schema.GroupVersionResource{
		{Version: "v1", Resource: "pods"},
		{Version: "v1", Resource: "configmaps"},
		{Version: "v1", Resource: "services"},
		{Version: "v1", Resource: "events"},
		{Group: "apps", Version: "v1", Resource: "daemonsets"},
		{Group: "apps", Version: "v1", Resource: "deployments"},
	}, policyKinds()...)
}

// Report hands emit what the cluster knows of the installation: the objects in its namespace,
// policies everywhere, nodes, and the logs of its containers. What cannot be had is in the
// error, and the rest is there all the same.
func (c *Cluster) Report(ctx context.Context, emit func(File) error) error {
	var errs []error
	for _, k := range reportedKinds() {
		namespace := c.Namespace
		if k.Group == policyKinds()[0].Group {
			namespace = metav1.NamespaceAll
		}
		errs = append(errs, c.reportObjects(ctx, k, namespace, emit))
	}
	errs = append(errs, c.reportObjects(ctx, schema.GroupVersionResource{Version: "v1", Resource: "nodes"}, metav1.NamespaceAll, emit))
	errs = append(errs, c.reportLogs(ctx, emit))
	return errors.Join(errs...)
}

func (c *Cluster) reportObjects(ctx context.Context, k schema.GroupVersionResource, namespace string, emit func(File) error) error {
	list, err := c.dynamic.Resource(k).Namespace(namespace).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", k.Resource, err)
	}
	for i := range list.Items {
		list.Items[i].SetManagedFields(nil)
	}
	data, err := json.Marshal(list)
	if err == nil {
		data, err = yaml.JSONToYAML(data)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", k.Resource, err)
	}
	return emit(File{"objects/" + k.Resource + ".yaml", data})
}

func (c *Cluster) reportLogs(ctx context.Context, emit func(File) error) error {
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: installedSelector})
	if err != nil {
		return fmt.Errorf("list the pods of namespace %s: %w", c.Namespace, err)
	}
	var errs []error
	for i := range pods.Items {
		pod := &pods.Items[i]
		for _, s := range pod.Status.ContainerStatuses {
			errs = append(errs, c.reportLog(ctx, pod.Name, s.Name, false, emit))
			if s.RestartCount > 0 {
				errs = append(errs, c.reportLog(ctx, pod.Name, s.Name, true, emit))
			}
		}
	}
	return errors.Join(errs...)
}

func (c *Cluster) reportLog(ctx context.Context, pod, container string, previous bool, emit func(File) error) (err error) {
	name := "logs/" + pod + "/" + container + ".log"
	if previous {
		name = "logs/" + pod + "/" + container + ".previous.log"
	}
	lines, bytes := int64(logLines), int64(logBytes)
	stream, err := c.client.CoreV1().Pods(c.Namespace).GetLogs(pod, &corev1.PodLogOptions{
		Container: container, Previous: previous, TailLines: &lines, LimitBytes: &bytes,
	}).Stream(ctx)
	if err != nil {
		return fmt.Errorf("log of %s in pod %s: %w", container, pod, err)
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	data, err := io.ReadAll(stream)
	if err != nil {
		return fmt.Errorf("log of %s in pod %s: %w", container, pod, err)
	}
	return emit(File{name, data})
}
