package kube

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// Label values of raceway.dev/dataplane-mode.
const (
	enrolled = "raceway.dev/dataplane-mode=ambient"
	plain    = "raceway.dev/dataplane-mode-"
)

// namespace makes an application's namespace, which ends with the test.
func (w *world) namespace(t *testing.T, name string) {
	t.Helper()
	w.apply(t, fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {pod-security.kubernetes.io/enforce: baseline}}\n", name))
	t.Cleanup(func() {
		if t.Failed() {
			return // the logs are more useful with the pods, and the next namespace has another name
		}
		if _, err := w.Kubectl(context.WithoutCancel(t.Context()), "delete", "namespace", name, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	w.kubectl(t, "-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=2m") // controllers come back up to half a minute after an API server does
}

// pod is one of the tests' own application. Its service account and its label app are its name.
type pod struct {
	name   string
	node   int // 0 is wherever there is room
	args   []string
	probes bool // those of a server: one of each kind
	labels map[string]string
	spec   string // further lines of YAML, of the pod
	extra  string // and of its container
}

func (p pod) manifest(namespace string) string {
	labels := fmt.Sprintf("app: %q", p.name)
	for k, v := range p.labels {
		labels += fmt.Sprintf(", %q: %q", k, v)
	}
	args, err := json.Marshal(p.args)
	if err != nil {
		panic(err) // strings are JSON
	}
	manifest := fmt.Sprintf(`---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[1]s, namespace: %[2]s}
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, labels: {%[3]s}}
spec:
  serviceAccountName: %[1]s
`, p.name, namespace, labels)
	if !strings.Contains(p.spec, "terminationGracePeriodSeconds:") {
		manifest += "  terminationGracePeriodSeconds: 5\n"
	}
	manifest += p.spec
	if p.node > 0 {
		manifest += fmt.Sprintf("  nodeName: node%d\n", p.node)
	}
	manifest += fmt.Sprintf(`  containers:
  - name: app
    image: %s
    args: %s
    env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
`, cluster.AppRef, args)
	manifest += p.extra
	if p.probes {
		manifest += `    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 2}
    livenessProbe: {grpc: {port: 9090}, periodSeconds: 1}
    startupProbe: {tcpSocket: {port: 9000}, periodSeconds: 1, failureThreshold: 30}
  - name: neighbour
    image: ` + cluster.AppRef + `
    args: [hold, "127.0.0.1:9000"]
    readinessProbe: {exec: {command: [/bin/app, check]}, periodSeconds: 2, timeoutSeconds: 5}
`
	}
	return manifest
}

// server serves on a node, behind service "server".
func server(node int) pod {
	return pod{name: fmt.Sprintf("server%d", node), node: node, args: []string{"serve"}, probes: true, labels: map[string]string{"role": "server"}}
}

const serverService = `---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: %[1]s}
spec: {ipFamilyPolicy: PreferDualStack, selector: {role: server}, ports: [{name: http, port: 80, targetPort: 8080}, {name: echo, port: 9000}, {name: datagrams, port: 9000, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: %[1]s}
spec: {ipFamilyPolicy: PreferDualStack, clusterIP: None, selector: {role: server}, ports: [{name: http, port: 8080}]}
`

// run makes pods and waits until they are ready.
func (w *world) run(t *testing.T, namespace string, pods ...pod) {
	t.Helper()
	var manifest strings.Builder
	args := []string{"-n", namespace, "wait", "--for=condition=Ready", "--timeout=" + patience.String()}
	for _, p := range pods {
		manifest.WriteString(p.manifest(namespace))
		args = append(args, "pod/"+p.name)
	}
	w.apply(t, manifest.String())
	w.kubectl(t, args...)
}

// shop is a namespace with a server on each node, and a client on the first that asks all
// the time: new requests to the service, and one lasting connection to the second node.
func (w *world) shop(t *testing.T, namespace string) {
	t.Helper()
	w.namespace(t, namespace)
	w.apply(t, fmt.Sprintf(serverService, namespace))
	w.run(t, namespace, server(1), server(2))
	eventually(t, "the service answers", func() error {
		_, err := w.exec(t.Context(), namespace, "server1", "get", "http://server."+namespace+"/")
		return err
	})
	w.run(t, namespace,
		pod{name: "loop", node: 1, args: []string{"loop", "http://server/"}},
		pod{name: "hold", node: 1, args: []string{"hold", w.host(t, namespace, "server2") + ":9000"}})
}

// exec runs the application's binary in a pod.
func (w *world) exec(ctx context.Context, namespace, pod string, args ...string) (string, error) {
	out, err := w.Kubectl(ctx, append([]string{"-n", namespace, "exec", pod, "-c", "app", "--", "/bin/app"}, args...)...)
	return strings.TrimSpace(out), err
}

// must is exec that wants success.
func (w *world) must(t *testing.T, namespace, pod string, args ...string) string {
	t.Helper()
	out, err := w.exec(t.Context(), namespace, pod, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (w *world) podIP(t *testing.T, namespace, pod string) string {
	t.Helper()
	return w.kubectl(t, "-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")
}

// host is a pod's address as it stands in a URL.
func (w *world) host(t *testing.T, namespace, pod string) string {
	t.Helper()
	return inURL(w.podIP(t, namespace, pod))
}

// inURL puts an IPv6 address in brackets.
func inURL(address string) string {
	if strings.Contains(address, ":") {
		return "[" + address + "]"
	}
	return address
}

// count is what a client's last line of output says.
type count struct {
	Done, Failed int
	Error, At    string
	Slowest      string
}

func (w *world) count(ctx context.Context, namespace, pod string) (count, error) {
	var c count
	out, err := w.Kubectl(ctx, "-n", namespace, "logs", pod, "--tail=1")
	if err == nil {
		err = json.Unmarshal([]byte(out), &c)
	}
	return c, err
}

// unharmed wants a client to have gone on since before, and to have failed at nothing.
func (w *world) unharmed(t *testing.T, namespace, pod string, before count) count {
	t.Helper()
	var now count
	eventually(t, pod+" goes on", func() (err error) {
		if now, err = w.count(t.Context(), namespace, pod); err == nil && now.Done <= before.Done {
			err = errors.New("it has done nothing since")
		}
		return err
	})
	if now.Failed > before.Failed {
		t.Errorf("%s: %d of %d failed, the last at %s: %s", pod, now.Failed-before.Failed, now.Done-before.Done, now.At, now.Error)
	}
	return now
}

// lives tells whether pods are the same as before: their UIDs, and how often their
// containers were started.
func (w *world) lives(t *testing.T, namespace string) map[string]string {
	t.Helper()
	pods, err := w.client.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lives := make(map[string]string)
	for _, p := range pods.Items {
		life := string(p.UID)
		for _, s := range p.Status.ContainerStatuses {
			life += fmt.Sprintf(" %s=%d", s.Name, s.RestartCount)
		}
		lives[p.Name] = life
	}
	return lives
}

func (w *world) ready(t *testing.T, namespace, pod string) bool {
	t.Helper()
	p, err := w.client.CoreV1().Pods(namespace).Get(t.Context(), pod, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// needle is text that no packet contains by chance.
func needle() string { return "needle-" + rand.Text() }
