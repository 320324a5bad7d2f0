package e2e

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// authorization is an AuthorizationPolicy of namespace "shop" for pod db about the service
// account of one client.
func authorization(name, action, account string, annotations ...string) string {
	return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  namespace: shop
  name: %s
  annotations: {%s}
spec:
  selector: {matchLabels: {app: db}}
  action: %s
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/%s"]}}]
`, name, strings.Join(annotations, ", "), action, account)
}

const dryRun = `istio.io/dry-run: "true"`

// policies is a shop whose pod db is protected.
type policies struct{ *shop }

func newPolicies(t *testing.T, opts lab.Options) *policies {
	p := &policies{newShop(t, opts)}
	serve(t, p.db, portEcho, echo)
	return p
}

// decisions counts what a policy decided on the server's node.
func (p *policies) decisions(policy, outcome string, dryRun bool) float64 {
	return p.scrape(2).sum("raceway_policy_decisions_total",
		"policy", policy, "policy_namespace", "shop", "outcome", outcome, "dry_run", fmt.Sprint(dryRun))
}

// awaitPolicy waits until the server's agent has the policy, or until it has it no more.
func (p *policies) awaitPolicy(name string, there bool) {
	p.t.Helper()
	client := p.client(2)
	eventually(p.t, fmt.Sprintf("policy %s known: %v", name, there), func() error {
		rows, err := client.Policies(p.t.Context())
		if err != nil {
			return err
		}
		known := false
		for _, row := range rows {
			known = known || row.Name == name
		}
		if known != there {
			return fmt.Errorf("the agent has %+v", rows)
		}
		return nil
	})
}

// mayAsk and mayNot try a new connection to db.
func (p *policies) mayAsk(from *lab.Pod) {
	p.t.Helper()
	if err := ask(p.t.Context(), from, p.db.AddrPort(portEcho), nonce()); err != nil {
		p.t.Errorf("%s to db: %v", from, err)
	}
}

func (p *policies) mayNot(from *lab.Pod) {
	p.t.Helper()
	if err := refused(from, p.db.AddrPort(portEcho)); err != nil {
		p.t.Errorf("%s to db: %v", from, err)
	}
}

// A policy counts in a dry run and does nothing else; in force it cuts what it denies, and
// only that.
func TestPolicyDeniesOneServiceAccount(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newPolicies(t, opts)
		denied, allowed := open(t, p.web, p.db.AddrPort(portEcho)), open(t, p.near, p.db.AddrPort(portEcho))

		p.apply("policy.yaml", authorization("no-web", "DENY", "web", dryRun))
		eventually(t, "the live connection is counted", func() error {
			if n := p.decisions("no-web", "deny", true); n != 1 {
				return fmt.Errorf("%v would be denied", n)
			}
			return nil
		})
		p.mayAsk(p.web)
		if n := p.decisions("no-web", "deny", true); n != 2 {
			t.Errorf("%v were counted as denied in a dry run, want 2", n)
		}
		for _, s := range []steady{denied, allowed} {
			if err := s.use(); err != nil {
				t.Error("in a dry run:", err)
			}
		}

		p.apply("policy.yaml", authorization("no-web", "DENY", "web"))
		if err := resetOf(denied.TCPConn); err != nil {
			t.Error("the connection that is denied now:", err)
		}
		p.mayNot(p.web)
		p.mayAsk(p.near)
		if err := allowed.use(); err != nil {
			t.Error("the connection that is allowed:", err)
		}
		eventually(t, "two denials are counted", func() error {
			failed := p.scrape(2).sum("istio_tcp_connections_failed_total", "response_flags", "DENY", "source_workload", "web", "reporter", "destination")
			if n := p.decisions("no-web", "deny", false); n != 2 || failed != 1 {
				return fmt.Errorf("%v by the policy, %v failed connections", n, failed)
			}
			return nil
		})
		p.wantDenial("web", "shop/no-web rule 0")

		if err := p.DeleteFile("policy.yaml"); err != nil {
			t.Fatal(err)
		}
		p.awaitPolicy("no-web", false)
		p.mayAsk(p.web)
		lintMetrics(t, p.cluster)
	})
}

// wantDenial wants that flow records and the log of the server's node name what denied the
// last connection of a client.
func (p *policies) wantDenial(client string, what string) {
	p.t.Helper()
	p.flow(2, "a denial by "+what, func(f admin.Flow) bool {
		return f.Event == admin.FlowDenied && f.Source.Workload == client && f.Flags == "DENY" && strings.Contains(f.Cause, what)
	})
	logged(p.t, p.agent(2), "src.workload="+client, "direction=inbound", what)
}

// lintMetrics lets Prometheus judge what the agents say.
func lintMetrics(t *testing.T, c *cluster) {
	t.Helper()
	for node := range c.Nodes() {
		text, err := c.agent(node + 1).Metrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		problems, err := promlint.New(strings.NewReader(text)).Lint()
		if err != nil {
			t.Error("the metrics do not parse:", err)
		}
		for _, problem := range problems {
			t.Errorf("metric %s: %s", problem.Metric, problem.Text)
		}
		promtool, err := exec.LookPath("promtool")
		if err != nil {
			continue // the same rules were applied above
		}
		check := exec.CommandContext(t.Context(), promtool, "check", "metrics")
		check.Stdin = strings.NewReader(text)
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("promtool check metrics: %v: %s", err, bytes.TrimSpace(out))
		}
	}
}

func TestPolicyAllowsOneServiceAccount(t *testing.T) {
	p := newPolicies(t, lab.Options{})
	denied, allowed := open(t, p.near, p.db.AddrPort(portEcho)), open(t, p.web, p.db.AddrPort(portEcho))
	p.apply("policy.yaml", authorization("only-web", "ALLOW", "web"))
	if err := resetOf(denied.TCPConn); err != nil {
		t.Error("the connection that nothing allows now:", err)
	}
	p.mayNot(p.near)
	p.mayNot(p.plain) // has no identity at all
	p.mayAsk(p.web)
	if err := allowed.use(); err != nil {
		t.Error("the connection that is allowed:", err)
	}
	p.wantDenial("near", "only-web")
}

// STRICT takes tunnels alone.
func TestStrictRefusesPlaintext(t *testing.T) {
	eachVariant(t, func(t *testing.T, v variant) {
		p := &policies{newShop(t, v.opts, v.args...)}
		serve(t, p.db, portEcho, echo)
		plain, tunnelled := open(t, p.plain, p.db.AddrPort(portEcho)), open(t, p.web, p.db.AddrPort(portEcho))
		for _, s := range []steady{plain, tunnelled} {
			if err := s.use(); err != nil {
				t.Error("before the policy:", err)
			}
		}
		p.apply("strict.yaml", `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: shop, name: default}
spec: {mtls: {mode: STRICT}}
`)
		if err := resetOf(plain.TCPConn); err != nil {
			t.Error("the connection in clear:", err)
		}
		p.mayNot(p.plain)
		p.mayAsk(p.web)
		if err := tunnelled.use(); err != nil {
			t.Error("the tunnelled connection:", err)
		}
		p.wantDenial("plain", "shop/default")
	})
}

// What cannot be read changes nothing, and is named; what can be read and not enforced
// denies.
func TestBrokenPoliciesFailClosed(t *testing.T) {
	p := newPolicies(t, lab.Options{})
	p.apply("policy.yaml", authorization("no-web", "DENY", "web"))
	p.awaitPolicy("no-web", true)
	p.mayNot(p.web)

	p.apply("policy.yaml", strings.Replace(authorization("no-web", "DENY", "near"), "spec:", "spec: [", 1))
	client := p.client(2)
	eventually(t, "the broken file is reported", func() error {
		findings, err := client.Check(t.Context())
		if err != nil {
			return err
		}
		for _, f := range findings {
			if !f.OK && strings.Contains(f.Detail, "policy.yaml:8") {
				return nil
			}
		}
		return fmt.Errorf("the findings are %+v", findings)
	})
	p.mayNot(p.web)
	p.mayAsk(p.near)

	// A DENY that says something which nobody can read as a rule.
	p.apply("policy.yaml", strings.Replace(authorization("no-web", "DENY", "web"), "principals:", "principles:", 1))
	eventually(t, "the policy is reported as not enforceable", func() error {
		rows, err := client.Policies(t.Context())
		if err == nil && (len(rows) != 1 || len(rows[0].Issues) == 0) {
			err = fmt.Errorf("the policies are %+v", rows)
		}
		return err
	})
	p.mayNot(p.web)
	p.mayNot(p.near)
	p.mayNot(p.plain)
	p.wantDenial("near", "shop/no-web")

	p.apply("policy.yaml", authorization("no-web", "DENY", "web"))
	eventually(t, "the repaired policy is in force", func() error {
		return ask(t.Context(), p.near, p.db.AddrPort(portEcho), nonce())
	})
	p.mayNot(p.web)
}
