package docs

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestAlertsAreThoseOfThePage(t *testing.T) {
	rules, err := os.ReadFile("../daemonset/chart/monitoring/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, match := range regexp.MustCompile(`(?m)^ *- alert: (\w+)$`).FindAllSubmatch(rules, -1) {
		want = append(want, string(match[1]))
	}
	var got []string
	for _, row := range table(t, "operations.md", "alerts") {
		got = append(got, words(row[0])...)
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("the page has %q, the chart %q", got, want)
	}
}

// What the page says of the tunnels' port has to let tunnels through, in both directions.
func TestNetworkPolicyOfThePageAllowsTunnels(t *testing.T) {
	lines := page(t, "policy.md")
	from := slices.Index(lines, "<!-- networkpolicy -->") + 2
	to := from + slices.Index(lines[from:], "```")
	type port struct {
		Port     int
		Protocol string
	}
	type rule struct {
		From, To []map[string]any
		Ports    []port
	}
	tunnels := []port{{dataplane.PortTunnel, "TCP"}, {dataplane.PortTunnel, "UDP"}}
	var policy struct {
		APIVersion string
		Kind       string
		Metadata   struct{ Name, Namespace string }
		Spec       struct {
			PodSelector     map[string]any
			PolicyTypes     []string
			Ingress, Egress []rule
		}
	}
	if err := yaml.UnmarshalStrict([]byte(strings.Join(lines[from:to], "\n")), &policy); err != nil {
		t.Fatal(err)
	}
	for direction, rules := range map[string][]rule{"Ingress": policy.Spec.Ingress, "Egress": policy.Spec.Egress} {
		if !slices.Contains(policy.Spec.PolicyTypes, direction) {
			t.Errorf("it leaves %s open", direction)
		}
		if !slices.ContainsFunc(rules, func(r rule) bool { return slices.Equal(r.Ports, tunnels) }) {
			t.Errorf("it lets no tunnels through: %s %+v", direction, rules)
		}
	}
}
