package authz

import (
	"fmt"
	"testing"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

func clientID(i int) spiffe.ID {
	return spiffe.ID{TrustDomain: td, Namespace: fmt.Sprintf("ns-%d", i%100), ServiceAccount: fmt.Sprintf("client-%d", i)}
}

// manyRules is one ALLOW policy with a rule for each of n clients.
func manyRules(n int, rule func(i int) dataplane.PolicyRule) []dataplane.AuthorizationPolicy {
	p := policy1(dataplane.ActionAllow)
	for i := range n {
		p.Rules = append(p.Rules, rule(i))
	}
	return []dataplane.AuthorizationPolicy{p}
}

func byPrincipal(i int) dataplane.PolicyRule {
	return from(dataplane.PolicySource{Principals: []string{clientID(i).Principal()}})
}

func byPrefix(i int) dataplane.PolicyRule {
	return from(dataplane.PolicySource{Principals: []string{clientID(i).Principal() + "*"}})
}

func TestAllowingIsFreeOfAllocations(t *testing.T) {
	const clients = 100
	cases := []struct {
		name     string
		policies []dataplane.AuthorizationPolicy
	}{
		{"no policy", nil},
		{"exact principals", manyRules(clients, byPrincipal)},
		{"prefixes", manyRules(clients, byPrefix)},
		{"everything", manyRules(1, func(int) dataplane.PolicyRule {
			return dataplane.PolicyRule{
				From: []dataplane.PolicySource{{Principals: []string{"*-99"}, Namespaces: []string{"ns-*"}, NotServiceAccounts: []string{"web"}, IPBlocks: prefixes("10.0.0.0/8")}},
				To:   []dataplane.PolicyOperation{{Ports: []uint16{3306}}},
				When: []dataplane.PolicyCondition{{Key: "destination.ip", Values: []string{"10.0.0.9"}}},
			}
		})},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			rules, q := compiled(tc.policies), request(clientID(clients-1))
			if v := rules.Evaluate(q); !v.Allowed {
				t.Fatal(v.Reason)
			}
			if n := testing.AllocsPerRun(100, func() { rules.Evaluate(q) }); n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

func BenchmarkEvaluate10000(b *testing.B) {
	const n = 10_000
	principals := func(int) dataplane.PolicyRule {
		var s dataplane.PolicySource
		for i := range n {
			s.Principals = append(s.Principals, clientID(i).Principal())
		}
		return from(s)
	}
	for _, bc := range []struct {
		name     string
		policies []dataplane.AuthorizationPolicy
	}{
		{"rules-by-principal", manyRules(n, byPrincipal)},
		{"rules-by-prefix", manyRules(n, byPrefix)},
		{"principals-of-one-rule", manyRules(1, principals)},
	} {
		b.Run(bc.name, func(b *testing.B) {
			rules, q := compiled(bc.policies), request(clientID(n-1))
			b.ReportAllocs()
			for b.Loop() {
				if !rules.Evaluate(q).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
}

func BenchmarkCompile10000(b *testing.B) {
	policies := manyRules(10_000, byPrincipal)
	b.ReportAllocs()
	for b.Loop() {
		compiled(policies)
	}
}
