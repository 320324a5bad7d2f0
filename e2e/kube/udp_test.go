package kube

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const kubeSystem = "kube-system"

// takesUDP waits until the agents have published that they take the pods' UDP.
func (w *world) takesUDP(t *testing.T, namespace string, pods ...string) {
	t.Helper()
	for _, p := range pods {
		eventually(t, p+" takes UDP", func() error {
			out, err := w.Kubectl(t.Context(), "-n", namespace, "get", "pod", p, "-o", `jsonpath={.metadata.annotations.raceway\.dev/udp}`)
			if err == nil && out != "enabled" {
				err = fmt.Errorf("the annotation is %q", out)
			}
			return err
		})
	}
}

// UDP between enrolled pods goes in tunnels, by a pod's address and by a service's, and in clear
// where an end is not enrolled; names are found throughout, also by DNS pods that are enrolled.
func TestUDPBetweenPods(t *testing.T) {
	w := onMesh(t)
	const ns = "udp"
	w.home(t, ns,
		pod{name: "apart1", node: 1, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "none"}},
		pod{name: "apart2", node: 2, args: []string{"serve"}, labels: map[string]string{"raceway.dev/dataplane-mode": "none"}})
	w.takesUDP(t, ns, "client", "server2")
	server, apart := w.host(t, ns, "server2"), w.host(t, ns, "apart2")
	for _, test := range []struct {
		name, from, to string
		clear          bool
	}{
		{"by a pod's address", "client", server, false},
		{"by a service's", "client", "server", false},
		{"to who is not enrolled", "client", apart, true},
		{"from who is not enrolled", "apart1", server, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			// Agents hear of each other's pods a moment after they are published.
			eventually(t, fmt.Sprintf("in clear: %v", test.clear), func() error {
				wire, text := w.wire(t, 2), needle()
				defer wire.Close()
				if _, err := w.exec(t.Context(), ns, test.from, "ask", test.to+":9000", text); err != nil {
					return err
				}
				if clear, _ := seen(t, wire, text); clear != test.clear {
					return fmt.Errorf("in clear: %v", clear)
				}
				return nil
			})
		})
	}
	eventually(t, "both ends of a flow are named", func() error {
		out, err := w.cli(t.Context(), "connections", "-n", ns)
		if err != nil {
			return err
		}
		identities := fmt.Sprintf("cluster.local/ns/%[1]s/sa/client cluster.local/ns/%[1]s/sa/server2", ns)
		for line := range strings.Lines(out) {
			line = strings.Join(strings.Fields(line), " ")
			if strings.Contains(line, "HBONE/UDP") && strings.HasSuffix(line, identities) {
				return nil
			}
		}
		return errors.New(out)
	})
	t.Run("as the first thing", func(t *testing.T) { w.firstDatagrams(t, ns) })
	t.Run("DNS", func(t *testing.T) { w.namesInTunnels(t, ns) })
}

// firstDatagrams starts pods that ask by UDP as the first thing they do.
func (w *world) firstDatagrams(t *testing.T, ns string) {
	t.Helper()
	wire, text := w.wire(t, 2), needle()
	defer wire.Close()
	w.newcomers(t, ns, 10, 5, "2m", "ask", w.host(t, ns, "server2")+":9000", text)
	if clear, _ := seen(t, wire, text); clear {
		t.Error("a datagram of a new pod is in clear")
	}
}

// namesInTunnels enrols the DNS pods while a pod looks up names all the time.
func (w *world) namesInTunnels(t *testing.T, ns string) {
	t.Helper()
	resolve := func() error {
		_, err := w.exec(t.Context(), ns, "client", "resolve", "server."+ns+".svc.cluster.local")
		return err
	}
	label := func(value string) []string {
		return []string{"-n", kubeSystem, "label", "--overwrite", "pod", "-l", "k8s-app=kube-dns", "raceway.dev/dataplane-mode" + value}
	}
	t.Cleanup(func() {
		if _, err := w.Kubectl(t.Context(), label("-")...); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	w.kubectl(t, label("=ambient")...)
	dns := strings.Fields(w.kubectl(t, "-n", kubeSystem, "get", "pod", "-l", "k8s-app=kube-dns", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(dns) == 0 {
		t.Fatal("there is no DNS pod")
	}
	for range 20 {
		if err := resolve(); err != nil {
			t.Fatalf("while the DNS pods are enrolled: %v", err)
		}
	}
	w.takesUDP(t, kubeSystem, dns...)
	eventually(t, "queries go in tunnels", func() error {
		if err := resolve(); err != nil {
			return err
		}
		out, err := w.cli(t.Context(), "connections", "-n", ns, "-o", "wide")
		if err == nil && !slices.ContainsFunc(strings.Split(out, "\n"), func(l string) bool {
			return strings.Contains(l, "HBONE/UDP") && strings.Contains(l, dns[0])
		}) {
			err = errors.New(out)
		}
		return err
	})
	w.kubectl(t, label("-")...)
	for range 20 {
		if err := resolve(); err != nil {
			t.Fatalf("while the DNS pods leave the mesh: %v", err)
		}
	}
}
