package kube

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// workloadsOf are pods of all kinds of lives: jobs whose init containers need the network at
// once, beside a native sidecar; a pod of a StatefulSet; pods that live for a moment. The
// arguments: namespace, image, address of server2, what requests say.
const workloadsOf = `---
apiVersion: batch/v1
kind: Job
metadata: {name: staged, namespace: %[1]s}
spec:
  completions: 2
  parallelism: 2
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeName: node1
      initContainers:
      - {name: fetch, image: %[2]s, args: [get, "http://%[3]s:8080/%[4]s"]}
      - name: sidecar
        image: %[2]s
        args: [serve]
        restartPolicy: Always
        startupProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 30}
      containers:
      - {name: app, image: %[2]s, args: [get, -n, "5", "http://server/%[4]s"]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: brief, namespace: %[1]s}
spec:
  completions: 10
  parallelism: 5
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      nodeName: node1
      containers: [{name: app, image: %[2]s, args: [get, "http://server/%[4]s"]}]
---
apiVersion: v1
kind: Service
metadata: {name: stateful, namespace: %[1]s}
spec: {clusterIP: None, selector: {app: stateful}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: stateful, namespace: %[1]s}
spec:
  serviceName: stateful
  selector: {matchLabels: {app: stateful}}
  template:
    metadata: {labels: {app: stateful}}
    spec:
      terminationGracePeriodSeconds: 5
      nodeName: node2
      containers:
      - name: app
        image: %[2]s
        args: [serve]
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
`

// home is an enrolled namespace with a server on the second node and a client on the first.
func (w *world) home(t *testing.T, namespace string, others ...pod) {
	t.Helper()
	w.namespace(t, namespace)
	w.kubectl(t, "label", "namespace", namespace, enrolled)
	w.apply(t, fmt.Sprintf(serverService, namespace))
	others = append(others, pod{name: "client", node: 1, args: []string{"serve"}},
		pod{name: "server2", node: 2, args: []string{"serve"}, labels: map[string]string{"role": "server"}})
	w.run(t, namespace, others...)
	w.captured(t, namespace, true, "client", "server2")
	w.served(t, namespace, "client", "http://server/")
}

// tunnelled wants a pod of the first node to reach one of the second by a tunnel.
func (w *world) tunnelled(t *testing.T, namespace, client, host string) {
	t.Helper()
	wire := w.wire(t, 2)
	text := needle()
	w.must(t, namespace, client, "get", "-timeout", "15s", "http://"+host+"/"+text)
	if clear, tunnels := seen(t, wire, text); clear || tunnels == 0 {
		t.Errorf("%s: in clear %v, %d packets of tunnels", host, clear, tunnels)
	}
}

// TestPodsLiveAsWithoutTheMesh makes pods of an enrolled namespace complete, crash, be
// replaced and be deleted.
func TestPodsLiveAsWithoutTheMesh(t *testing.T) {
	w := onMesh(t)
	const ns = "lives"
	w.home(t, ns,
		pod{name: "crashing", node: 2, args: []string{"serve", "crashing"}},
		pod{name: "stubborn", node: 2, args: []string{"serve"}, spec: "  terminationGracePeriodSeconds: 600\n", extra: "    lifecycle: {preStop: {sleep: {seconds: 500}}}\n"},
		pod{name: "apart", node: 2, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "none"}})
	wire := w.wire(t, 2)
	mark := needle()
	w.apply(t, fmt.Sprintf(workloadsOf, ns, cluster.AppRef, w.host(t, ns, "server2"), mark))

	t.Run("jobs complete", func(t *testing.T) {
		w.kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "job/staged", "job/brief", "--timeout=3m")
		if clear, tunnels := seen(t, wire, mark); clear || tunnels == 0 {
			t.Errorf("in clear %v, %d packets of tunnels", clear, tunnels)
		}
		eventually(t, "no pod that has completed is captured", func() error {
			found, err := w.workloads(t.Context(), ns)
			for name, row := range found {
				over := strings.HasPrefix(name, "staged-") || strings.HasPrefix(name, "brief-")
				if over && (row.Capture != "none" || row.Reason != "") {
					err = errors.Join(err, fmt.Errorf("%+v", row))
				}
			}
			return err
		})
	})
	t.Run("a StatefulSet's pod is replaced", func(t *testing.T) {
		const name = "stateful-0"
		w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=90s")
		for range 2 {
			w.captured(t, ns, true, name)
			eventually(t, "the new pod has the name", func() error {
				_, err := w.exec(t.Context(), ns, "client", "get", "http://stateful-0.stateful:8080/")
				return err
			})
			w.tunnelled(t, ns, "client", "stateful-0.stateful:8080")
			before := w.lives(t, ns)[name]
			w.kubectl(t, "-n", ns, "delete", "pod", name)
			eventually(t, "it is replaced", func() error {
				if now := w.lives(t, ns)[name]; now == "" || now == before {
					return errors.New("it is not")
				}
				return nil
			})
			w.kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=90s")
		}
	})
	t.Run("a container crashes", func(t *testing.T) {
		n := w.Node(2)
		out, err := n.Exec(t.Context(), "pgrep", "-f", "^/bin/app serve crashing")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Exec(t.Context(), "kill", "-KILL", strings.TrimSpace(string(out))); err != nil {
			t.Fatal(err)
		}
		w.kubectl(t, "-n", ns, "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "pod/crashing", "--timeout=90s")
		w.served(t, ns, "client", "http://"+w.host(t, ns, "crashing")+":8080/")
		w.tunnelled(t, ns, "client", w.host(t, ns, "crashing")+":8080")
	})
	t.Run("a pod is deleted by force", func(t *testing.T) {
		w.kubectl(t, "-n", ns, "delete", "pod", "stubborn", "--force", "--grace-period=0")
		eventually(t, "nothing is known of it", func() error {
			found, err := w.workloads(t.Context(), ns)
			if row, there := found["stubborn"]; err == nil && there {
				err = fmt.Errorf("%+v", row)
			}
			return err
		})
		w.run(t, ns, pod{name: "stubborn", node: 2, args: []string{"serve"}})
		w.captured(t, ns, true, "stubborn")
		w.tunnelled(t, ns, "client", w.host(t, ns, "stubborn")+":8080")
	})
	t.Run("a pod stays out", func(t *testing.T) {
		w.captured(t, ns, false, "apart")
		wire := w.wire(t, 2)
		text := needle()
		w.must(t, ns, "client", "get", "http://"+w.host(t, ns, "apart")+":8080/"+text)
		if clear, _ := seen(t, wire, text); !clear {
			t.Error("not in clear")
		}
		w.must(t, ns, "apart", "get", "http://"+w.host(t, ns, "client")+":8080/")
	})
}

// TestProtocolsAndToolsWorkAsWithoutTheMesh is for what administrators do with pods, and for
// conversations of other shapes than a request and its answer.
func TestProtocolsAndToolsWorkAsWithoutTheMesh(t *testing.T) {
	w := onMesh(t)
	const ns, outside = "tools", "strangers"
	w.home(t, ns)
	w.namespace(t, outside)
	w.run(t, outside, pod{name: "stranger", node: 1, args: []string{"serve"}})
	server2 := w.host(t, ns, "server2")

	t.Run("a server that speaks first", func(t *testing.T) {
		if got := w.must(t, ns, "client", "hear", server2+":9100"); got != "server2" {
			t.Errorf("it said %q", got)
		}
	})
	t.Run("a large transfer", func(t *testing.T) {
		w.must(t, ns, "client", "transfer", "-n", "64", "-timeout", "2m", "server:9000")
	})
	t.Run("the API server", func(t *testing.T) {
		// It answers plain HTTP by saying what it wants.
		_, err := w.exec(t.Context(), ns, "client", "get", "http://kubernetes.default:443/")
		if err == nil || !strings.Contains(err.Error(), "HTTPS server") {
			t.Errorf("the API server said: %v", err)
		}
	})
	t.Run("logs", func(t *testing.T) {
		if got := w.kubectl(t, "-n", ns, "logs", "server2"); got != "serving" {
			t.Errorf("got %q", got)
		}
	})
	w.apply(t, fmt.Sprintf(strict, ns))
	w.refused(t, outside, "stranger", "http://"+server2+":8080/")
	t.Run("exec, of a STRICT server", func(t *testing.T) {
		w.must(t, ns, "server2", "check")
	})
	t.Run("port-forward, of a STRICT server", func(t *testing.T) {
		address := w.forward(t, ns, "server2", 8080)
		got, err := get(t, w.Administrator(), "http://"+address+"/")
		if err != nil || !strings.Contains(got, `"server2"`) {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("one port of a STRICT server", func(t *testing.T) {
		w.apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: server, namespace: %s}
spec: {selector: {matchLabels: {role: server}}, mtls: {mode: STRICT}, portLevelMtls: {"9000": {mode: PERMISSIVE}}}
`, ns))
		eventually(t, "port 9000 is open", func() error {
			_, err := w.exec(t.Context(), outside, "stranger", "echo", "-timeout", "3s", server2+":9000", "hello")
			return err
		})
		w.refused(t, outside, "stranger", "http://"+server2+":8080/")
		w.served(t, ns, "client", "http://"+server2+":8080/")
	})
}

// forward runs kubectl port-forward until the test ends, and returns its address where the
// administrator is.
func (w *world) forward(t *testing.T, namespace, pod string, port int) string {
	t.Helper()
	cmd := w.KubectlCommand(t.Context(), nil, "-n", namespace, "port-forward", "pod/"+pod, ":"+strconv.Itoa(port))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Administrator().Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() }) // killed, as the test's context has ended
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if _, err := netip.ParseAddrPort(address); err != nil {
		t.Fatalf("kubectl port-forward says %q", line)
	}
	return address
}

// TestWebhooksOfEnrolledPods has the API server, which is in no mesh, call one.
func TestWebhooksOfEnrolledPods(t *testing.T) {
	w := onMesh(t)
	const ns = "hooks"
	w.home(t, ns)
	certificate, key := selfSigned(t, "hook."+ns+".svc")
	encode := base64.StdEncoding.EncodeToString
	w.apply(t, fmt.Sprintf(`---
apiVersion: v1
kind: Secret
metadata: {name: hook, namespace: %[1]s}
type: kubernetes.io/tls
data: {tls.crt: %[2]s, tls.key: %[3]s}
---
apiVersion: v1
kind: Service
metadata: {name: hook, namespace: %[1]s}
spec: {selector: {app: hook}, ports: [{port: 443, targetPort: 8443}]}
`, ns, encode(certificate), encode(key)))
	w.run(t, ns, pod{
		name: "hook", node: 2, args: []string{"webhook", "/tls"},
		spec:  "  volumes: [{name: tls, secret: {secretName: hook}}]\n",
		extra: "    volumeMounts: [{name: tls, mountPath: /tls}]\n    readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1}\n",
	})
	w.captured(t, ns, true, "hook")
	w.apply(t, fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: %[1]s}
webhooks:
- name: hook.%[1]s.example.com
  clientConfig: {service: {name: hook, namespace: %[1]s}, caBundle: %[2]s}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
`, ns, encode(certificate)))
	defer w.kubectl(t, "delete", "validatingwebhookconfiguration", ns)
	says := func(want string) {
		t.Helper()
		eventually(t, "the API server says: "+want, func() error {
			_, err := w.Kubectl(t.Context(), "-n", ns, "create", "configmap", "refused", "--dry-run=server")
			if err == nil || !strings.Contains(err.Error(), want) {
				return fmt.Errorf("it says: %w", err)
			}
			return nil
		})
	}
	says("the webhook was asked")
	w.kubectl(t, "-n", ns, "create", "configmap", "fine", "--dry-run=server")

	// What comes from the API server has no identity.
	w.apply(t, fmt.Sprintf(strict, ns))
	says("failed calling webhook")
	out, err := w.cli(t.Context(), "flows", "-n", ns, "-o", "json")
	if err != nil || !strings.Contains(out, "STRICT") {
		t.Errorf("no reason is given (%v):\n%s", err, out)
	}
	w.apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: hook, namespace: %s}
spec: {selector: {matchLabels: {app: hook}}, mtls: {mode: STRICT}, portLevelMtls: {"8443": {mode: PERMISSIVE}}}
`, ns))
	says("the webhook was asked")
}

// selfSigned is a certificate for a name, and its key.
func selfSigned(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}
