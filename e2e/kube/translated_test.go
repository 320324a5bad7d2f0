package kube

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// TestConnectionsByTheKernelSurviveOlderTranslations connects from one port to a service before its
// capture, where kube-proxy leads it to the one endpoint, and after it, where the kernel leads it there:
// to NAT the second connection looks like the first.
func TestConnectionsByTheKernelSurviveOlderTranslations(t *testing.T) {
	w := onMesh(t)
	const ns, port = "translated", 24999 // none that anybody is given
	w.namespace(t, ns)
	w.apply(t, fmt.Sprintf(serverService, ns))
	w.run(t, ns, server(1), pod{name: "client", node: 1, args: []string{"serve"}})
	eventually(t, "the service answers", func() error {
		_, err := w.exec(t.Context(), ns, "client", "echo", "server:9000", "is it there")
		return err
	})
	from := []string{"echo", "-from", fmt.Sprint(port), "server:9000"}
	w.must(t, ns, "client", append(from, "in clear")...)

	w.kubectl(t, "label", "namespace", ns, enrolled)
	w.captured(t, ns, true, "server1", "client")
	// byKernel tells whether the node's agent knows of a connection of the client's by the kernel.
	byKernel := func(which func(admin.Flow) bool) error {
		out, err := w.cli(t.Context(), "flows", "-n", ns, "-o", "json")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			var f admin.Flow
			if err := json.Unmarshal([]byte(line), &f); err != nil {
				return fmt.Errorf("%q: %w", line, err)
			}
			if f.Protocol == dataplane.ProtocolKernel && f.Source.Workload == "client" && which(f) {
				return nil
			}
		}
		return fmt.Errorf("it is not among these:\n%s", out)
	}
	eventually(t, "connections go by the kernel", func() error {
		if _, err := w.exec(t.Context(), ns, "client", "echo", "server:9000", "from any port"); err != nil {
			return err
		}
		return byKernel(func(admin.Flow) bool { return true })
	})
	w.must(t, ns, "client", append(from, "by the kernel")...)
	eventually(t, "the one from the same port did", func() error {
		return byKernel(func(f admin.Flow) bool { return f.Source.Addr.Port() == port && f.Sent > 0 })
	})
}
