package kube

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/raceway-mesh/raceway/dataplane"
)

var testBench = Bench{Namespace: DefaultBenchNamespace, ClientNode: "n1", ServerNode: "n2", Image: "raceway:1", Deadline: time.Hour}

// benchPods are those that the cluster would make for the Jobs.
func benchPods(change ...func(BenchRole, *corev1.Pod)) (pods []runtime.Object) {
	for _, r := range benchRoles() {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Name: "pod-" + r.String(), Namespace: DefaultBenchNamespace, Labels: map[string]string{benchLabel: r.String()},
		}}
		pod.Status.Phase, pod.Status.PodIP = corev1.PodRunning, "fd00::1"
		if r.Mesh {
			pod.Annotations = map[string]string{dataplane.RedirectionAnnotation: dataplane.RedirectionEnabled}
		}
		for _, do := range change {
			do(r, pod)
		}
		pods = append(pods, pod)
	}
	return pods
}

// made are the benchmark's Jobs and namespace that there are.
func (c *Cluster) made(t *testing.T) (names []string) {
	t.Helper()
	jobs, err := c.client.BatchV1().Jobs("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range jobs.Items {
		names = append(names, j.Name)
	}
	namespaces, err := c.client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{LabelSelector: benchLabel})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range namespaces.Items {
		names = append(names, n.Name)
	}
	return names
}

func TestBenchComesAndGoes(t *testing.T) {
	c := cluster(t, benchPods()...)
	b, err := c.StartBench(t.Context(), testBench)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"raceway-perf-mesh-client", "raceway-perf-mesh-server", "raceway-perf-plain-client", "raceway-perf-plain-server", "raceway-perf"}
	if got := c.made(t); !slices.Equal(got, want) {
		t.Errorf("it made %q, want %q", got, want)
	}
	if addr, err := b.Addr(BenchRole{Mesh: true, Server: true}); err != nil || addr.String() != "fd00::1" {
		t.Errorf("the server is at %v, %v", addr, err)
	}
	for range 2 {
		if err := b.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if left := c.made(t); len(left) > 0 {
		t.Errorf("it leaves %q", left)
	}
}

func TestBenchSaysWhatItWaitsForAndLeavesNothing(t *testing.T) {
	for name, test := range map[string]struct {
		change func(BenchRole, *corev1.Pod)
		says   string
	}{
		"image": {func(r BenchRole, p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "raceway:1 is nowhere"}}}}
		}, "ImagePullBackOff: raceway:1 is nowhere"},
		"node": {func(r BenchRole, p *corev1.Pod) {
			p.Status.Phase = corev1.PodPending
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "no such node"}}
		}, "Unschedulable: no such node"},
		"agent":      {func(_ BenchRole, p *corev1.Pod) { p.Annotations = nil }, "not captured"},
		"in anyway":  {func(r BenchRole, p *corev1.Pod) { p.Annotations = benchPods()[1].(*corev1.Pod).Annotations }, "captured though"},
		"pod failed": {func(_ BenchRole, p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, "its pod is Failed"},
	} {
		t.Run(name, func(t *testing.T) {
			c := cluster(t, benchPods(test.change)...)
			ctx, cancel := context.WithTimeout(t.Context(), 2*benchPoll)
			defer cancel()
			if _, err := c.StartBench(ctx, testBench); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v, want %q", err, test.says)
			}
			if left := c.made(t); len(left) > 0 {
				t.Errorf("it leaves %q", left)
			}
		})
	}
}

func TestBenchLeavesAnotherRunAlone(t *testing.T) {
	other := testBench.job(BenchRole{Mesh: true})
	c := cluster(t, append(benchPods(), other)...)
	if _, err := c.StartBench(t.Context(), testBench); err == nil || !strings.Contains(err.Error(), "another run") {
		t.Errorf("%v, want that another run is under way", err)
	}
	if left := c.made(t); !slices.Equal(left, []string{other.Name}) {
		t.Errorf("there is %q, want the other's %q", left, other.Name)
	}
}

func TestBenchPodsAreOfNoPrivilegeAndOnTheirNodes(t *testing.T) {
	own := testBench
	own.Namespace = "mine"
	if objects := own.Objects(); len(objects) != 4 {
		t.Errorf("%d objects in a namespace that is there, want four Jobs", len(objects))
	}
	for _, r := range benchRoles() {
		job := testBench.job(r)
		spec, node, mode := job.Spec.Template.Spec, "n1", "none"
		if r.Server {
			node = "n2"
		}
		if r.Mesh {
			mode = "ambient"
		}
		if got := spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchFields[0].Values; !slices.Equal(got, []string{node}) {
			t.Errorf("%s: on %q, want %s", r, got, node)
		}
		if got := job.Spec.Template.Labels[dataplane.ModeLabel]; got != mode {
			t.Errorf("%s: mode %q, want %q", r, got, mode)
		}
		if sc := spec.Containers[0].SecurityContext; !*sc.RunAsNonRoot || *sc.AllowPrivilegeEscalation || *spec.AutomountServiceAccountToken {
			t.Errorf("%s: more privilege than it needs: %+v", r, sc)
		}
		if *job.Spec.BackoffLimit != 0 || *job.Spec.ActiveDeadlineSeconds != 3600 {
			t.Errorf("%s: another pod may take its place, or it may run for longer than an hour: %+v", r, job.Spec)
		}
	}
}

func TestBenchImageIsTheAgents(t *testing.T) {
	c := cluster(t, agentPod("a", "n1", func(p *corev1.Pod) {
		p.Spec.Containers = []corev1.Container{{Name: "other", Image: "x"}, {Name: agentContainer, Image: "raceway:1"}}
	}))
	if got, err := c.BenchImage(t.Context(), "n1"); err != nil || got != "raceway:1" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := c.BenchImage(t.Context(), "n2"); err == nil || !strings.Contains(err.Error(), "n2") {
		t.Errorf("%v, want that n2 has no agent", err)
	}
}
