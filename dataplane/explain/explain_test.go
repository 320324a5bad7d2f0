package explain_test

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/explain"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// The cluster of these tests: two nodes, the pods of shop with a database, one plain
// namespace, and addresses of both families.
//
//	n1: shop/web (deploy/web)   shop/cron   legacy/old   shop/node-exporter (hostNetwork)
//	n2: shop/db-0, shop/db-1 (sts/db)   other/web (deploy/web)   legacy/sink
type cluster struct {
	dataplane.Contents
	state  map[string]dataplane.CaptureState // of n1's pods
	reason map[string]string
	certs  map[spiffe.ID]error
}

func pod(ns, name, node, owner string, addrs ...string) dataplane.Workload {
	w := dataplane.Workload{
		UID: ns + "." + name, Name: dataplane.Name{Namespace: ns, Name: name}, ServiceAccount: strings.TrimRight(name, "-0123456789"),
		Node: node, Phase: dataplane.PodRunning, Ready: true,
	}
	if kind, name, ok := strings.Cut(owner, "/"); ok {
		w.Owner = dataplane.Owner{Kind: kind, Name: name}
	}
	for _, a := range addrs {
		w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
	}
	return w
}

func service(name, vip string, endpoints ...string) dataplane.Service {
	s := dataplane.Service{
		Name: dataplane.Name{Namespace: "shop", Name: name}, Host: name + ".shop.svc.cluster.local",
		Ports: []dataplane.ServicePort{{Name: "mysql", Port: 3306}},
	}
	if vip != "" {
		s.Addrs = []netip.Addr{netip.MustParseAddr(vip)}
	}
	for _, e := range endpoints {
		name, addr, _ := strings.Cut(e, "=")
		name, unready := strings.CutPrefix(name, "!")
		s.Endpoints = append(s.Endpoints, dataplane.Endpoint{
			Addr: netip.MustParseAddr(addr), WorkloadUID: name, Node: "n2", Ready: !unready, Serving: !unready, Ports: map[string]uint16{"mysql": 3306},
		})
	}
	return s
}

func newCluster() *cluster {
	ambient := map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}
	exporter := pod("shop", "node-exporter", "n1", "", "192.168.0.1")
	exporter.HostNetwork = true
	finished := pod("shop", "migrate", "n1", "Job/migrate", "10.1.1.9")
	finished.Phase = dataplane.PodSucceeded
	c := &cluster{
		Contents: dataplane.Contents{
			TrustDomain: "cluster.local", RootNamespace: "istio-system",
			Namespaces: []dataplane.Namespace{{Name: "shop", Labels: ambient}, {Name: "other", Labels: ambient}, {Name: "legacy"}},
			Nodes: []dataplane.Node{
				{Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.1")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}},
				{Name: "n2", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.2")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}},
			},
			Workloads: []dataplane.Workload{
				pod("shop", "web", "n1", "Deployment/web", "10.1.1.2", "fd00:1::2"),
				pod("shop", "cron", "n1", "", "10.1.1.3"),
				pod("legacy", "old", "n1", "Deployment/old", "10.1.1.4"),
				pod("shop", "db-0", "n2", "StatefulSet/db", "10.1.2.3", "fd00:2::3"),
				pod("shop", "db-1", "n2", "StatefulSet/db", "10.1.2.4"),
				pod("other", "web", "n2", "Deployment/web", "10.1.2.5"),
				pod("legacy", "sink", "n2", "", "10.1.2.6"),
				exporter, finished,
			},
			Services: []dataplane.Service{
				service("db", "10.96.0.10", "shop.db-0=10.1.2.3", "shop.db-1=10.1.2.4"),
				service("empty", "10.96.0.11"),
				service("starting", "10.96.0.12", "!shop.db-0=10.1.2.3"),
				service("db-headless", "", "shop.db-0=10.1.2.3", "!shop.db-1=10.1.2.4"),
				service("headless-empty", ""),
			},
			Captured: map[string]bool{"shop.web": true, "shop.cron": true, "shop.db-0": true, "shop.db-1": true, "other.web": true},
		},
		state:  map[string]dataplane.CaptureState{"shop.web": dataplane.CaptureInForce, "shop.cron": dataplane.CaptureInForce},
		reason: map[string]string{},
		certs:  map[spiffe.ID]error{},
	}
	return c
}

func (c *cluster) question(src, dst string) explain.Question {
	return explain.Question{
		Snapshot: dataplane.NewSnapshot(c.Contents), Node: "n1",
		Capture:     func(uid string) (dataplane.CaptureState, string) { return c.state[uid], c.reason[uid] },
		Certificate: func(id spiffe.ID) error { return c.certs[id] },
		Source:      src, Destination: dst,
	}
}

func (c *cluster) setState(uid string, state dataplane.CaptureState, reason string) {
	c.state[uid], c.reason[uid] = state, reason
	c.Captured[uid] = state == dataplane.CaptureInForce
}

func (c *cluster) unlabel(namespace string) {
	for i := range c.Namespaces {
		if c.Namespaces[i].Name == namespace {
			c.Namespaces[i].Labels = nil
		}
	}
	for i := range c.Workloads {
		if c.Workloads[i].Name.Namespace == namespace {
			c.setState(c.Workloads[i].UID, dataplane.CaptureNone, "")
		}
	}
}

func policy(action dataplane.PolicyAction, name string, principals ...string) dataplane.AuthorizationPolicy {
	return dataplane.AuthorizationPolicy{
		Name: dataplane.Name{Namespace: "shop", Name: name}, Action: action,
		Selector: map[string]string{},
		Rules:    []dataplane.PolicyRule{{From: []dataplane.PolicySource{{Principals: principals}}}},
	}
}

const (
	webPrincipal  = "cluster.local/ns/shop/sa/web"
	cronPrincipal = "cluster.local/ns/shop/sa/cron"
)

func strict() dataplane.PeerAuthentication {
	return dataplane.PeerAuthentication{Name: dataplane.Name{Namespace: "shop", Name: "strict"}, Mode: dataplane.MTLSStrict}
}

type answerCase struct {
	name     string
	src, dst string
	change   func(*cluster)
	outcome  string
	policy   string
	next     string
}

func answerCases() []answerCase {
	const label = " raceway.dev/dataplane-mode=ambient"
	return []answerCase{
		{name: "tunnel without policies", src: "shop/web", dst: "db:3306", outcome: "tunnel", next: "raceway connections -n shop"},
		{
			name: "tunnel allowed by rule", src: "shop/web", dst: "db:3306", outcome: "tunnel", policy: "shop/allow-web rule 0", next: "raceway connections -n shop",
			change: func(c *cluster) {
				c.Authorizations = []dataplane.AuthorizationPolicy{policy(dataplane.ActionAllow, "allow-web", webPrincipal)}
			},
		},
		{
			name: "denied by DENY", src: "shop/web", dst: "db:3306", outcome: "denied", policy: "shop/deny-web rule 0", next: "kubectl -n shop get authorizationpolicy deny-web -o yaml",
			change: func(c *cluster) {
				c.Authorizations = []dataplane.AuthorizationPolicy{policy(dataplane.ActionDeny, "deny-web", webPrincipal)}
			},
		},
		{
			name: "denied as no ALLOW matches", src: "shop/web", dst: "db:3306", outcome: "denied", policy: "shop/allow-cron", next: "kubectl -n shop get authorizationpolicy allow-cron -o yaml",
			change: func(c *cluster) {
				c.Authorizations = []dataplane.AuthorizationPolicy{policy(dataplane.ActionAllow, "allow-cron", cronPrincipal)}
			},
		},
		{
			name: "dry run would deny", src: "shop/web", dst: "db:3306", outcome: "tunnel", next: "raceway connections -n shop",
			change: func(c *cluster) {
				p := policy(dataplane.ActionDeny, "deny-web", webPrincipal)
				p.DryRun = true
				c.Authorizations = []dataplane.AuthorizationPolicy{p}
			},
		},
		{
			name: "dry run would allow", src: "shop/web", dst: "db:3306", outcome: "tunnel", next: "raceway connections -n shop",
			change: func(c *cluster) {
				p := policy(dataplane.ActionDeny, "deny-cron", cronPrincipal)
				p.DryRun = true
				c.Authorizations = []dataplane.AuthorizationPolicy{p}
			},
		},
		{
			name: "plain because not labelled", src: "shop/web", dst: "db:3306", outcome: "plain", next: "kubectl label namespace shop" + label,
			change: func(c *cluster) { c.unlabel("shop") },
		},
		{name: "plain source to captured destination", src: "old", dst: "shop/db:3306", outcome: "plain", next: "kubectl label namespace legacy" + label},
		{name: "plain destination", src: "shop/web", dst: "legacy/sink:80", outcome: "plain", next: "kubectl label namespace legacy" + label},
		{
			name: "STRICT refuses plaintext", src: "old", dst: "shop/db:3306", outcome: "denied", policy: "shop/strict", next: "kubectl label namespace legacy" + label,
			change: func(c *cluster) { c.Authentications = []dataplane.PeerAuthentication{strict()} },
		},
		{
			name: "STRICT passes the tunnel", src: "shop/web", dst: "db:3306", outcome: "tunnel", next: "raceway connections -n shop",
			change: func(c *cluster) { c.Authentications = []dataplane.PeerAuthentication{strict()} },
		},
		{
			name: "ALLOW by principal denies plaintext", src: "old", dst: "shop/db:3306", outcome: "denied", policy: "shop/allow-web", next: "kubectl -n shop get authorizationpolicy allow-web -o yaml",
			change: func(c *cluster) {
				c.Authorizations = []dataplane.AuthorizationPolicy{policy(dataplane.ActionAllow, "allow-web", webPrincipal)}
			},
		},
		{
			name: "pod opted out", src: "shop/web", dst: "db:3306", outcome: "plain", next: "kubectl -n shop label pod web --overwrite" + label,
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CaptureNone, "")
				c.Workloads[0].Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeNone}
			},
		},
		{
			name: "pod with a mistyped label", src: "shop/web", dst: "db:3306", outcome: "plain", next: "kubectl -n shop label pod web --overwrite" + label,
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CaptureNone, "")
				c.Workloads[0].Labels = map[string]string{dataplane.ModeLabel: "Ambient"}
			},
		},
		{name: "hostNetwork source", src: "node-exporter", dst: "shop/db:3306", outcome: "plain", next: "kubectl -n shop get pod node-exporter -o yaml"},
		{
			name: "capture failed", src: "shop/web", dst: "db:3306", outcome: "unknown", next: "raceway check",
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CaptureFailed, "attach the guard: no such device")
			},
		},
		{
			name: "capture pending", src: "shop/web", dst: "db:3306", outcome: "unknown", next: "raceway workloads -n shop",
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CapturePending, "waiting for its certificate")
			},
		},
		{
			name: "capture pending but denied either way", src: "shop/web", dst: "db:3306", outcome: "denied", policy: "shop/deny-all rule 0", next: "kubectl -n shop get authorizationpolicy deny-all -o yaml",
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CapturePending, "waiting for its certificate")
				p := policy(dataplane.ActionDeny, "deny-all")
				p.Rules = []dataplane.PolicyRule{{}}
				c.Authorizations = []dataplane.AuthorizationPolicy{p}
			},
		},
		{
			name: "capture failed but plain either way", src: "shop/web", dst: "legacy/sink:80", outcome: "plain", next: "raceway check",
			change: func(c *cluster) {
				c.setState("shop.web", dataplane.CaptureFailed, "attach the guard: no such device")
			},
		},
		{
			name: "source releasing", src: "shop/web", dst: "db:3306", outcome: "plain", next: "kubectl label namespace shop" + label,
			change: func(c *cluster) {
				c.unlabel("shop")
				c.setState("shop.web", dataplane.CaptureReleasing, "")
			},
		},
		{name: "source on another node", src: "other/web", dst: "db.shop:3306", outcome: "tunnel", next: "raceway connections -n other --agent n2"},
		{
			name: "source on another node not published", src: "other/web", dst: "db.shop:3306", outcome: "unknown", next: "raceway workloads -n other --agent n2",
			change: func(c *cluster) { c.Captured["other.web"] = false },
		},
		{
			name: "destination enrolled but not captured", src: "shop/web", dst: "other/web:80", outcome: "plain", next: "raceway workloads -n other --agent n2",
			change: func(c *cluster) { c.Captured["other.web"] = false },
		},
		{name: "service without endpoints", src: "shop/web", dst: "empty:3306", outcome: "refused", next: "kubectl -n shop get endpointslices -l kubernetes.io/service-name=empty"},
		{name: "service without endpoints from a plain source", src: "old", dst: "empty.shop:3306", outcome: "refused", next: "kubectl -n shop get endpointslices -l kubernetes.io/service-name=empty"},
		{name: "service with no ready endpoint", src: "shop/web", dst: "starting:3306", outcome: "refused", next: "kubectl -n shop get endpointslices -l kubernetes.io/service-name=starting"},
		{name: "service without the port", src: "shop/web", dst: "db:3307", outcome: "refused", next: "kubectl -n shop get service db -o yaml"},
		{name: "headless service", src: "shop/web", dst: "db-headless:3306", outcome: "tunnel", next: "raceway connections -n shop"},
		{name: "headless service without endpoints", src: "shop/web", dst: "headless-empty:3306", outcome: "refused", next: "kubectl -n shop get endpointslices -l kubernetes.io/service-name=headless-empty"},
		{
			name: "no certificate", src: "shop/web", dst: "db:3306", outcome: "refused", next: "raceway certificates",
			change: func(c *cluster) {
				c.certs[spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}] = errors.New("the CA answers: not authorized for this identity")
			},
		},
		{name: "outside the cluster", src: "shop/web", dst: "93.184.216.34:443", outcome: "plain", next: "raceway flows -f"},
		{name: "node address", src: "shop/web", dst: "192.168.0.2:10250", outcome: "plain", next: "raceway flows -f"},
		{name: "unknown pod address", src: "shop/web", dst: "10.1.2.200:80", outcome: "refused", next: "kubectl get pods -A -o wide --field-selector status.podIP=10.1.2.200"},
		{name: "data plane port", src: "shop/web", dst: "shop/db-0:15008", outcome: "refused", next: "kubectl get pods -A -o wide --field-selector status.podIP=10.1.2.3"},
		{name: "itself", src: "shop/web", dst: "10.1.1.2:80", outcome: "plain", next: "raceway workloads -n shop"},
		{name: "loopback", src: "shop/web", dst: "127.0.0.1:80", outcome: "plain", next: "raceway workloads -n shop"},
		{name: "IPv6", src: "fd00:1::2", dst: "[fd00:2::3]:3306", outcome: "tunnel", next: "raceway connections -n shop"},
		{name: "v4-mapped", src: "::ffff:10.1.1.2", dst: "[::ffff:10.1.2.3]:3306", outcome: "tunnel", next: "raceway connections -n shop"},
		{
			name: "endpoints differ", src: "shop/web", dst: "db:3306", outcome: "tunnel", next: "raceway connections -n shop",
			change: func(c *cluster) { c.Captured["shop.db-1"] = false },
		},
	}
}

func TestExplanation(t *testing.T) {
	for _, test := range answerCases() {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster()
			if test.change != nil {
				test.change(c)
			}
			why, err := explain.Explain(c.question(test.src, test.dst))
			if err != nil {
				t.Fatal(err)
			}
			if why.Outcome != test.outcome || why.Policy != test.policy || why.Next != test.next {
				t.Errorf("outcome %q, policy %q, next %q; want %q, %q, %q", why.Outcome, why.Policy, why.Next, test.outcome, test.policy, test.next)
			}
			golden(t, strings.ReplaceAll(test.name, " ", "-"), text(why))
		})
	}
}

func text(why admin.Why) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s (%s) to %s (%s): %s\n", why.Source, why.SourceID, why.Destination, why.DestID, why.Outcome)
	for _, s := range why.Steps {
		fmt.Fprintf(&b, "%s: %s: %s\n", s.Step, s.Result, s.Detail)
	}
	fmt.Fprintf(&b, "policy: %q\nnext: %s\n", why.Policy, why.Next)
	return b.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant (%s)\n%s", got, path, want)
	}
}
