package kube

import (
	"fmt"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// TestIPFamilies does what users do first on clusters of other IP families.
func TestIPFamilies(t *testing.T) {
	for _, f := range []cluster.IPFamilies{cluster.IPv6, cluster.DualStack} {
		t.Run(f.String(), func(t *testing.T) {
			if f == cluster.DualStack {
				slow(t)
			}
			before := families
			families = f
			t.Cleanup(func() { families = before })
			for _, test := range []struct {
				name string
				test func(*testing.T)
				slow bool
			}{
				{name: "enrolment", test: TestALabelEnrolsWithoutARestart},
				{name: "every address", test: everyAddress},
				{name: "probes", test: TestStrictServersPassTheirProbes},
				{name: "UDP", test: TestUDPBetweenPods, slow: true},
				{name: "policies", test: TestPoliciesDecideByServiceAccount, slow: true},
				{name: "lives", test: TestPodsLiveAsWithoutTheMesh, slow: true},
				{name: "protocols and tools", test: TestProtocolsAndToolsWorkAsWithoutTheMesh, slow: true},
				{name: "uninstallation", test: TestUninstallationLeavesNothing, slow: true},
			} {
				t.Run(test.name, func(t *testing.T) {
					if test.slow {
						slow(t)
					}
					test.test(t)
				})
			}
		})
	}
}

// everyAddress asks a pod and its service by each address that they have.
func everyAddress(t *testing.T) {
	w := onMesh(t)
	const ns = "addresses"
	w.home(t, ns)
	addresses := strings.Fields(w.kubectl(t, "-n", ns, "get", "pod", "server2", "-o=jsonpath={.status.podIPs[*].ip}"))
	virtual := strings.Fields(w.kubectl(t, "-n", ns, "get", "service", "server", "-o=jsonpath={.spec.clusterIPs[*]}"))
	if want := len(w.Node(2).Addrs); len(addresses) != want || len(virtual) != want {
		t.Fatalf("the pod has %v, its service %v; want %d of each", addresses, virtual, want)
	}
	for _, a := range addresses {
		w.tunnelled(t, ns, "client", inURL(a)+":8080")
	}
	for _, a := range virtual {
		w.tunnelled(t, ns, "client", inURL(a))
	}
	w.kubectl(t, "-n", ns, "patch", "service", "server", "--type=merge", `-p={"spec":{"type":"NodePort","ports":[{"name":"http","port":80,"targetPort":8080,"nodePort":30090}]}}`)
	for _, a := range w.Node(2).Addrs {
		eventually(t, "the node port of "+a.String(), func() error {
			_, err := w.exec(t.Context(), ns, "client", "get", "http://"+inURL(a.String())+":30090/")
			return err
		})
		w.tunnelled(t, ns, "client", fmt.Sprintf("%s:30090", inURL(a.String())))
	}
}
