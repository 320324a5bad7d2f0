package authz

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestIssuesSayWhatIsNotEnforcedAsWritten(t *testing.T) {
	type source = dataplane.PolicySource
	type operation = dataplane.PolicyOperation
	l7 := dataplane.PolicyRule{
		From: []source{{
			RemoteIPBlocks: make([]netip.Prefix, 1), NotRemoteIPBlocks: make([]netip.Prefix, 1),
			RequestPrincipals: []string{"x"}, NotRequestPrincipals: []string{"x"},
		}},
		To: []operation{{
			Hosts: []string{"x"}, NotHosts: []string{"x"}, Methods: []string{"x"}, NotMethods: []string{"x"}, Paths: []string{"x"}, NotPaths: []string{"x"},
		}},
		When: []dataplane.PolicyCondition{{Key: "request.headers[x]", Values: []string{"y"}}, {Key: "remote.ip", Values: []string{"10.0.0.1"}}},
	}
	const everyL7 = `remoteIpBlocks, notRemoteIpBlocks, requestPrincipals, notRequestPrincipals, hosts, notHosts, methods, notMethods, paths, notPaths, "request.headers[x]", "remote.ip"`
	cases := []struct {
		name   string
		policy dataplane.AuthorizationPolicy
		want   []string
	}{
		{"nothing", policy1(dataplane.ActionDeny, from(source{Principals: []string{"*"}}), when("source.ip", []string{"10.0.0.1"}, nil)), nil},
		{"L7 in DENY", policy1(dataplane.ActionDeny, dataplane.PolicyRule{}, l7), []string{"rule 1 uses " + everyL7 + ", which L4 does not know: the rule denies as if"}},
		{"L7 in ALLOW", policy1(dataplane.ActionAllow, l7), []string{"rule 0 uses " + everyL7 + ", which L4 does not know: the rule allows nothing"}},
		{"CUSTOM", policy1(dataplane.ActionCustom), []string{"enforced as DENY of what it matches"}},
		{"AUDIT", policy1(dataplane.ActionAudit, l7), []string{"has no effect"}},
		{"unknown action", policy1("LOG"), []string{`"LOG" is unknown`}},
		{"target refs", dataplane.AuthorizationPolicy{TargetRefs: true, Invalid: "bad"}, []string{"targetRefs"}},
		{"invalid DENY", dataplane.AuthorizationPolicy{Action: dataplane.ActionDeny, Invalid: "bad"}, []string{"could not be read (bad): it denies every connection"}},
		{"invalid ALLOW", dataplane.AuthorizationPolicy{Action: dataplane.ActionAllow, Invalid: "bad"}, []string{"could not be read (bad): it allows nothing"}},
		{"invalid dry run", dataplane.AuthorizationPolicy{Action: dataplane.ActionDeny, Invalid: "bad", DryRun: true}, []string{"its dry run is skipped"}},
		{"several faults", policy1(dataplane.ActionDeny, when("destination.port", []string{"a"}, []string{"65536"})), []string{`"a" is no port; destination.port value "65536" is no port): it denies every`}},
		{"principal that is none", policy1(dataplane.ActionDeny, from(source{Principals: []string{"web", "td/ns/*/sa/web"}})), []string{`principal "web" is no`, `principal "td/ns/*/sa/web" is no`}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) { expectIssues(t, Issues(&tc.policy), tc.want) })
	}
}

func TestAuthenticationIssues(t *testing.T) {
	s := dataplane.NewSnapshot(dataplane.Contents{RootNamespace: rootNamespace})
	selector := map[string]string{"app": "db"}
	type ports = map[uint16]dataplane.MTLSMode
	cases := []struct {
		name string
		pa   dataplane.PeerAuthentication
		want []string
	}{
		{"nothing", dataplane.PeerAuthentication{Name: named("shop", "p"), Selector: selector, Mode: dataplane.MTLSStrict, PortModes: ports{80: dataplane.MTLSPermissive, 81: dataplane.MTLSUnset}}, nil},
		{"invalid", dataplane.PeerAuthentication{Name: named("shop", "p"), Invalid: "bad"}, []string{"could not be read (bad): it counts as STRICT"}},
		{"selector in the root namespace", dataplane.PeerAuthentication{Name: named(rootNamespace, "p"), Selector: selector}, []string{"selects nothing"}},
		{"ports without selector", dataplane.PeerAuthentication{Name: named("shop", "p"), PortModes: ports{80: dataplane.MTLSStrict}}, []string{"portLevelMtls without a selector"}},
		{"DISABLE, once", dataplane.PeerAuthentication{Name: named("shop", "p"), Selector: selector, Mode: dataplane.MTLSDisable, PortModes: ports{80: dataplane.MTLSDisable}}, []string{"DISABLE is PERMISSIVE here"}},
		{"unknown mode", dataplane.PeerAuthentication{Name: named("shop", "p"), Mode: "strict"}, []string{`"strict" is unknown and counts as STRICT`}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) { expectIssues(t, AuthenticationIssues(s, &tc.pa), tc.want) })
	}
}

func expectIssues(t *testing.T, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%q, want %q", got, want)
	}
	for i := range want {
		if !strings.Contains(got[i], want[i]) {
			t.Errorf("%q, want …%s…", got[i], want[i])
		}
	}
}
