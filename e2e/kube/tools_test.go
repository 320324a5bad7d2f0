package kube

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// told is how a run of the command line ended.
type told struct {
	out, complaint string
	code           int
}

// tell runs the command line with a kubeconfig.
func (w *world) tell(t *testing.T, kubeconfig string, args ...string) told {
	t.Helper()
	out, err := w.Run(exec.CommandContext(t.Context(), w.raceway, append(args, "--kubeconfig", kubeconfig)...))
	said := told{out: out}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		said.code, said.complaint = exit.ExitCode(), strings.TrimSpace(string(exit.Stderr))
	case err != nil:
		t.Fatal(err)
	}
	return said
}

// says is tell as the administrator, who gets an exit code and hears some words.
func (w *world) says(t *testing.T, code int, words []string, args ...string) told {
	t.Helper()
	said := w.tell(t, w.Kubeconfig(), args...)
	said.want(t, code, words, args...)
	return said
}

func (s told) want(t *testing.T, code int, words []string, args ...string) {
	t.Helper()
	line := "raceway " + strings.Join(args, " ")
	if s.code != code {
		t.Errorf("%s: exit code %d, want %d\n%s%s", line, s.code, code, s.out, s.complaint)
	}
	for _, word := range words {
		if !strings.Contains(s.out+s.complaint, word) {
			t.Errorf("%s does not say %q:\n%s%s", line, word, s.out, s.complaint)
		}
	}
}

// oneLine wants a complaint that people can read at a glance.
func (s told) oneLine(t *testing.T) {
	t.Helper()
	if s.out != "" || strings.Count(s.complaint, "\n") > 0 || len(s.complaint) > 300 {
		t.Errorf("it is not one clear line:\n%s%s", s.out, s.complaint)
	}
}

// TestTheCommandLineAsksTheAgents goes through the verbs as a user who has a kubeconfig.
func TestTheCommandLineAsksTheAgents(t *testing.T) {
	w := onMesh(t)
	const ns = "tools"
	w.busy(t, ns)
	w.apply(t, fmt.Sprintf(strict, ns))
	// It connects after the capture.
	w.run(t, ns, pod{name: "steady", node: 1, args: []string{"hold", w.podIP(t, ns, "server2") + ":9000"}})
	w.captured(t, ns, true, "steady")
	both := []string{"node1", "node2"}
	for _, test := range []struct {
		line  string
		code  int
		words []string
	}{
		{"version", 0, both},
		{"workloads -n " + ns, 0, []string{"loop", "server2", "captured", "HBONE"}},
		{"workloads -n " + ns + " --agent node1", 0, []string{"captured"}},
		{"services -n " + ns, 0, []string{"server", "2/2"}},
		{"policies -n " + ns, 0, []string{"PeerAuthentication", "STRICT"}},
		{"certificates", 0, []string{"spiffe://cluster.local/ns/" + ns + "/sa/loop", "valid"}},
		{"certificates --agent node2", 0, []string{"spiffe://cluster.local/ns/" + ns + "/sa/server2"}},
		{"connections -n " + ns, 0, []string{ns + "/steady", ns + "/server2:9000", "HBONE"}},
		{"flows -n " + ns, 0, []string{ns + "/loop", "HBONE"}},
		{"why " + ns + "/loop server." + ns + ":80", 0, []string{"tunnel", "mutual TLS", "spiffe://cluster.local/ns/" + ns + "/sa/loop"}},
		{"why " + ns + "/nobody server:80", 2, []string{"nobody"}},
		{"check", 0, append([]string{"cluster"}, both...)},
		{"check -o wide -n " + ns, 0, []string{ns + "/loop", "tunnel", "CNI plugin"}},
		{"log-level", 0, []string{"INFO"}},
		{"log-level debug --agent node1", 0, nil},
		{"log-level --agent node1", 0, []string{"DEBUG"}},
		{"log-level --agent node2", 0, []string{"INFO"}},
		{"log-level info --agent all", 0, nil},
		{"workloads --agent node9", 2, []string{`no agent of node "node9"`, "node1, node2"}},
		{"workloads --system-namespace elsewhere", 3, []string{"namespace elsewhere", "--system-namespace"}},
		{"uninstall --system-namespace elsewhere", 3, []string{"elsewhere", "not installed", "--system-namespace"}},
	} {
		t.Run(test.line, func(t *testing.T) {
			said := w.says(t, test.code, test.words, strings.Fields(test.line)...)
			if test.code > 1 {
				said.oneLine(t)
			}
		})
	}
	for _, verb := range []string{"version", "workloads", "services", "policies", "certificates", "connections", "check", "log-level"} {
		out := w.says(t, 0, nil, verb, "-o", "json").out
		if !json.Valid([]byte(out)) {
			t.Errorf("raceway %s -o json is %s", verb, out)
		}
	}
	if said := w.says(t, 0, nil, "certificates", "--agent", "node2"); strings.Contains(said.out, "/sa/loop") {
		t.Errorf("the agent of node2 has a certificate of a pod of node1:\n%s", said.out)
	}
}

// defaultDeny is what careful people have in every namespace.
const defaultDeny = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny, namespace: %s}
spec: {podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress, Egress]}
`

// TestAPreviewNamesWhatIsInTheWay has one pod of each kind.
func TestAPreviewNamesWhatIsInTheWay(t *testing.T) {
	w := onMesh(t)
	const ns = "preview"
	w.namespace(t, ns)
	w.kubectl(t, "label", "--overwrite", "namespace", ns, "pod-security.kubernetes.io/enforce=privileged")
	w.apply(t, fmt.Sprintf(defaultDeny, ns))
	out := pod{name: "out", node: 1, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "none"}}
	in := pod{name: "canary", node: 2, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "ambient"}}
	w.run(t, ns, server(2), out, in, pod{name: "stranger", node: 1, args: []string{"serve"}})
	host := strings.Replace(pod{name: "host", node: 1, args: []string{"hold", "127.0.0.1:1"}}.manifest(ns), "spec:\n", "spec:\n  hostNetwork: true\n", 1)
	w.apply(t, host)
	w.captured(t, ns, true, "canary")
	w.captured(t, ns, false, "stranger")
	w.served(t, ns, "stranger", "http://"+w.podIP(t, ns, "canary")+":8080/")

	said := w.says(t, 1, nil, "check", "--preview", "-n", ns, "-o", "json")
	found, err := findings(said)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []finding{
		{Subject: ns + "/out", Check: "would be captured", OK: true, Detail: "opts out"},
		{Subject: ns + "/host", Check: "would be captured", OK: true, Detail: "hostNetwork"},
		{Subject: ns + "/stranger", Check: "would be captured", OK: true, Detail: "yes"},
		{Subject: ns + "/server2", Check: "NetworkPolicy", Detail: "tunnels to it would be blocked by default-deny: allow ingress of TCP port 15008"},
		{Subject: ns + "/server2", Check: "NetworkPolicy", Detail: "allow egress"},
		{Subject: ns + "/canary", Check: "STRICT", Detail: "would refuse " + ns + "/stranger, which speaks plaintext to port 8080"},
	} {
		if !slices.ContainsFunc(found, want.like) {
			t.Errorf("there is no %+v in\n%s", want, said.out)
		}
	}
	w.says(t, 2, []string{`"nowhere"`}, "check", "--preview", "-n", "nowhere").oneLine(t)
	w.says(t, 2, []string{"-n"}, "check", "--preview").oneLine(t)
}

// finding is a row of `raceway check`. In what a test wants, Detail is a part of it.
type finding struct {
	Subject, Check string
	OK             bool
	Detail         string
}

func (f finding) like(got finding) bool {
	return got.Subject == f.Subject && strings.HasPrefix(got.Check, f.Check) && got.OK == f.OK && strings.Contains(got.Detail, f.Detail)
}

func findings(said told) (found []finding, err error) {
	if err := json.Unmarshal([]byte(said.out), &found); err != nil {
		return nil, fmt.Errorf("%w: %s%s", err, said.out, said.complaint)
	}
	return found, nil
}

// TestABugReportHoldsNoSecret searches it for the CA's key and for every token.
func TestABugReportHoldsNoSecret(t *testing.T) {
	w := onMesh(t)
	const ns = "reported"
	w.busy(t, ns)
	path := filepath.Join(t.TempDir(), "report.tar.gz")
	w.says(t, 0, []string{"wrote " + path}, "bug-report", "--file", path)
	report := unpack(t, path)
	for _, name := range []string{
		"version.txt", "cluster-check.json", "objects/pods.yaml", "objects/nodes.yaml", "objects/daemonsets.yaml", "objects/events.yaml",
		"objects/peerauthentications.yaml", "agents/node1/workloads.json", "agents/node2/check.json", "agents/node1/flows.json",
		"logs/" + w.podOf(t, "agent", "node1") + "/agent.log", "logs/" + w.podOf(t, "ca", "node2") + "/ca.log",
	} {
		if len(report[name]) == 0 {
			t.Errorf("it lacks %s: it has %v", name, slices.Sorted(maps.Keys(report)))
		}
	}
	secrets, err := w.client.CoreV1().Secrets(system).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(secrets.Items) == 0 {
		t.Fatalf("%d secrets: %v", len(secrets.Items), err)
	}
	for _, s := range secrets.Items {
		for key, value := range s.Data {
			if strings.HasSuffix(key, ".pem") && key != "ca-key.pem" || strings.HasSuffix(key, ".crt") || key == "namespace" {
				continue // the world may know
			}
			for name, content := range report {
				if strings.Contains(content, strings.TrimSpace(string(value))) {
					t.Errorf("%s holds %s of Secret %s", name, key, s.Name)
				}
			}
		}
	}
	for name, content := range report {
		if strings.Contains(content, "PRIVATE KEY") {
			t.Errorf("%s holds a private key", name)
		}
		if strings.Contains(content, "eyJhbGciOi") { // the head of a token
			t.Errorf("%s holds a token", name)
		}
	}
	w.says(t, 2, []string{path}, "bug-report", "--file", path).oneLine(t)
}

// unpack returns the files of a report by name.
func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	report := make(map[string]string)
	for files := tar.NewReader(zip); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return report
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		report[strings.TrimPrefix(header.Name, "raceway-bug-report/")] = string(content)
	}
}

// userOf writes the kubeconfig of whoever has a token.
func (w *world) userOf(t *testing.T, server, token string) string {
	t.Helper()
	config := clientcmdapi.NewConfig()
	ca := w.RESTConfig().TLSClientConfig
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: server, CertificateAuthority: ca.CAFile, CertificateAuthorityData: ca.CAData}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "c"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestUsersWithoutRightsAreToldSo is about kubeconfigs that do not suffice.
func TestUsersWithoutRightsAreToldSo(t *testing.T) {
	w := onMesh(t)
	const ns = "users"
	w.namespace(t, ns)
	w.kubectl(t, "-n", ns, "create", "serviceaccount", "viewer")
	w.kubectl(t, "-n", ns, "create", "serviceaccount", "nobody")
	w.apply(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-viewer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: viewer, namespace: users}]
`)
	server := w.RESTConfig().Host
	viewer := w.userOf(t, server, w.token(t, ns, "viewer", "", ""))
	nobody := w.userOf(t, server, w.token(t, ns, "nobody", "", ""))
	off := w.userOf(t, strings.Replace(server, ":6443", ":6444", 1), "none")
	stale := w.userOf(t, server, "nonsense")
	for _, test := range []struct {
		name, kubeconfig string
		words            []string
	}{
		{"who may not exec", viewer, []string{"pods/exec", system}},
		{"who may do nothing", nobody, []string{"cannot list", "pods", system}},
		{"an API server that is away", off, []string{"connection refused"}},
		{"a token that is not valid", stale, []string{"Unauthorized"}},
		{"a kubeconfig that is not there", "/nowhere/config", []string{"/nowhere/config"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			said := w.tell(t, test.kubeconfig, "workloads")
			said.want(t, 3, test.words, "workloads")
			said.oneLine(t)
			said = w.tell(t, test.kubeconfig, "check") // it asks the cluster first
			said.want(t, 3, nil, "check")
			said.oneLine(t)
		})
	}
}

// TestAgentsThatCannotRunAreNamed makes the agent of each node crash, one after another.
func TestAgentsThatCannotRunAreNamed(t *testing.T) {
	slow(t)
	w := onMesh(t)
	defer func() {
		w.kubectl(t, "-n", system, "rollout", "undo", "daemonset/raceway-agent")
		w.kubectl(t, "-n", system, "delete", "pod", "-l", "app.kubernetes.io/component=agent", "--field-selector=status.phase!=Running", "--wait=false")
		w.kubectl(t, "-n", system, "rollout", "status", "daemonset/raceway-agent", "--timeout=2m")
	}()
	const broken = `[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--no-such-flag"}]`
	w.kubectl(t, "-n", system, "patch", "daemonset", "raceway-agent", "--type=json", "-p", broken)
	eventually(t, "the next agent crashes", func() error {
		out := w.kubectl(t, "-n", system, "get", "pods", "-l", "app.kubernetes.io/component=agent")
		if !strings.Contains(out, "CrashLoopBackOff") && !strings.Contains(out, "Error") {
			return errors.New(out)
		}
		return nil
	})
	// The rollout stands still, and the earlier agents answer meanwhile.
	w.says(t, 0, []string{"captured"}, "workloads")
	eventually(t, "the check tells of the rollout", func() error {
		said := w.tell(t, w.Kubeconfig(), "check")
		if said.code != 1 || !strings.Contains(said.out, "the new agents do not start, and the earlier ones go on") {
			return fmt.Errorf("exit code %d: %s", said.code, said.out)
		}
		return nil
	})
	w.kubectl(t, "-n", system, "delete", "pod", "--grace-period=1", "--wait=false", w.runningAgent(t, "node1"))
	eventually(t, "the agent of node1 is missed", func() error {
		said := w.tell(t, w.Kubeconfig(), "workloads")
		if said.code != 3 || !strings.Contains(said.complaint, "agent node1") || !strings.Contains(said.complaint, "CrashLoopBackOff") {
			return fmt.Errorf("code %d: %s", said.code, said.complaint)
		}
		return nil
	})
	path := filepath.Join(t.TempDir(), "report.tar.gz")
	w.says(t, 3, []string{"wrote " + path, "agent node1"}, "bug-report", "--file", path)
	logged := false
	for name, content := range unpack(t, path) {
		logged = logged || strings.HasSuffix(name, "/agent.previous.log") && strings.Contains(content, "no-such-flag")
	}
	if !logged {
		t.Error("the report lacks the log of the agent that crashed")
	}
}

// runningAgent is the pod of a node's agent that runs.
func (w *world) runningAgent(t *testing.T, node string) string {
	t.Helper()
	pods, err := w.client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/component=agent", FieldSelector: "spec.nodeName=" + node,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready {
			return p.Name
		}
	}
	t.Fatalf("no agent of %s runs", node)
	return ""
}
