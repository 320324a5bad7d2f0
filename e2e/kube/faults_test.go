package kube

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// fault is a part of the data plane that a test breaks on node1.
type fault struct {
	name string
	// breaks is repeated until a check has seen it: the agent may be faster.
	breaks func(t *testing.T)
	heals  func(t *testing.T) // nil where the agent does
	finds  finding
	logs   string // what the agent says when it has mended it; "" where it cannot
}

// TestCheckNamesWhatIsBroken breaks one part after another.
func TestCheckNamesWhatIsBroken(t *testing.T) {
	slow(t)
	w := onMesh(t)
	const ns = "faults"
	w.busy(t, ns)
	n := w.Node(1)
	space := w.spaceOf(t, n, w.podIP(t, ns, "server1"))
	for _, f := range w.faults(t, n, ns, space) {
		t.Run(f.name, func(t *testing.T) {
			w.says(t, 0, nil, "check")
			heal := sync.OnceFunc(func() {
				if f.heals != nil {
					f.heals(t)
				}
			})
			defer heal()
			logged := w.mended(t, f.logs)
			eventually(t, "the check names it", func() error {
				f.breaks(t)
				said := w.tell(t, w.Kubeconfig(), "check", "-o", "json")
				if found, err := findings(said); err != nil || said.code != 1 || !slices.ContainsFunc(found, f.finds.like) {
					return fmt.Errorf("exit code %d, no %+v in %s%s", said.code, f.finds, said.out, said.complaint)
				}
				return nil
			})
			heal()
			eventually(t, "it is mended", func() error {
				if said := w.tell(t, w.Kubeconfig(), "check"); said.code != 0 {
					return fmt.Errorf("exit code %d: %s%s", said.code, said.out, said.complaint)
				}
				return nil
			})
			if f.logs != "" && w.mended(t, f.logs) == logged {
				t.Errorf("the agent's log says nothing of %q", f.logs)
			}
		})
	}
}

func (w *world) faults(t *testing.T, n *cluster.Node, ns, space string) []fault {
	const pins, cni = "/sys/fs/bpf/raceway", "/etc/cni/net.d/10-bridge.conflist"
	ofPod := func(check, detail string) finding {
		return finding{Subject: ns + "/server1", Check: check, Detail: detail}
	}
	ofAgent := func(check, detail string) finding {
		return finding{Subject: "agent", Check: check, Detail: detail}
	}
	run := func(t *testing.T, args ...string) {
		t.Helper()
		if out, err := n.Exec(t.Context(), args[0], args[1:]...); err != nil {
			t.Log(err, string(out)) // it may be broken still
		}
	}
	detach := func(pin string) func(*testing.T) {
		return func(t *testing.T) {
			found, err := filepath.Glob(n.Path(pins + "/" + pin))
			if err != nil || len(found) == 0 {
				t.Fatalf("no %s: %v", pin, err)
			}
			for _, f := range found {
				run(t, "bpftool", "link", "detach", "pinned", strings.TrimPrefix(f, n.Path("/")))
			}
		}
	}
	inPod := func(args ...string) func(*testing.T) {
		return func(t *testing.T) { run(t, append([]string{"nsenter", "--net=" + space}, args...)...) }
	}
	scaleCA := func(to string) func(*testing.T) {
		return func(t *testing.T) {
			w.kubectl(t, "-n", system, "scale", "deployment/raceway-ca", "--replicas="+to)
		}
	}
	var once sync.Once
	good, err := os.ReadFile(n.Path(cni))
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) func(*testing.T) {
		return func(t *testing.T) {
			if err := os.WriteFile(n.Path(cni), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return []fault{
		{"a program", detach("layout-*/connect4"), nil, ofPod("connect hooks", "connect4"), "connect hooks"},
		{"the recognition of the kubelet", detach("layout-*/probe"), nil, ofPod("kubelet", "probes"), "kubelet"},
		{"a pod's programs", detach("pods/*/*"), nil, ofPod("guard", "is not among"), "guard"},
		{"all pins", func(t *testing.T) { run(t, "rm", "-r", pins) }, nil, ofPod("pins", "no such file"), "pins"},
		{"a rule", inPod("ip", "rule", "del", "priority", "150"), nil, ofPod("routing", "no rule fwmark"), "routing"},
		{"a route", inPod("ip", "route", "flush", "table", "15001"), nil, ofPod("routing", "no route local default"), "routing"},
		{"a network configuration that is none", write("{"), write(string(good)), ofAgent("CNI plugin", "10-bridge.conflist"), ""},
		{
			"a network configuration that another program writes", func(t *testing.T) {
				for range 6 {
					write(strings.Replace(string(good), `"raceway-cni"`, `"portmap"`, 1))(t)
				}
			}, write(string(good)), ofAgent("CNI plugin", "raceway-cni"), "",
		},
		{"the CNI plugin", func(t *testing.T) { run(t, "rm", "-f", "/opt/cni/bin/raceway-cni") }, nil, ofAgent("CNI plugin", "/opt/cni/bin/raceway-cni"), ""},
		{
			"port 15008", inPod("nft", "table inet e2e { chain in { type filter hook input priority 0; tcp dport 15008 drop; }; }"),
			inPod("nft", "delete", "table", "inet", "e2e"), ofPod("tunnel", "15008"), "",
		},
		{
			"port 15008 between nodes", func(t *testing.T) {
				run(t, "nft", "table inet e2e { chain f { type filter hook forward priority 0; ip saddr 10.244.2.0/24 tcp dport 15008 drop; }; }")
			}, func(t *testing.T) { run(t, "nft", "delete", "table", "inet", "e2e") },
			ofAgent("tunnel to node1", "a NetworkPolicy or a firewall may be blocking TCP port 15008"), "",
		},
		{
			"port 15008 by a NetworkPolicy", func(t *testing.T) { w.apply(t, fmt.Sprintf(defaultDeny, ns)) },
			func(t *testing.T) {
				w.kubectl(t, "-n", ns, "delete", "--ignore-not-found", "networkpolicy", "default-deny")
			},
			ofPod("NetworkPolicy", "blocked by default-deny"), "",
		},
		{"the CA", scaleCA("0"), scaleCA("2"), finding{Subject: "cluster", Check: "CA: 0 of 0 ready", Detail: "no certificate is signed"}, ""},
		{
			"a certificate", func(t *testing.T) {
				once.Do(func() {
					scaleCA("0")(t)
					w.killAgents(t, n) // and with it the keys that it has in its memory
				})
			}, scaleCA("2"), ofAgent("certificate spiffe://cluster.local/ns/"+ns+"/sa/server1", "CA raceway-ca"), "",
		},
	}
}

// TestNewPodsSayWhatTheyWaitFor stops the CA, without which a new pod cannot be captured.
func TestNewPodsSayWhatTheyWaitFor(t *testing.T) {
	w := onMesh(t)
	const ns = "waiting"
	w.namespace(t, ns)
	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.kubectl(t, "-n", system, "scale", "deployment/raceway-ca", "--replicas=0")
	heal := sync.OnceFunc(func() {
		w.kubectl(t, "-n", system, "scale", "deployment/raceway-ca", "--replicas=2")
	})
	defer heal()
	w.kubectl(t, "-n", system, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=ca", "--timeout=60s")
	w.apply(t, pod{name: "late", node: 1, args: []string{"serve"}}.manifest(ns))
	eventually(t, "an event names the certificate", func() error {
		out := w.kubectl(t, "-n", ns, "get", "events", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(out, "capture of pod "+ns+"/late is not in force") || !strings.Contains(out, "certificate") {
			return errors.New(out)
		}
		return nil
	})
	heal()
	w.captured(t, ns, true, "late")
}

// mended counts the lines of the agents' logs on what they have put back.
func (w *world) mended(t *testing.T, what string) int {
	t.Helper()
	count := 0
	for line := range strings.Lines(w.kubectl(t, "-n", system, "logs", "-l", "app.kubernetes.io/component=agent", "--tail=-1")) {
		if strings.Contains(line, "put back what somebody took") && strings.Contains(line, what) {
			count++
		}
	}
	return count
}

// spaceOf is the network namespace of a pod, as its node names it.
func (w *world) spaceOf(t *testing.T, n *cluster.Node, ip string) string {
	t.Helper()
	spaces, err := filepath.Glob(n.Path("/run/netns/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range spaces {
		path := strings.TrimPrefix(s, n.Path("/"))
		if out, err := n.Exec(t.Context(), "nsenter", "--net=/"+path, "ip", "-o", "addr", "show", "to", ip); err == nil && len(out) > 0 {
			return "/" + path
		}
	}
	t.Fatalf("no namespace on %s has %s", n.Name, ip)
	return ""
}

// TestAnAgentWithoutAPIServerSaysSo asks it on its node: the cluster cannot be asked.
func TestAnAgentWithoutAPIServerSaysSo(t *testing.T) {
	w := onMesh(t)
	n := w.Node(1)
	cli := w.cliOn(t, n)
	if out, err := n.Exec(t.Context(), cli, "check"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := w.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(w.StartAPIServer(t.Context()), w.AwaitNodes(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "the agent misses the API server", func() error {
		out, err := n.Exec(t.Context(), cli, "check")
		if err == nil || !strings.Contains(string(out), "API server") || !strings.Contains(string(out), "has not answered for") {
			return errors.Join(errors.New(string(out)), err)
		}
		return nil
	})
	said := w.tell(t, w.Kubeconfig(), "check")
	said.want(t, 3, []string{"connection refused"}, "check")
	said.oneLine(t)
}

// cliOn gives a node the command line and returns where.
func (w *world) cliOn(t *testing.T, n *cluster.Node) string {
	t.Helper()
	const path = "/run/e2e-raceway"
	from, err := os.Open(w.raceway)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(n.Path(path), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(to, from)
	if closeErr := to.Close(); err != nil || closeErr != nil {
		t.Fatal(err, closeErr)
	}
	t.Cleanup(func() {
		if err := os.Remove(n.Path(path)); err != nil {
			t.Error(err)
		}
	})
	return path
}
