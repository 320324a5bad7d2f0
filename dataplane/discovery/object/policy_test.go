package object

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	security "istio.io/api/security/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
)

func authorization(t testing.TB, spec string) dataplane.AuthorizationPolicy {
	t.Helper()
	return contents(t, `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop}, spec: `+spec+`}`).Authorizations[0]
}

func TestAuthorizationPolicy(t *testing.T) {
	prefix := netip.MustParsePrefix
	got := contents(t, `
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata:
  name: db
  namespace: shop
  uid: 6f9d
  creationTimestamp: "2026-11-02T10:00:00Z"
  annotations: {istio.io/dry-run: "true"}
spec:
  selector: {matchLabels: {app: db}}
  action: DENY
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/shop/sa/web]
        notPrincipals: ["*"]
        namespaces: [shop]
        notNamespaces: [lab]
        requestPrincipals: [iss/sub]
        notRequestPrincipals: [iss/other]
        ipBlocks: [10.0.0.0/8, 192.0.2.7, "2001:db8::/32", "::ffff:10.1.0.0/112"]
        notIpBlocks: [10.1.0.0/16]
        remoteIpBlocks: [198.51.100.0/24]
        notRemoteIpBlocks: [198.51.100.1]
    - source: {serviceAccounts: [web, lab/web], notServiceAccounts: [bad]}
    to:
    - operation:
        ports: ["3306", "3307"]
        notPorts: ["22"]
        hosts: [a]
        notHosts: [b]
        methods: [GET]
        notMethods: [PUT]
        paths: [/a]
        notPaths: [/b]
    when:
    - {key: source.ip, values: [10.0.0.0/8], notValues: [10.0.0.1]}
    - {key: "request.headers[x]", values: [v]}
  - {}
status: {conditions: []}
`).Authorizations[0]
	equal(t, "policy", got, dataplane.AuthorizationPolicy{
		Name:      dataplane.Name{Namespace: "shop", Name: "db"},
		UID:       "6f9d",
		CreatedAt: time.Date(2026, 11, 2, 10, 0, 0, 0, time.UTC),
		Action:    dataplane.ActionDeny,
		DryRun:    true,
		Selector:  map[string]string{"app": "db"},
		Rules: []dataplane.PolicyRule{{
			From: []dataplane.PolicySource{{
				Principals: []string{"cluster.local/ns/shop/sa/web"}, NotPrincipals: []string{"*"},
				Namespaces: []string{"shop"}, NotNamespaces: []string{"lab"},
				RequestPrincipals: []string{"iss/sub"}, NotRequestPrincipals: []string{"iss/other"},
				IPBlocks: []netip.Prefix{
					prefix("10.0.0.0/8"), prefix("192.0.2.7/32"), prefix("2001:db8::/32"), prefix("10.1.0.0/16"),
				},
				NotIPBlocks:       []netip.Prefix{prefix("10.1.0.0/16")},
				RemoteIPBlocks:    []netip.Prefix{prefix("198.51.100.0/24")},
				NotRemoteIPBlocks: []netip.Prefix{prefix("198.51.100.1/32")},
			}, {
				ServiceAccounts: []string{"web", "lab/web"}, NotServiceAccounts: []string{"bad"},
			}},
			To: []dataplane.PolicyOperation{{
				Ports: []uint16{3306, 3307}, NotPorts: []uint16{22}, Hosts: []string{"a"}, NotHosts: []string{"b"},
				Methods: []string{"GET"}, NotMethods: []string{"PUT"}, Paths: []string{"/a"}, NotPaths: []string{"/b"},
			}},
			When: []dataplane.PolicyCondition{
				{Key: "source.ip", Values: []string{"10.0.0.0/8"}, NotValues: []string{"10.0.0.1"}},
				{Key: "request.headers[x]", Values: []string{"v"}},
			},
		}, {}},
	})
}

func TestAuthorizationPolicyForms(t *testing.T) {
	cases := []struct {
		name, spec string
		want       dataplane.AuthorizationPolicy
	}{
		{"allow nothing", `{}`, dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow}},
		{"null spec", `null`, dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow}},
		{"allow everything", `{rules: [{}]}`, dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow, Rules: []dataplane.PolicyRule{{}}}},
		{"audit", `{action: AUDIT, rules: [{}]}`, dataplane.AuthorizationPolicy{Action: dataplane.ActionAudit, Rules: []dataplane.PolicyRule{{}}}},
		{
			"custom", `{action: CUSTOM, provider: {name: opa}, rules: [{}]}`,
			dataplane.AuthorizationPolicy{Action: dataplane.ActionCustom, Rules: []dataplane.PolicyRule{{}}},
		},
		{
			"of a waypoint", `{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}]}`,
			dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow, TargetRefs: true},
		},
		{
			"of a waypoint in the older form", `{targetRef: {kind: Service, name: w}}`,
			dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow, TargetRefs: true},
		},
		{"empty targetRefs", `{targetRefs: []}`, dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c.want.Name = dataplane.Name{Namespace: "shop", Name: "p"}
			got := authorization(t, c.spec)
			got.CreatedAt = time.Time{}
			equal(t, "policy", got, c.want)
		})
	}
}

// An invalid policy stays, with its action and selector as far as they can be told, and says
// what is wrong; whoever enforces it fails closed.
func TestInvalidAuthorizationPolicy(t *testing.T) {
	const allow, deny = dataplane.ActionAllow, dataplane.ActionDeny
	db := map[string]string{"app": "db"}
	rule := func(s string) string { return `{action: DENY, selector: {matchLabels: {app: db}}, rules: [` + s + `]}` }
	cases := []struct {
		name, spec, want string
		action           dataplane.PolicyAction
		selector         map[string]string
		targetRefs       bool
	}{
		{"unknown field", `{selector: {matchLabels: {app: db}}, rule: [{}]}`, `unknown field "rule"`, allow, db, false},
		{"unknown field of a source", rule(`{from: [{source: {principal: [a]}}]}`), `unknown field "principal"`, deny, db, false},
		{"unknown field of a rule", rule(`{form: [{source: {principals: [a]}}]}`), `unknown field "form"`, deny, db, false},
		{"unknown field of a waypoint's policy", `{targetRefs: [{kind: Gateway, name: w}], rule: []}`, `unknown field "rule"`, allow, nil, true},
		{"unknown field and half a reference", `{targetRefs: [{name: w}], rule: []}`, `unknown field "rule"`, allow, nil, false},
		{"unknown action", `{action: DENYY, rules: [{}]}`, `"DENYY"`, deny, nil, false},
		{"action in lower case", `{action: deny, rules: [{}]}`, `"deny"`, deny, nil, false},
		{"action by an unknown number", `{action: 9, rules: [{}]}`, "spec.action: 9 is unknown", deny, nil, false},
		{"action of another type", `{action: [DENY], rules: [{}]}`, "action", deny, nil, false},
		{"misspelt selector field selects everything", `{action: DENY, selector: {matchLabel: {app: db}}, rules: [{}]}`, `unknown field "matchLabel"`, deny, nil, false},
		{"selector of another type", `{selector: db}`, `"db"`, allow, nil, false},
		{"wildcard in the selector", `{selector: {matchLabels: {app: "db*"}}}`, "wildcard", allow, map[string]string{"app": "db*"}, false},
		{"selector beside targetRefs", `{selector: {matchLabels: {app: db}}, targetRefs: [{kind: Gateway, name: w}]}`, "only one of", allow, db, false},
		{"not an object", `[]`, "spec", deny, nil, false},
		{"port as a number", rule(`{to: [{operation: {ports: [3306]}}]}`), "3306", deny, db, false},
		{"port out of range", rule(`{to: [{operation: {ports: ["65536"]}}]}`), `spec.rules[0].to[0].operation.ports[0]: "65536" is not a port`, deny, db, false},
		{"port zero", rule(`{to: [{operation: {notPorts: ["0"]}}]}`), `notPorts[0]: "0" is not a port`, deny, db, false},
		{"port range", rule(`{to: [{operation: {ports: ["80-90"]}}]}`), `"80-90" is not a port`, deny, db, false},
		{"bad CIDR", rule(`{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}`), `spec.rules[0].from[0].source.ipBlocks[0]: "10.0.0.0/33" is neither`, deny, db, false},
		{"bad address", rule(`{from: [{source: {notIpBlocks: [10.0.0]}}]}`), `"10.0.0" is not an IP address`, deny, db, false},
		{"half mapped CIDR", rule(`{from: [{source: {ipBlocks: ["::ffff:10.0.0.0/90"]}}]}`), "shorter than 96", deny, db, false},
		{"bad remote block", rule(`{from: [{source: {remoteIpBlocks: [x/8]}}]}`), "remoteIpBlocks[0]", deny, db, false},
		{"empty source", rule(`{from: [{source: {}}]}`), "spec.rules[0].from[0].source: empty", deny, db, false},
		{"no source", rule(`{from: [{}]}`), "spec.rules[0].from[0].source: empty", deny, db, false},
		{"source of empty lists", rule(`{from: [{source: {principals: []}}]}`), "source: empty", deny, db, false},
		{"empty operation", rule(`{to: [{operation: {}}]}`), "spec.rules[0].to[0].operation: empty", deny, db, false},
		{"no operation", rule(`{to: [{}]}`), "operation: empty", deny, db, false},
		{"empty from", rule(`{from: []}`), "spec.rules[0].from: empty", deny, db, false},
		{"from left open", rule(`{from: }`), "spec.rules[0].from: empty", deny, db, false},
		{"empty to", rule(`{to: []}`), "spec.rules[0].to: empty", deny, db, false},
		{"when left open", rule(`{when: }`), "spec.rules[0].when: empty", deny, db, false},
		{"null rule", rule(`null`), "rules[0]", deny, db, false},
		{"empty principal", rule(`{from: [{source: {principals: [""]}}]}`), "principals[0]: empty", deny, db, false},
		{"service account with a wildcard", rule(`{from: [{source: {serviceAccounts: ["shop/*"]}}]}`), `"shop/*" is neither`, deny, db, false},
		{"service account of too many parts", rule(`{from: [{source: {serviceAccounts: [a/b/c]}}]}`), `"a/b/c" is neither`, deny, db, false},
		{"service account without a name", rule(`{from: [{source: {notServiceAccounts: [a/]}}]}`), `"a/" is neither`, deny, db, false},
		{"service account beside namespaces", rule(`{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}`), "cannot stand beside", deny, db, false},
		{"trust domains", rule(`{from: [{source: {trustDomains: [a], principals: [a/*]}}]}`), "trustDomains", deny, db, false},
		{"trust domains that are not", rule(`{from: [{source: {notTrustDomains: [a]}}]}`), "notTrustDomains", deny, db, false},
		{"condition without a key", rule(`{when: [{values: [a]}]}`), "when[0].key: missing", deny, db, false},
		{"condition of an unknown key", rule(`{when: [{key: source.port, values: ["1"]}]}`), `"source.port" is unknown`, deny, db, false},
		{"condition without values", rule(`{when: [{key: source.ip}]}`), "neither values nor notValues", deny, db, false},
		{"condition with a bad CIDR", rule(`{when: [{key: destination.ip, notValues: [x]}]}`), "when[0].notValues[0]", deny, db, false},
		{"condition with a bad port", rule(`{when: [{key: destination.port, values: [http]}]}`), `"http" is not a port`, deny, db, false},
		{"condition with an empty value", rule(`{when: [{key: source.namespace, values: [""]}]}`), "values[0]: empty", deny, db, false},
		{"deny without rules", `{action: DENY}`, "never applies", deny, nil, false},
		{"custom without rules", `{action: CUSTOM, provider: {name: opa}}`, "never applies", dataplane.ActionCustom, nil, false},
		{"custom without a provider", `{action: CUSTOM, rules: [{}]}`, "spec.provider.name: missing", dataplane.ActionCustom, nil, false},
		{"a provider beside allow", `{provider: {name: opa}, rules: [{}]}`, "only action CUSTOM", allow, nil, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := authorization(t, c.spec)
			if !strings.Contains(got.Invalid, c.want) {
				t.Errorf("invalid = %q, want it to say %q", got.Invalid, c.want)
			}
			if strings.ContainsAny(got.Invalid, "\n\u00a0") || strings.Contains(got.Invalid, "proto:") {
				t.Errorf("invalid = %q: it is for people, on one line", got.Invalid)
			}
			equal(t, "action", got.Action, c.action)
			equal(t, "selector", got.Selector, c.selector)
			equal(t, "targetRefs", got.TargetRefs, c.targetRefs)
			if again := authorization(t, c.spec); again.Invalid != got.Invalid {
				t.Errorf("invalid = %q, then %q: it must not change by itself", got.Invalid, again.Invalid)
			}
		})
	}
}

func TestSpecBesideSpec(t *testing.T) {
	for _, kind := range []string{"AuthorizationPolicy", "PeerAuthentication"} {
		o := decode(t, `{apiVersion: security.istio.io/v1, kind: `+kind+`, metadata: {name: p}, spec: {}, rules: []}`)
		if want := `unknown field "rules" beside spec`; o.Invalid() != want {
			t.Errorf("%s: invalid = %q, want %q", kind, o.Invalid(), want)
		}
	}
}

func TestDryRunAnnotation(t *testing.T) {
	for value, want := range map[string]struct{ dryRun, invalid bool }{
		"true": {true, false}, "false": {false, false}, "yes": {false, true}, "": {false, true},
	} {
		p := contents(t, `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, annotations: {istio.io/dry-run: "`+value+`"}}}`).Authorizations[0]
		if p.DryRun != want.dryRun || (p.Invalid != "") != want.invalid {
			t.Errorf("%q: dry run = %v, invalid = %q", value, p.DryRun, p.Invalid)
		}
	}
}

func TestTypedPoliciesReadAsTheirJSON(t *testing.T) {
	meta := &metav1.ObjectMeta{Name: "p", Namespace: "shop"}
	o, err := FromAuthorizationPolicy(meta, &security.AuthorizationPolicy{
		Action: security.AuthorizationPolicy_DENY,
		Rules:  []*security.Rule{{To: []*security.Rule_To{{Operation: &security.Operation{Ports: []string{"80", "x"}}}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := decode(t, `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop},
	  spec: {action: DENY, rules: [{to: [{operation: {ports: ["80", x]}}]}]}}`)
	equal(t, "authorization", o, want)

	o, err = FromPeerAuthentication(meta, &security.PeerAuthentication{
		Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_STRICT},
	})
	if err != nil {
		t.Fatal(err)
	}
	want = decode(t, `{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: {mtls: {mode: STRICT}}}`)
	equal(t, "authentication", o, want)

	if _, err := FromAuthorizationPolicy(&metav1.ObjectMeta{}, nil); err == nil {
		t.Error("a policy without a name was taken")
	}
	if _, err := FromPeerAuthentication(&metav1.ObjectMeta{}, nil); err == nil {
		t.Error("a peer authentication without a name was taken")
	}
}

func TestPeerAuthentication(t *testing.T) {
	db := map[string]string{"app": "db"}
	cases := []struct {
		name, spec, invalid string
		want                dataplane.PeerAuthentication
	}{
		{"inherits", `{}`, "", dataplane.PeerAuthentication{}},
		{"unset", `{mtls: {mode: UNSET}}`, "", dataplane.PeerAuthentication{}},
		{"strict", `{mtls: {mode: STRICT}}`, "", dataplane.PeerAuthentication{Mode: dataplane.MTLSStrict}},
		{"disable", `{mtls: {mode: DISABLE}}`, "", dataplane.PeerAuthentication{Mode: dataplane.MTLSDisable}},
		{
			"ports", `{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}, portLevelMtls: {3306: {mode: PERMISSIVE}, 22: {}}}`, "",
			dataplane.PeerAuthentication{
				Selector: db, Mode: dataplane.MTLSStrict,
				PortModes: map[uint16]dataplane.MTLSMode{3306: dataplane.MTLSPermissive, 22: dataplane.MTLSUnset},
			},
		},
		{"unknown field keeps the selector", `{selector: {matchLabels: {app: db}}, mtsl: {}}`, `unknown field "mtsl"`, dataplane.PeerAuthentication{Selector: db}},
		{"unknown mode", `{mtls: {mode: STRIKT}}`, `"STRIKT"`, dataplane.PeerAuthentication{}},
		{"mode by an unknown number", `{mtls: {mode: 7}}`, "spec.mtls.mode: 7", dataplane.PeerAuthentication{Mode: dataplane.MTLSStrict}},
		{
			"port out of range", `{selector: {matchLabels: {app: db}}, portLevelMtls: {70000: {mode: STRICT}}}`, "70000 is not a port",
			dataplane.PeerAuthentication{Selector: db},
		},
		{"port that is no number", `{selector: {matchLabels: {app: db}}, portLevelMtls: {http: {mode: STRICT}}}`, "http", dataplane.PeerAuthentication{Selector: db}},
		{
			"ports without a selector", `{portLevelMtls: {80: {mode: STRICT}}}`, "needs a selector",
			dataplane.PeerAuthentication{PortModes: map[uint16]dataplane.MTLSMode{80: dataplane.MTLSStrict}},
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := contents(t, `{apiVersion: security.istio.io/v1beta1, kind: PeerAuthentication,
			  metadata: {name: p, namespace: shop, creationTimestamp: "2026-11-02T10:00:00Z"}, spec: `+c.spec+`}`).Authentications[0]
			if (c.invalid == "") != (got.Invalid == "") || !strings.Contains(got.Invalid, c.invalid) {
				t.Errorf("invalid = %q, want %q", got.Invalid, c.invalid)
			}
			c.want.Invalid = got.Invalid
			c.want.Name = dataplane.Name{Namespace: "shop", Name: "p"}
			c.want.CreatedAt = time.Date(2026, 11, 2, 10, 0, 0, 0, time.UTC)
			equal(t, "policy", got, c.want)
		})
	}
}
