package authz

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	rootNamespace = "istio-system"
	td            = "cluster.local"
)

var (
	web     = spiffe.ID{TrustDomain: td, Namespace: "shop", ServiceAccount: "web"}
	cron    = spiffe.ID{TrustDomain: td, Namespace: "jobs", ServiceAccount: "cron"}
	foreign = spiffe.ID{TrustDomain: "other.example", Namespace: "shop", ServiceAccount: "web"}
	nobody  = spiffe.ID{}
)

func named(ns, name string) dataplane.Name { return dataplane.Name{Namespace: ns, Name: name} }

// db is the workload that is asked for.
func db() dataplane.Workload {
	return dataplane.Workload{
		UID: "db-0", Name: named("shop", "db-0"), ServiceAccount: "db", Phase: dataplane.PodRunning, Labels: map[string]string{"app": "db"},
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")},
	}
}

func compiled(policies []dataplane.AuthorizationPolicy, authentications ...dataplane.PeerAuthentication) *Rules {
	s := dataplane.NewSnapshot(dataplane.Contents{
		TrustDomain: td, RootNamespace: rootNamespace, Workloads: []dataplane.Workload{db()},
		Authorizations: policies, Authentications: authentications,
	})
	return Compile(s, s.Workload("db-0"))
}

// request comes from 10.0.0.1 to port 3306 unless told otherwise.
func request(peer spiffe.ID) Request {
	return Request{Peer: peer, Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.9:3306")}
}

func policy1(action dataplane.PolicyAction, rules ...dataplane.PolicyRule) dataplane.AuthorizationPolicy {
	return dataplane.AuthorizationPolicy{Name: named("shop", strings.ToLower(string(action))), Action: action, Rules: rules}
}

func from(sources ...dataplane.PolicySource) dataplane.PolicyRule {
	return dataplane.PolicyRule{From: sources}
}

func to(operations ...dataplane.PolicyOperation) dataplane.PolicyRule {
	return dataplane.PolicyRule{To: operations}
}

func when(key string, values, notValues []string) dataplane.PolicyRule {
	return dataplane.PolicyRule{When: []dataplane.PolicyCondition{{Key: key, Values: values, NotValues: notValues}}}
}

func prefixes(texts ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, t := range texts {
		ps = append(ps, netip.MustParsePrefix(t))
	}
	return ps
}

// TestRuleMatches runs each rule as the only ALLOW (allowed when it matches) and as the
// only DENY (denied when it matches).
func TestRuleMatches(t *testing.T) {
	type source = dataplane.PolicySource
	type operation = dataplane.PolicyOperation
	at := func(src string) Request {
		r := request(web)
		r.Source = netip.MustParseAddr(src)
		return r
	}
	toward := func(dst string) Request {
		r := request(web)
		r.Destination = netip.MustParseAddrPort(dst)
		return r
	}
	cases := []struct {
		name string
		rule dataplane.PolicyRule
		req  Request
		want bool
	}{
		{"empty rule", dataplane.PolicyRule{}, request(nobody), true},
		{"empty source", from(source{}), request(nobody), true},

		{"principal", from(source{Principals: []string{"cluster.local/ns/shop/sa/web"}}), request(web), true},
		{"principal with scheme", from(source{Principals: []string{"spiffe://cluster.local/ns/shop/sa/web"}}), request(web), true},
		{"principal of another account", from(source{Principals: []string{"cluster.local/ns/shop/sa/we"}}), request(web), false},
		{"principal of another trust domain", from(source{Principals: []string{"cluster.local/ns/shop/sa/web"}}), request(foreign), false},
		{"principal without identity", from(source{Principals: []string{"cluster.local/ns/shop/sa/web"}}), request(nobody), false},
		{"one of two principals", from(source{Principals: []string{"x/ns/y/sa/z", "cluster.local/ns/shop/sa/web"}}), request(web), true},
		{"principal prefix", from(source{Principals: []string{"cluster.local/ns/shop/*"}}), request(web), true},
		{"principal prefix with scheme", from(source{Principals: []string{"spiffe://cluster.local/ns/shop/*"}}), request(web), true},
		{"principal prefix that ends inside a part", from(source{Principals: []string{"cluster.local/ns/sho*"}}), request(web), true},
		{"principal prefix of the whole", from(source{Principals: []string{"cluster.local/ns/shop/sa/web*"}}), request(web), true},
		{"principal prefix longer than the whole", from(source{Principals: []string{"cluster.local/ns/shop/sa/webs*"}}), request(web), false},
		{"principal prefix that differs", from(source{Principals: []string{"cluster.local/ns/jobs/*"}}), request(web), false},
		{"principal suffix", from(source{Principals: []string{"*/sa/web"}}), request(web), true},
		{"principal suffix over three parts", from(source{Principals: []string{"*op/sa/web"}}), request(web), true},
		{"principal suffix of the whole", from(source{Principals: []string{"*cluster.local/ns/shop/sa/web"}}), request(web), true},
		{"principal suffix longer than the whole", from(source{Principals: []string{"*xcluster.local/ns/shop/sa/web"}}), request(web), false},
		{"principal suffix that differs", from(source{Principals: []string{"*/ns/jobs/sa/web"}}), request(web), false},
		{"principal present", from(source{Principals: []string{"*"}}), request(web), true},
		{"principal present with scheme", from(source{Principals: []string{"spiffe://*"}}), request(web), true},
		{"principal absent", from(source{Principals: []string{"*"}}), request(nobody), false},
		{"star inside a principal is a letter", from(source{Principals: []string{"cluster.local/ns/*/sa/web"}}), request(web), false},
		{"principals are case-sensitive", from(source{Principals: []string{"cluster.local/ns/Shop/sa/web"}}), request(web), false},
		{"not principal", from(source{NotPrincipals: []string{"cluster.local/ns/shop/sa/web"}}), request(web), false},
		{"not another principal", from(source{NotPrincipals: []string{"cluster.local/ns/shop/sa/web"}}), request(cron), true},
		{"not principal without identity", from(source{NotPrincipals: []string{"cluster.local/ns/shop/sa/web"}}), request(nobody), true},
		{"not any principal without identity", from(source{NotPrincipals: []string{"*"}}), request(nobody), true},
		{"not any principal", from(source{NotPrincipals: []string{"*"}}), request(web), false},
		{"principal but not that one", from(source{Principals: []string{"cluster.local/*"}, NotPrincipals: []string{"*/sa/web"}}), request(web), false},
		{"principal and not another", from(source{Principals: []string{"cluster.local/*"}, NotPrincipals: []string{"*/sa/web"}}), request(cron), true},

		{"namespace", from(source{Namespaces: []string{"shop"}}), request(web), true},
		{"namespace in any trust domain", from(source{Namespaces: []string{"shop"}}), request(foreign), true},
		{"other namespace", from(source{Namespaces: []string{"shop"}}), request(cron), false},
		{"namespace prefix", from(source{Namespaces: []string{"sh*"}}), request(web), true},
		{"namespace suffix", from(source{Namespaces: []string{"*op"}}), request(web), true},
		{"namespace suffix that differs", from(source{Namespaces: []string{"*ops"}}), request(web), false},
		{"namespace without identity", from(source{Namespaces: []string{"*"}}), request(nobody), false},
		{"not namespace", from(source{NotNamespaces: []string{"shop"}}), request(web), false},
		{"not namespace without identity", from(source{NotNamespaces: []string{"shop"}}), request(nobody), true},
		{"namespaces and principals are both asked for", from(source{Namespaces: []string{"shop"}, Principals: []string{"*/sa/cron"}}), request(web), false},

		{"service account in the policy's namespace", from(source{ServiceAccounts: []string{"web"}}), request(web), true},
		{"service account in any trust domain", from(source{ServiceAccounts: []string{"web"}}), request(foreign), true},
		{"service account of another namespace", from(source{ServiceAccounts: []string{"cron"}}), request(cron), false},
		{"qualified service account", from(source{ServiceAccounts: []string{"jobs/cron"}}), request(cron), true},
		{"service account without identity", from(source{ServiceAccounts: []string{"web"}}), request(nobody), false},
		{"not service account", from(source{NotServiceAccounts: []string{"jobs/cron"}}), request(cron), false},
		{"not service account without identity", from(source{NotServiceAccounts: []string{"jobs/cron"}}), request(nobody), true},

		{"v4 block", from(source{IPBlocks: prefixes("10.0.0.0/24")}), at("10.0.0.1"), true},
		{"v4 block elsewhere", from(source{IPBlocks: prefixes("10.0.1.0/24")}), at("10.0.0.1"), false},
		{"v4 block and mapped source", from(source{IPBlocks: prefixes("10.0.0.0/24")}), at("::ffff:10.0.0.1"), true},
		{"mapped block", from(source{IPBlocks: prefixes("::ffff:10.0.0.0/120")}), at("10.0.0.1"), true},
		{"mapped block elsewhere", from(source{IPBlocks: prefixes("::ffff:10.0.1.0/120")}), at("10.0.0.1"), false},
		{"v6 block", from(source{IPBlocks: prefixes("fd00::/64")}), at("fd00::1"), true},
		{"v6 block and zoned source", from(source{IPBlocks: prefixes("fe80::/64")}), at("fe80::1%eth0"), true},
		{"all of v6 is not v4", from(source{IPBlocks: prefixes("::/0")}), at("10.0.0.1"), false},
		{"not block", from(source{NotIPBlocks: prefixes("10.0.0.0/24")}), at("10.0.0.1"), false},
		{"not block elsewhere", from(source{NotIPBlocks: prefixes("fd00::/64")}), at("10.0.0.1"), true},
		{"second source", from(source{IPBlocks: prefixes("10.0.1.0/24")}, source{Namespaces: []string{"shop"}}), request(web), true},
		{"neither source", from(source{IPBlocks: prefixes("10.0.1.0/24")}, source{Namespaces: []string{"jobs"}}), request(web), false},

		{"port", to(operation{Ports: []uint16{80, 3306}}), request(nobody), true},
		{"other port", to(operation{Ports: []uint16{80}}), request(nobody), false},
		{"not port", to(operation{NotPorts: []uint16{3306}}), request(nobody), false},
		{"not another port", to(operation{NotPorts: []uint16{80}}), request(nobody), true},
		{"second operation", to(operation{Ports: []uint16{80}}, operation{Ports: []uint16{3306}}), request(nobody), true},
		{"from but not to", dataplane.PolicyRule{From: []source{{Namespaces: []string{"shop"}}}, To: []operation{{Ports: []uint16{80}}}}, request(web), false},
		{"to but not from", dataplane.PolicyRule{From: []source{{Namespaces: []string{"jobs"}}}, To: []operation{{Ports: []uint16{3306}}}}, request(web), false},

		{"when principal", when("source.principal", []string{"cluster.local/ns/shop/sa/web"}, nil), request(web), true},
		{"when principal prefix, not one", when("source.principal", []string{"cluster.local/*"}, []string{"*/sa/web"}), request(web), false},
		{"when namespace", when("source.namespace", []string{"shop"}, nil), request(cron), false},
		{"when not namespace, no identity", when("source.namespace", nil, []string{"shop"}), request(nobody), true},
		{"when service account", when("source.serviceAccount", []string{"jobs/cron"}, nil), request(cron), true},
		{"when source block", when("source.ip", []string{"10.0.0.0/8"}, nil), request(nobody), true},
		{"when source address", when("source.ip", []string{"10.0.0.2"}, nil), request(nobody), false},
		{"when source v6 address", when("source.ip", []string{"fd00::1"}, nil), at("fd00::1"), true},
		{"when not source", when("source.ip", nil, []string{"10.0.0.1"}), request(nobody), false},
		{"when destination", when("destination.ip", []string{"10.0.0.9"}, nil), request(nobody), true},
		{"when v6 destination", when("destination.ip", []string{"fd00::/16"}, nil), toward("[fd00::9]:3306"), true},
		{"when mapped destination", when("destination.ip", []string{"10.0.0.9"}, nil), toward("[::ffff:10.0.0.9]:3306"), true},
		{"when port", when("destination.port", []string{"3306"}, nil), request(nobody), true},
		{"when not port", when("destination.port", nil, []string{"3306"}), request(nobody), false},
		{"all of when", dataplane.PolicyRule{When: []dataplane.PolicyCondition{
			{Key: "source.namespace", Values: []string{"shop"}}, {Key: "destination.port", Values: []string{"80"}},
		}}, request(web), false},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			allow := compiled([]dataplane.AuthorizationPolicy{policy1(dataplane.ActionAllow, tc.rule)}).Evaluate(tc.req)
			deny := compiled([]dataplane.AuthorizationPolicy{policy1(dataplane.ActionDeny, tc.rule)}).Evaluate(tc.req)
			if allow.Allowed != tc.want || deny.Allowed == tc.want {
				t.Errorf("ALLOW: %v (%s), DENY: %v (%s), want a match: %v", allow.Allowed, allow.Reason, deny.Allowed, deny.Reason, tc.want)
			}
			if allow.Reason == "" || deny.Reason == "" {
				t.Error("a verdict without a reason")
			}
		})
	}
}

func TestPoliciesTogether(t *testing.T) {
	all := dataplane.PolicyRule{}
	shopOnly := from(dataplane.PolicySource{Namespaces: []string{"shop"}})
	jobsOnly := from(dataplane.PolicySource{Namespaces: []string{"jobs"}})
	edit := func(p dataplane.AuthorizationPolicy, change func(*dataplane.AuthorizationPolicy)) dataplane.AuthorizationPolicy {
		change(&p)
		return p
	}
	allow := func(name string, rules ...dataplane.PolicyRule) dataplane.AuthorizationPolicy {
		return dataplane.AuthorizationPolicy{Name: named("shop", name), Action: dataplane.ActionAllow, Rules: rules}
	}
	deny := func(name string, rules ...dataplane.PolicyRule) dataplane.AuthorizationPolicy {
		return dataplane.AuthorizationPolicy{Name: named("shop", name), Action: dataplane.ActionDeny, Rules: rules}
	}
	type policies = []dataplane.AuthorizationPolicy
	cases := []struct {
		name     string
		policies policies
		peer     spiffe.ID
		allowed  bool
		policy   string // that decided; "" for none
		rule     int
		reason   string
	}{
		{"no policy", nil, nobody, true, "", -1, "no ALLOW policy applies to shop/db-0"},
		{"allow matches its second rule", policies{allow("a", jobsOnly, shopOnly)}, web, true, "shop/a", 1, "AuthorizationPolicy shop/a (ALLOW) rule 1"},
		{"no allow matches", policies{allow("b", jobsOnly), allow("a", jobsOnly)}, web, false, "shop/a", -1, "no ALLOW policy matched (shop/a, shop/b) spiffe://cluster.local/ns/shop/sa/web from 10.0.0.1 to 10.0.0.9:3306"},
		{"the first matching rule is named", policies{allow("a", dataplane.PolicyRule{}, shopOnly)}, web, true, "shop/a", 0, ""},
		{"the first matching rule is named, by peer", policies{allow("a", jobsOnly, shopOnly, dataplane.PolicyRule{})}, web, true, "shop/a", 1, ""},
		{"one of two allows matches", policies{allow("a", jobsOnly), allow("b", shopOnly)}, web, true, "shop/b", 0, "shop/b"},
		{"allow without rules allows nothing", policies{allow("a")}, web, false, "shop/a", -1, "no ALLOW policy matched"},
		{"the action is ALLOW by default", policies{edit(allow("a"), func(p *dataplane.AuthorizationPolicy) { p.Action = "" })}, web, false, "shop/a", -1, "no ALLOW"},
		{"deny without rules denies nothing", policies{deny("d")}, web, true, "", -1, "no ALLOW policy applies"},
		{"deny with an empty rule denies all", policies{deny("d", all)}, nobody, false, "shop/d", 0, "AuthorizationPolicy shop/d (DENY) rule 0 denies a peer without identity"},
		{"deny comes before allow", policies{allow("a", all), deny("d", jobsOnly, shopOnly)}, web, false, "shop/d", 1, "rule 1 denies spiffe://cluster.local/ns/shop/sa/web from 10.0.0.1 to 10.0.0.9:3306"},
		{"deny that does not match leaves it to allow", policies{allow("a", all), deny("d", jobsOnly)}, web, true, "shop/a", 0, "shop/a"},
		{"the first denying policy by name is named", policies{deny("e", all), deny("d", all)}, web, false, "shop/d", 0, "shop/d"},

		{"other namespace", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) { p.Name.Namespace = "jobs" })}, web, true, "", -1, ""},
		{"root namespace", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) { p.Name.Namespace = rootNamespace })}, web, false, "istio-system/d", 0, ""},
		{"root namespace with selector", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) {
			p.Name.Namespace, p.Selector = rootNamespace, map[string]string{"app": "db"}
		})}, web, false, "istio-system/d", 0, ""},
		{"root namespace with another's selector", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) {
			p.Name.Namespace, p.Selector = rootNamespace, map[string]string{"app": "web"}
		})}, web, true, "", -1, ""},
		{"selector", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) { p.Selector = map[string]string{"app": "db"} })}, web, false, "shop/d", 0, ""},
		{"another's selector", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) { p.Selector = map[string]string{"app": "web"} })}, web, true, "", -1, ""},
		{"another's ALLOW does not restrict", policies{edit(allow("a"), func(p *dataplane.AuthorizationPolicy) { p.Selector = map[string]string{"app": "web"} })}, web, true, "", -1, ""},
		{"policy of a waypoint", policies{edit(deny("d", all), func(p *dataplane.AuthorizationPolicy) { p.TargetRefs = true })}, web, true, "", -1, ""},
		{"invalid policy of a waypoint", policies{edit(deny("d"), func(p *dataplane.AuthorizationPolicy) { p.TargetRefs, p.Invalid = true, "bad" })}, web, true, "", -1, ""},

		{"L7 widens deny", policies{deny("d", dataplane.PolicyRule{From: shopOnly.From, To: []dataplane.PolicyOperation{{Methods: []string{"GET"}}}})}, web, false, "shop/d", 0, ""},
		{"L7 widens deny by the rest only", policies{deny("d", dataplane.PolicyRule{From: jobsOnly.From, To: []dataplane.PolicyOperation{{Methods: []string{"GET"}}}})}, web, true, "", -1, ""},
		{"L7 condition widens deny", policies{deny("d", when("request.headers[x]", []string{"y"}, nil))}, nobody, false, "shop/d", 0, ""},
		{"remote.ip widens deny", policies{deny("d", when("remote.ip", []string{"192.0.2.1"}, nil))}, nobody, false, "shop/d", 0, ""},
		{"remote blocks widen deny", policies{deny("d", from(dataplane.PolicySource{RemoteIPBlocks: prefixes("192.0.2.0/24")}))}, nobody, false, "shop/d", 0, ""},
		{"L7 removes an allow rule", policies{allow("a", to(dataplane.PolicyOperation{Paths: []string{"/"}}))}, web, false, "shop/a", -1, ""},
		{"L7 removes an allow rule with all its alternatives", policies{allow("a", from(dataplane.PolicySource{RequestPrincipals: []string{"*"}}, dataplane.PolicySource{Namespaces: []string{"shop"}}))}, web, false, "shop/a", -1, ""},
		{"negative L7 removes an allow rule", policies{allow("a", to(dataplane.PolicyOperation{NotHosts: []string{"x"}}))}, web, false, "shop/a", -1, ""},
		{"L7 condition removes an allow rule", policies{allow("a", when("request.auth.claims[x]", nil, []string{"y"}))}, web, false, "shop/a", -1, ""},
		{"L7 leaves the other allow rules", policies{allow("a", to(dataplane.PolicyOperation{Paths: []string{"/"}}), shopOnly)}, web, true, "shop/a", 1, ""},

		{"CUSTOM denies what it matches", policies{edit(deny("c", shopOnly), func(p *dataplane.AuthorizationPolicy) { p.Action = dataplane.ActionCustom })}, web, false, "shop/c", 0, "(CUSTOM)"},
		{"CUSTOM leaves the rest", policies{edit(deny("c", jobsOnly), func(p *dataplane.AuthorizationPolicy) { p.Action = dataplane.ActionCustom })}, web, true, "", -1, ""},
		{"AUDIT has no effect", policies{edit(allow("a", jobsOnly), func(p *dataplane.AuthorizationPolicy) { p.Action = dataplane.ActionAudit })}, web, true, "", -1, ""},
		{"an unknown action denies", policies{edit(allow("a", shopOnly), func(p *dataplane.AuthorizationPolicy) { p.Action = "allow" })}, web, false, "shop/a", 0, ""},

		{"invalid DENY denies all", policies{allow("a", all), edit(deny("d", jobsOnly), func(p *dataplane.AuthorizationPolicy) { p.Invalid = "line 3: no such field." })}, web, false, "shop/d", -1, "because it could not be read (line 3: no such field)"},
		{"invalid DENY spares whom it does not select", policies{edit(deny("d"), func(p *dataplane.AuthorizationPolicy) { p.Invalid, p.Selector = "bad", map[string]string{"app": "web"} })}, web, true, "", -1, ""},
		{"invalid CUSTOM denies all", policies{edit(deny("c"), func(p *dataplane.AuthorizationPolicy) { p.Action, p.Invalid = dataplane.ActionCustom, "bad" })}, web, false, "shop/c", -1, "bad"},
		{"invalid ALLOW allows nothing", policies{edit(allow("a", all), func(p *dataplane.AuthorizationPolicy) { p.Invalid = "bad" })}, web, false, "shop/a", -1, ""},
		{"invalid ALLOW leaves it to the others", policies{edit(allow("a", all), func(p *dataplane.AuthorizationPolicy) { p.Invalid = "bad" }), allow("b", shopOnly)}, web, true, "shop/b", 0, ""},
		{"DENY with a port that is none denies all", policies{deny("d", when("destination.port", []string{"http"}, nil))}, web, false, "shop/d", -1, `"http" is no port`},
		{"DENY with an address that is none denies all", policies{deny("d", when("source.ip", []string{"*"}, nil))}, web, false, "shop/d", -1, "neither an IP address"},
		{"DENY with a wildcard service account denies all", policies{deny("d", from(dataplane.PolicySource{ServiceAccounts: []string{"*"}}))}, web, false, "shop/d", -1, "neither name nor namespace/name"},
		{"DENY with half a service account denies all", policies{deny("d", from(dataplane.PolicySource{ServiceAccounts: []string{"/web"}}))}, web, false, "shop/d", -1, `"/web" is neither name`},
		{"DENY with the other half denies all", policies{deny("d", from(dataplane.PolicySource{ServiceAccounts: []string{"shop/"}}))}, web, false, "shop/d", -1, `"shop/" is neither name`},
		{"DENY with an empty condition denies all", policies{deny("d", when("source.ip", nil, nil))}, web, false, "shop/d", -1, "has no values"},
		{"DENY with a block that is none denies all", policies{deny("d", from(dataplane.PolicySource{IPBlocks: make([]netip.Prefix, 1)}))}, web, false, "shop/d", -1, "not valid"},
		{"ALLOW with an empty condition allows nothing", policies{allow("a", when("source.ip", nil, nil), shopOnly)}, web, false, "shop/a", -1, ""},
		{"ALLOW with an empty value allows nothing", policies{allow("a", from(dataplane.PolicySource{NotPrincipals: []string{""}}))}, web, false, "shop/a", -1, ""},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			for range 2 { // whatever the order of reading
				v := compiled(tc.policies).Evaluate(request(tc.peer))
				var name string
				if v.Kind == KindAuthorization {
					name = v.Policy.String()
				}
				if v.Allowed != tc.allowed || name != tc.policy || v.Rule != tc.rule || !strings.Contains(v.Reason, tc.reason) {
					t.Errorf("%+v, want allowed %v by %q rule %d (…%s…)", v, tc.allowed, tc.policy, tc.rule, tc.reason)
				}
				slices.Reverse(tc.policies)
			}
		})
	}
}

func TestManyAllowPoliciesAreNamedInShort(t *testing.T) {
	var all []dataplane.AuthorizationPolicy
	for i := range 9 {
		all = append(all, dataplane.AuthorizationPolicy{Name: named("shop", fmt.Sprintf("a%d", i)), Action: dataplane.ActionAllow})
	}
	v := compiled(all).Evaluate(request(web))
	if !strings.Contains(v.Reason, "(shop/a0, shop/a1, shop/a2, shop/a3, shop/a4 and 4 more)") {
		t.Error(v.Reason)
	}
}

func TestDryRunTellsWithoutEffect(t *testing.T) {
	shopOnly := from(dataplane.PolicySource{Namespaces: []string{"shop"}})
	jobsOnly := from(dataplane.PolicySource{Namespaces: []string{"jobs"}})
	dry := func(p dataplane.AuthorizationPolicy) dataplane.AuthorizationPolicy {
		p.Name.Name, p.DryRun = "dry", true
		return p
	}
	inForce := policy1(dataplane.ActionAllow, shopOnly)
	type policies = []dataplane.AuthorizationPolicy
	cases := []struct {
		name     string
		policies policies
		allowed  bool
		want     []DryRun
	}{
		{"DENY that matches", policies{dry(policy1(dataplane.ActionDeny, jobsOnly, shopOnly))}, true, []DryRun{{named("shop", "dry"), 1, true}}},
		{"DENY that does not", policies{dry(policy1(dataplane.ActionDeny, jobsOnly))}, true, []DryRun{{named("shop", "dry"), -1, false}}},
		{"ALLOW that matches", policies{dry(policy1(dataplane.ActionAllow, shopOnly))}, true, []DryRun{{named("shop", "dry"), 0, false}}},
		{"ALLOW that does not", policies{dry(policy1(dataplane.ActionAllow, jobsOnly))}, true, []DryRun{{named("shop", "dry"), -1, true}}},
		{"ALLOW that does not beside one that does", policies{dry(policy1(dataplane.ActionAllow, jobsOnly)), inForce}, true, []DryRun{{named("shop", "dry"), -1, false}}},
		{"ALLOW that would have allowed", policies{dry(policy1(dataplane.ActionAllow, shopOnly)), policy1(dataplane.ActionAllow, jobsOnly)}, false, []DryRun{{named("shop", "dry"), 0, false}}},
		{"CUSTOM that matches", policies{dry(policy1(dataplane.ActionCustom, shopOnly))}, true, []DryRun{{named("shop", "dry"), 0, true}}},
		{"AUDIT", policies{dry(policy1(dataplane.ActionAudit, shopOnly))}, true, nil},
		{"invalid DENY", policies{dry(dataplane.AuthorizationPolicy{Name: named("shop", "d"), Action: dataplane.ActionDeny, Invalid: "bad"})}, true, nil},
		{"invalid ALLOW", policies{dry(dataplane.AuthorizationPolicy{Name: named("shop", "a"), Action: dataplane.ActionAllow, Invalid: "bad"})}, true, nil},
		{"DENY with a value that is none", policies{dry(policy1(dataplane.ActionDeny, when("destination.port", []string{"x"}, nil)))}, true, nil},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			v := compiled(tc.policies).Evaluate(request(web))
			if v.Allowed != tc.allowed || !slices.Equal(v.DryRun, tc.want) {
				t.Errorf("%+v, want allowed %v, dry run %+v", v, tc.allowed, tc.want)
			}
		})
	}
}

func TestPeerAuthentication(t *testing.T) {
	const strict, permissive, unset = dataplane.MTLSStrict, dataplane.MTLSPermissive, dataplane.MTLSUnset
	selected := map[string]string{"app": "db"}
	type ports = map[uint16]dataplane.MTLSMode
	pa := func(ns, name string, selector map[string]string, mode dataplane.MTLSMode, byPort ports) dataplane.PeerAuthentication {
		return dataplane.PeerAuthentication{Name: named(ns, name), Selector: selector, Mode: mode, PortModes: byPort}
	}
	aged := func(p dataplane.PeerAuthentication, year int) dataplane.PeerAuthentication {
		p.CreatedAt = time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)
		return p
	}
	invalid := func(p dataplane.PeerAuthentication) dataplane.PeerAuthentication {
		p.Invalid = "no such mode"
		return p
	}
	type all = []dataplane.PeerAuthentication
	cases := []struct {
		name string
		all  all
		by   string // who refuses a peer without identity on port 3306; "" when nobody
	}{
		{"none", nil, ""},
		{"mesh", all{pa(rootNamespace, "m", nil, strict, nil)}, "istio-system/m"},
		{"namespace", all{pa("shop", "n", nil, strict, nil)}, "shop/n"},
		{"workload", all{pa("shop", "w", selected, strict, nil)}, "shop/w"},
		{"another namespace", all{pa("jobs", "n", nil, strict, nil)}, ""},
		{"another workload", all{pa("shop", "w", map[string]string{"app": "web"}, strict, nil)}, ""},
		{"namespace overrides mesh", all{pa(rootNamespace, "m", nil, strict, nil), pa("shop", "n", nil, permissive, nil)}, ""},
		{"workload overrides namespace", all{pa("shop", "n", nil, permissive, nil), pa("shop", "w", selected, strict, nil)}, "shop/w"},
		{"DISABLE is PERMISSIVE", all{pa(rootNamespace, "m", nil, strict, nil), pa("shop", "n", nil, dataplane.MTLSDisable, nil)}, ""},
		{"UNSET inherits", all{pa(rootNamespace, "m", nil, strict, nil), pa("shop", "n", nil, unset, nil), pa("shop", "w", selected, "UNSET", nil)}, "istio-system/m"},
		{"port overrides", all{pa("shop", "w", selected, strict, ports{3306: permissive})}, ""},
		{"port demands", all{pa("shop", "w", selected, permissive, ports{3306: strict})}, "shop/w"},
		{"another port", all{pa("shop", "w", selected, permissive, ports{80: strict})}, ""},
		{"port UNSET inherits", all{pa("shop", "n", nil, strict, nil), pa("shop", "w", selected, unset, ports{3306: unset})}, "shop/n"},
		{"port without selector has no effect", all{pa("shop", "n", nil, permissive, ports{3306: strict})}, ""},
		{"selector in the root namespace has no effect", all{pa(rootNamespace, "m", selected, strict, nil)}, ""},
		{"the oldest wins", all{aged(pa("shop", "a", nil, permissive, nil), 2021), aged(pa("shop", "b", nil, strict, nil), 2020)}, "shop/b"},
		{"the first by name wins among equals", all{aged(pa("shop", "b", nil, permissive, nil), 2020), aged(pa("shop", "a", nil, strict, nil), 2020)}, "shop/a"},
		{"the oldest wins for all it says", all{aged(pa("shop", "a", selected, strict, nil), 2021), aged(pa("shop", "b", selected, permissive, nil), 2020)}, ""},
		{"invalid is STRICT", all{invalid(pa("shop", "n", nil, permissive, nil))}, "shop/n"},
		{"invalid is STRICT on every port", all{invalid(pa("shop", "w", selected, permissive, ports{3306: permissive}))}, "shop/w"},
		{"unknown mode is STRICT", all{pa("shop", "n", nil, "strict", nil)}, "shop/n"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			for range 2 {
				rules := compiled([]dataplane.AuthorizationPolicy{policy1(dataplane.ActionAllow, dataplane.PolicyRule{})}, tc.all...)
				v := rules.Evaluate(request(nobody))
				if v.Allowed != (tc.by == "") {
					t.Errorf("%+v, want a refusal by %q", v, tc.by)
				}
				if tc.by != "" && (v.Kind != KindAuthentication || v.Policy.String() != tc.by || !strings.Contains(v.Reason, "PeerAuthentication "+tc.by+" is STRICT")) {
					t.Errorf("%+v, want a refusal by %q", v, tc.by)
				}
				if v := rules.Evaluate(request(web)); !v.Allowed {
					t.Errorf("a peer with an identity: %+v", v)
				}
				slices.Reverse(tc.all)
			}
		})
	}
}

func TestZeroVerdictDenies(t *testing.T) {
	if (Verdict{}).Allowed {
		t.Error("the zero Verdict allows")
	}
}

func TestSetIsSharedBetweenConnections(t *testing.T) {
	other := db()
	other.UID, other.Name.Name, other.Labels = "db-1", "db-1", nil
	deny := policy1(dataplane.ActionDeny, dataplane.PolicyRule{})
	deny.Selector = map[string]string{"app": "db"}
	s := dataplane.NewSnapshot(dataplane.Contents{Workloads: []dataplane.Workload{db(), other}, Authorizations: []dataplane.AuthorizationPolicy{deny}})
	set := NewSet(s)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if set.Rules(s.Workload("db-0")).Evaluate(request(web)).Allowed || !set.Rules(s.Workload("db-1")).Evaluate(request(web)).Allowed {
				t.Error("the selector is not kept apart by workload")
			}
		})
	}
	wg.Wait()
	if first := set.Rules(s.Workload("db-0")); first != set.Rules(s.Workload("db-0")) {
		t.Error("a workload is compiled twice")
	}
}
