package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Bench says how two nodes are measured: by a client's and a server's pod that are in the mesh,
// and two that are not, each of a Job.
type Bench struct {
	// Namespace of the Jobs. One of the name DefaultBenchNamespace is made and removed, another
	// has to be there.
	Namespace              string
	ClientNode, ServerNode string
	Image                  string
	// Deadline ends the Jobs, whatever becomes of who made them. They leave nothing for long.
	Deadline time.Duration
}

// DefaultBenchNamespace is that of Jobs that are told no other.
const DefaultBenchNamespace = "raceway-perf"

// benchWorker is what a benchmark's pods run, and what is run in them, with these arguments.
func benchWorker(args ...string) []string {
	return append([]string{"/usr/local/bin/raceway", "perf", "worker", "--"}, args...)
}

const (
	benchLabel     = "raceway.dev/perf" // on its pods, its Jobs and its namespace
	benchContainer = "worker"
	benchPoll      = 500 * time.Millisecond
	// benchTTL is how long Jobs stay that have ended without whoever made them.
	benchTTL = 60
)

// BenchRole is one of a benchmark's four pods.
type BenchRole struct {
	Mesh   bool
	Server bool
}

// benchRoles has the servers first.
func benchRoles() []BenchRole {
	return []BenchRole{{false, true}, {true, true}, {false, false}, {true, false}}
}

func (r BenchRole) String() string {
	name := "plain"
	if r.Mesh {
		name = "mesh"
	}
	if r.Server {
		return name + "-server"
	}
	return name + "-client"
}

// Objects are what the benchmark makes, in this order.
func (b Bench) Objects() []runtime.Object {
	var all []runtime.Object
	if b.ownNamespace() {
		all = append(all, b.namespace())
	}
	for _, r := range benchRoles() {
		all = append(all, b.job(r))
	}
	return all
}

func (b Bench) ownNamespace() bool { return b.Namespace == DefaultBenchNamespace }

func (b Bench) namespace() *corev1.Namespace {
	return &corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: b.Namespace, Labels: map[string]string{
			benchLabel: "true", "pod-security.kubernetes.io/enforce": "restricted",
		}},
	}
}

// job is of a pod that serves, and in which a client's load is run as well.
func (b Bench) job(r BenchRole) *batchv1.Job {
	node, mode := b.ClientNode, dataplane.ModeNone
	if r.Server {
		node = b.ServerNode
	}
	if r.Mesh {
		mode = dataplane.ModeAmbient
	}
	meta := metav1.ObjectMeta{Name: "raceway-perf-" + r.String(), Namespace: b.Namespace, Labels: map[string]string{benchLabel: r.String()}}
	pod := metav1.ObjectMeta{Labels: map[string]string{benchLabel: r.String(), dataplane.ModeLabel: mode}}
	return &batchv1.Job{
		TypeMeta:   metav1.TypeMeta{APIVersion: "batch/v1", Kind: "Job"},
		ObjectMeta: meta,
		Spec: batchv1.JobSpec{
			BackoffLimit:            new(int32), // no other pod in its place: its figures would be another's
			ActiveDeadlineSeconds:   pointer(int64(b.Deadline.Seconds())),
			TTLSecondsAfterFinished: pointer(int32(benchTTL)),
			Template:                corev1.PodTemplateSpec{ObjectMeta: pod, Spec: b.podSpec(node)},
		},
	}
}

func (b Bench) podSpec(node string) corev1.PodSpec {
	return corev1.PodSpec{
		RestartPolicy:                 corev1.RestartPolicyNever,
		AutomountServiceAccountToken:  pointer(false),
		TerminationGracePeriodSeconds: pointer(int64(1)),
		Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{node}}},
			}}},
		}},
		Containers: []corev1.Container{{
			Name: benchContainer, Image: b.Image, ImagePullPolicy: corev1.PullIfNotPresent,
			Command: benchWorker("serve"),
			SecurityContext: &corev1.SecurityContext{
				RunAsNonRoot: pointer(true), RunAsUser: pointer(int64(65532)), RunAsGroup: pointer(int64(65532)),
				AllowPrivilegeEscalation: pointer(false), ReadOnlyRootFilesystem: pointer(true),
				Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
		}},
	}
}

func pointer[T any](v T) *T { return &v }

// BenchImage is the image of the agent of a node, whose programs the benchmark is.
func (c *Cluster) BenchImage(ctx context.Context, node string) (string, error) {
	agents, err := c.Agents(ctx)
	if err != nil {
		return "", err
	}
	for _, a := range agents {
		if a.Node != node {
			continue
		}
		pod, err := c.client.CoreV1().Pods(c.Namespace).Get(ctx, a.Pod, metav1.GetOptions{})
		if err != nil {
			return "", fmt.Errorf("look at the agent of node %s: %w", node, err)
		}
		for _, container := range pod.Spec.Containers {
			if container.Name == agentContainer {
				return container.Image, nil
			}
		}
	}
	return "", fmt.Errorf("node %s has no agent of Raceway", node)
}

// RunningBench is a benchmark whose pods run. Close must be called.
type RunningBench struct {
	cluster *Cluster
	bench   Bench
	pods    map[BenchRole]*corev1.Pod
	undo    []func(context.Context) error // what deletes what was made
}

// StartBench makes the benchmark's Jobs and waits until their pods run, those in the mesh
// captured, or ctx ends. It leaves nothing when it fails.
func (c *Cluster) StartBench(ctx context.Context, b Bench) (_ *RunningBench, err error) {
	r := &RunningBench{cluster: c, bench: b, pods: make(map[BenchRole]*corev1.Pod)}
	if b.ownNamespace() {
		if _, err := c.client.CoreV1().Namespaces().Create(ctx, b.namespace(), metav1.CreateOptions{}); err != nil {
			return nil, inTheWay(fmt.Errorf("make namespace %s: %w", b.Namespace, err))
		}
		r.undo = append(r.undo, func(ctx context.Context) error {
			return gone("namespace "+b.Namespace, c.client.CoreV1().Namespaces().Delete(ctx, b.Namespace, background()))
		})
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close(context.WithoutCancel(ctx)))
		}
	}()
	for _, role := range benchRoles() {
		job := b.job(role)
		if _, err := c.client.BatchV1().Jobs(b.Namespace).Create(ctx, job, metav1.CreateOptions{}); err != nil {
			return nil, inTheWay(fmt.Errorf("make Job %s/%s: %w", b.Namespace, job.Name, err))
		}
		r.undo = append(r.undo, func(ctx context.Context) error {
			return gone("Job "+b.Namespace+"/"+job.Name, c.client.BatchV1().Jobs(b.Namespace).Delete(ctx, job.Name, background()))
		})
	}
	for _, role := range benchRoles() {
		if err := r.await(ctx, role); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// inTheWay explains what is left of, or belongs to, another run.
func inTheWay(err error) error {
	if apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("%w: another run is under way, or was killed: delete it first", err)
	}
	return err
}

func (r *RunningBench) await(ctx context.Context, role BenchRole) error {
	missing := errors.New("it has no pod yet")
	err := wait.PollUntilContextCancel(ctx, benchPoll, true, func(ctx context.Context) (bool, error) {
		pods, err := r.cluster.client.CoreV1().Pods(r.bench.Namespace).List(ctx, metav1.ListOptions{LabelSelector: benchLabel + "=" + role.String()})
		if err != nil {
			return false, fmt.Errorf("look for the pod of Job raceway-perf-%s: %w", role, err)
		}
		for i := range pods.Items {
			pod := &pods.Items[i]
			if missing = benchTrouble(pod, role); missing == nil {
				r.pods[role] = pod
				return true, nil
			}
			if pod.Status.Phase == corev1.PodFailed {
				return false, missing
			}
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("wait for Job %s/raceway-perf-%s: %w: %w", r.bench.Namespace, role, missing, err)
	}
	return nil
}

// benchTrouble is why nothing can be measured in the pod yet.
func benchTrouble(pod *corev1.Pod, role BenchRole) error {
	for _, s := range pod.Status.ContainerStatuses {
		switch {
		case s.State.Waiting != nil:
			return errors.New(reason(s.State.Waiting.Reason, s.State.Waiting.Message))
		case s.State.Terminated != nil:
			return errors.New(reason(s.State.Terminated.Reason, s.State.Terminated.Message))
		}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodScheduled && condition.Status == corev1.ConditionFalse {
			return errors.New(reason(condition.Reason, condition.Message))
		}
	}
	captured := pod.Annotations[dataplane.RedirectionAnnotation] == dataplane.RedirectionEnabled
	switch {
	case pod.Status.Phase != corev1.PodRunning || pod.Status.PodIP == "":
		return fmt.Errorf("its pod is %s", pod.Status.Phase)
	case role.Mesh && !captured:
		return errors.New("its pod is not captured: does the agent of its node run?")
	case !role.Mesh && captured:
		return errors.New("its pod is captured though it is labelled out of the mesh")
	}
	return nil
}

// Addr is the address of a role's pod.
func (r *RunningBench) Addr(role BenchRole) (netip.Addr, error) {
	addr, err := netip.ParseAddr(r.pods[role].Status.PodIP)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("address of pod %s: %w", r.pods[role].Name, err)
	}
	return addr, nil
}

// Work runs the benchmark's worker in a role's pod.
func (r *RunningBench) Work(ctx context.Context, role BenchRole, args ...string) (net.Conn, error) {
	return r.cluster.exec(ctx, container{r.bench.Namespace, r.pods[role].Name, benchContainer}, benchWorker(args...)...)
}

// Close deletes what StartBench made, pods included. It may be called again.
func (r *RunningBench) Close(ctx context.Context) error {
	var errs []error
	for _, undo := range slices.Backward(r.undo) {
		errs = append(errs, undo(ctx))
	}
	r.undo = nil
	return errors.Join(errs...)
}

// background has a Job's pods go with it.
func background() metav1.DeleteOptions {
	return metav1.DeleteOptions{PropagationPolicy: pointer(metav1.DeletePropagationBackground)}
}

// gone is the error of a deletion, which may come late.
func gone(what string, err error) error {
	if err == nil || apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("delete %s: %w", what, err)
}
