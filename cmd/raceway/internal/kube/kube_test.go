package kube

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/version"
	fakediscovery "k8s.io/client-go/discovery/fake"
	fakedynamic "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"

	appsv1 "k8s.io/api/apps/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// cluster is one that holds objects, for both kinds of clients.
func cluster(t *testing.T, objects ...runtime.Object) *Cluster {
	t.Helper()
	lists := make(map[schema.GroupVersionResource]string) // of kinds that the scheme does not know
	for _, k := range append(policyKinds(),
		schema.GroupVersionResource{Group: "monitoring.coreos.com", Version: "v1", Resource: "podmonitors"},
		schema.GroupVersionResource{Group: "monitoring.coreos.com", Version: "v1", Resource: "prometheusrules"},
	) {
		lists[k] = "List"
	}
	var kept []runtime.Object
	for _, o := range objects {
		kept = append(kept, o.DeepCopyObject())
	}
	c := &Cluster{
		Namespace: DefaultNamespace,
		client:    fake.NewClientset(objects...),
		dynamic:   fakedynamic.NewSimpleDynamicClientWithCustomListKinds(scheme.Scheme, lists, kept...),
	}
	c.client.Discovery().(*fakediscovery.FakeDiscovery).FakedServerVersion = &version.Info{GitVersion: "v1.36.3"}
	return c
}

func installed(component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: "raceway-" + component, Namespace: DefaultNamespace,
		Labels: map[string]string{"app.kubernetes.io/part-of": "raceway", "app.kubernetes.io/component": component},
	}
}

func agentPod(name, node string, change ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: installed("agent"), Spec: corev1.PodSpec{NodeName: node}}
	pod.Name = name
	pod.Status.Phase = corev1.PodRunning
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: agentContainer, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
	for _, do := range change {
		do(pod)
	}
	return pod
}

func done(pod *corev1.Pod) { pod.Annotations = map[string]string{releasedAnnotation: "true"} }

func crashing(pod *corev1.Pod) {
	pod.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 5m0s"}}
}

func newer(pod *corev1.Pod) { pod.CreationTimestamp = metav1.NewTime(time.Unix(1_000_000, 0)) }

func node(name string, ready bool) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.NodeInfo = corev1.NodeSystemInfo{OperatingSystem: "linux", KernelVersion: "6.18.0-1-cloud"}
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	return n
}

func TestAgentsAreOneForEachNode(t *testing.T) {
	ca := agentPod("raceway-ca-0", "n1")
	ca.Labels["app.kubernetes.io/component"] = "ca"
	c := cluster(t,
		agentPod("old", "n1"), agentPod("new", "n1", newer),
		agentPod("works", "n2"), agentPod("fresh", "n2", newer, crashing),
		agentPod("broken", "n3", crashing), agentPod("unscheduled", ""), ca,
	)
	got, err := c.Agents(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []Agent{
		{Node: "n1", Pod: "new"},
		{Node: "n2", Pod: "works"},
		{Node: "n3", Pod: "broken", Trouble: "CrashLoopBackOff: back-off 5m0s"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("agents %+v, want %+v", got, want)
	}
	if _, err := c.Dial(t.Context(), got[2]); err == nil || !strings.Contains(err.Error(), "CrashLoopBackOff") {
		t.Errorf("an agent that does not run is dialled: %v", err)
	}
}

func TestNoAgentsSaysWhereItLooked(t *testing.T) {
	_, err := cluster(t).Agents(t.Context())
	if err == nil || !strings.Contains(err.Error(), DefaultNamespace) {
		t.Errorf("got %v, want the namespace", err)
	}
}

func TestReleaseWaitsForThoseThatCanAnswer(t *testing.T) {
	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: meshConfig, Namespace: DefaultNamespace}}
	c := cluster(t, config, node("n1", true), node("n2", false), node("n3", true),
		agentPod("a", "n1", done), agentPod("b", "n2"), agentPod("c", "n3"))
	go func() {
		time.Sleep(10 * time.Millisecond)
		pod := agentPod("c", "n3", done)
		if _, err := c.client.CoreV1().Pods(DefaultNamespace).Update(context.Background(), pod, metav1.UpdateOptions{}); err != nil {
			t.Error(err)
		}
	}()
	var told []int
	state, err := c.Release(t.Context(), func(done, _ int) { told = append(told, done) })
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(state.Done)
	if !slices.Equal(state.Done, []string{"n1", "n3"}) || !slices.Equal(state.Off, []string{"n2"}) || len(state.Silent) > 0 {
		t.Errorf("state %+v", state)
	}
	if len(told) == 0 || told[len(told)-1] != 2 {
		t.Errorf("progress %v, want it to end with 2", told)
	}
	now, err := c.client.CoreV1().ConfigMaps(DefaultNamespace).Get(t.Context(), meshConfig, metav1.GetOptions{})
	if err != nil || now.Data[releasedKey] != "true" {
		t.Errorf("ConfigMap %+v, %v: the agents were not told", now.Data, err)
	}
}

func TestReleaseNamesThoseThatDoNotAnswer(t *testing.T) {
	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: meshConfig, Namespace: DefaultNamespace}}
	c := cluster(t, config, node("n1", true), node("n2", true), agentPod("a", "n1", crashing), agentPod("b", "n2", done))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	state, err := c.Release(ctx, func(int, int) {})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(state.Silent["n1"], "CrashLoopBackOff") || len(state.Silent) != 1 {
		t.Errorf("silent %v, want n1 and why", state.Silent)
	}
}

func TestReleaseOfNothing(t *testing.T) {
	_, err := cluster(t).Release(t.Context(), func(int, int) {})
	if err == nil || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("got %v", err)
	}
}

func TestForgetCaptureTakesTheMarkOffPodsOfThatNode(t *testing.T) {
	pod := func(name, node string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Annotations: map[string]string{
				dataplane.RedirectionAnnotation: dataplane.RedirectionEnabled, "other": "stays",
			}},
			Spec: corev1.PodSpec{NodeName: node},
		}
	}
	c := cluster(t, pod("web", "n1"))
	if err := c.ForgetCapture(t.Context(), []string{"n1"}); err != nil {
		t.Fatal(err)
	}
	now, err := c.client.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]string{"other": "stays"}; !maps.Equal(now.Annotations, want) {
		t.Errorf("annotations %v, want %v", now.Annotations, want)
	}
}

func TestRemoveDeletesTheInstallationAndNothingElse(t *testing.T) {
	role := &rbacv1.ClusterRole{ObjectMeta: installed("agent")}
	role.Namespace = ""
	foreign := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "foreign"}}
	key := &corev1.Secret{ObjectMeta: installed("ca")}
	token := &corev1.Secret{ObjectMeta: installed("cni")}
	helm := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "sh.helm.release.v1.raceway.v1", Namespace: DefaultNamespace, Labels: map[string]string{"owner": "helm", "name": "raceway"}}}
	c := cluster(t, &appsv1.DaemonSet{ObjectMeta: installed("agent")}, role, foreign, key, token, helm)
	deleted, err := c.Remove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"daemonsets/raceway-agent", "clusterroles/raceway-agent", "secrets/raceway-cni", "secrets/sh.helm.release.v1.raceway.v1"}
	if !slices.Equal(deleted, want) {
		t.Errorf("deleted %q, want %q", deleted, want)
	}
	again, err := c.Remove(t.Context())
	if err != nil || len(again) > 0 {
		t.Errorf("once more: %q, %v", again, err)
	}
}

func TestCheckNamesPoliciesThatBlockCapturedPods(t *testing.T) {
	pod := func(name string, annotations map[string]string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Annotations: annotations}}
	}
	deny := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "default-deny", Namespace: "shop"},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
	}
	captured := map[string]string{dataplane.RedirectionAnnotation: dataplane.RedirectionEnabled}
	findings, err := cluster(t, deny, pod("web", captured), pod("plain", nil)).checkNetworkPolicies(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(findings) != 1 || findings[0].Subject != "shop/web" || findings[0].OK || !strings.Contains(findings[0].Detail, "default-deny") {
		t.Errorf("found %+v", findings)
	}
}

func TestPreview(t *testing.T) {
	tcp, tunnel := corev1.ProtocolTCP, intstr.FromInt32(dataplane.PortTunnel)
	udp := corev1.ProtocolUDP
	end := int32(20_000)
	low := intstr.FromInt32(15_000)
	policy := func(name string, selector map[string]string, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
		spec.PodSelector = metav1.LabelSelector{MatchLabels: selector}
		return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop"}, Spec: spec}
	}
	deny := policy("default-deny", nil, networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}})
	in := func(ports ...networkingv1.NetworkPolicyPort) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: ports}}}
	}
	web := map[string]string{"app": "web"}
	for _, test := range []struct {
		name     string
		pod      func(*corev1.Pod)
		policies []runtime.Object
		want     []string // details
	}{
		{name: "a plain pod", want: []string{"yes"}},
		{name: "host network", pod: func(p *corev1.Pod) { p.Spec.HostNetwork = true }, want: []string{"no: it is in the network of its node (hostNetwork)"}},
		{name: "opted out", pod: func(p *corev1.Pod) { p.Labels[dataplane.ModeLabel] = dataplane.ModeNone }, want: []string{"no: its label raceway.dev/dataplane-mode=none opts out"}},
		{name: "finished", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, want: []string{"no: it has finished"}},
		{name: "default deny", policies: []runtime.Object{deny}, want: []string{"yes", "tunnels to it would be blocked by default-deny: allow ingress of TCP port 15008"}},
		{name: "default deny with the port allowed", policies: []runtime.Object{deny, policy("hbone", web, in(networkingv1.NetworkPolicyPort{Protocol: &tcp, Port: &tunnel}))}, want: []string{"yes"}},
		{name: "allowed by a range", policies: []runtime.Object{deny, policy("range", web, in(networkingv1.NetworkPolicyPort{Port: &low, EndPort: &end}))}, want: []string{"yes"}},
		{name: "the port of UDP", policies: []runtime.Object{deny, policy("udp", web, in(networkingv1.NetworkPolicyPort{Protocol: &udp, Port: &tunnel}))}, want: []string{"yes", "tunnels to it would be blocked by default-deny, udp: allow ingress of TCP port 15008"}},
		{name: "of other pods", policies: []runtime.Object{policy("db", map[string]string{"app": "db"}, in())}, want: []string{"yes"}},
		{name: "no way out", policies: []runtime.Object{policy("closed", web, networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}})}, want: []string{"yes", "its tunnels to others would be blocked by closed: allow egress of TCP port 15008"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Labels: map[string]string{"app": "web"}}}
			if test.pod != nil {
				test.pod(pod)
			}
			c := cluster(t, append(test.policies, pod, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})...)
			findings, err := c.Preview(t.Context(), "shop")
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range findings {
				got = append(got, f.Detail)
				if blocked := strings.Contains(f.Detail, "blocked"); f.OK == blocked {
					t.Errorf("finding %+v: OK is wrong", f)
				}
			}
			slices.Sort(got)
			slices.Sort(test.want)
			if !slices.Equal(got, test.want) {
				t.Errorf("findings %q, want %q", got, test.want)
			}
		})
	}
}

func TestPreviewOfNoNamespace(t *testing.T) {
	if _, err := cluster(t).Preview(t.Context(), "shpo"); err == nil || !strings.Contains(err.Error(), `"shpo"`) {
		t.Errorf("got %v", err)
	}
}

func TestCheck(t *testing.T) {
	old := node("n2", true)
	old.Status.NodeInfo.KernelVersion = "4.19.0-27-amd64"
	cilium := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cilium-config", Namespace: "kube-system"}}
	agents := &appsv1.DaemonSet{ObjectMeta: installed("agent"), Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 2, NumberReady: 1}}
	c := cluster(t, node("n1", true), old, cilium, agents, agentPod("a", "n1", func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}), agentPod("b", "n2", crashing))
	findings, err := c.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wrong []string
	for _, f := range findings {
		if !f.OK {
			wrong = append(wrong, f.Subject+": "+f.Detail)
		}
	}
	want := []string{
		"node n2: kernel 5.14 or newer is needed",
		"cluster: Cilium takes other plugins out of its CNI configuration: set its Helm value cni.exclusive=false",
		"cluster: node n2: pod b: CrashLoopBackOff: back-off 5m0s",
	}
	if !slices.Equal(wrong, want) {
		t.Errorf("wrong is\n%q, want\n%q", wrong, want)
	}
}

func TestCheckBeforeTheInstallation(t *testing.T) {
	c := cluster(t, node("n1", true))
	findings, err := c.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(findings, func(f admin.Finding) bool { return f.OK && strings.Contains(f.Detail, "not installed") }) {
		t.Errorf("findings %+v: that it is not installed is not said", findings)
	}
}

func TestReportHasNoSecrets(t *testing.T) {
	secret := &corev1.Secret{ObjectMeta: installed("ca"), Data: map[string][]byte{"ca-key.pem": []byte("do not tell")}}
	c := cluster(t, secret, agentPod("a", "n1"), node("n1", true))
	files := make(map[string]string)
	if err := c.Report(t.Context(), func(f File) error {
		files[f.Name] = string(f.Data)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"objects/pods.yaml", "objects/nodes.yaml", "logs/a/agent.log"} {
		if files[name] == "" {
			t.Errorf("no %s among %v", name, slices.Sorted(maps.Keys(files)))
		}
	}
	for name, data := range files {
		if strings.Contains(data, "do not tell") || strings.Contains(data, "ZG8gbm90IHRlbGw") {
			t.Errorf("%s has the secret", name)
		}
	}
}
