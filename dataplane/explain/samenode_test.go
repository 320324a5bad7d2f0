package explain_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/explain"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
)

func TestPathsOfOneNode(t *testing.T) {
	shared := func(affinity bool) func(*cluster) {
		return func(c *cluster) {
			c.Services = append(c.Services, dataplane.Service{
				Name: dataplane.Name{Namespace: "shop", Name: "cron"}, Addrs: []netip.Addr{netip.MustParseAddr("10.96.0.99")},
				Ports: []dataplane.ServicePort{{Port: 80}}, SessionAffinity: affinity,
				Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddr("10.1.1.3"), Node: "n1", Ready: true, Serving: true, Ports: map[string]uint16{"": 80}}},
			})
		}
	}
	for _, test := range []struct {
		name    string
		change  func(*cluster)
		dst     string
		outcome string
		step    string // result and detail of the same-node step; "" for no such step
	}{
		{"by the kernel", nil, "cron:80", admin.OutcomeKernel, "kernel both pods are on node n1"},
		{"a service", shared(false), "10.96.0.99:80", admin.OutcomeKernel, "kernel both pods are on node n1"},
		{"session affinity", shared(true), "10.96.0.99:80", admin.OutcomeTunnel, "tunnel the agent chooses the endpoint"},
		{"STRICT", func(c *cluster) { c.Authentications = append(c.Authentications, strict()) }, "cron:80", admin.OutcomeTunnel, "tunnel PeerAuthentication shop/strict is STRICT"},
		{"another node", nil, "db:3306", admin.OutcomeTunnel, ""},
		{"denied", func(c *cluster) {
			c.Authorizations = append(c.Authorizations, policy(dataplane.ActionDeny, "no", webPrincipal))
		}, "cron:80", admin.OutcomeDenied, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster()
			if test.change != nil {
				test.change(c)
			}
			q := c.question("shop/web", test.dst)
			q.SameNode = &samenode.Judge{
				Node: "n1", Snapshot: q.Snapshot, Rules: authz.NewSet(q.Snapshot).Rules, InForce: func(string) bool { return true },
			}
			why, err := explain.Explain(q)
			if err != nil {
				t.Fatal(err)
			}
			step := ""
			for _, s := range why.Steps {
				if s.Step == "same node" {
					step = fmt.Sprint(s.Result, " ", s.Detail)
				}
			}
			if why.Outcome != test.outcome || !strings.HasPrefix(step, test.step) || test.step == "" && step != "" {
				t.Errorf("%s, %q; want %s, %q", why.Outcome, step, test.outcome, test.step)
			}
		})
	}
}
