package authz

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// dice makes policies and requests out of the fuzzer's bytes, from few enough values that
// they often meet.
type dice struct{ data []byte }

func (d *dice) roll(n int) int {
	if len(d.data) == 0 {
		return 0
	}
	v := int(d.data[0])
	d.data = d.data[1:]
	return v % n
}

func pickSome[T any](d *dice, from ...T) []T {
	var some []T
	for range d.roll(3) {
		some = append(some, from[d.roll(len(from))])
	}
	return some
}

func (d *dice) principals() []string {
	return pickSome(d, "*", "cluster.local/*", "*/sa/web", "cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/jobs/sa/cron", "other.example/ns/shop/sa/web", "web", "cluster.local/ns/*/sa/web", "spiffe://*")
}

func (d *dice) namespaces() []string { return pickSome(d, "shop", "jobs", "*", "sh*", "*s") }

func (d *dice) accounts() []string { return pickSome(d, "web", "shop/web", "jobs/cron", "cron") }

func (d *dice) blocks() []netip.Prefix {
	return pickSome(d, prefixes("10.0.0.0/24", "10.0.0.1/32", "fd00::/64", "0.0.0.0/0", "::/0")...)
}

func (d *dice) ports() []uint16 { return pickSome[uint16](d, 80, 3306, 0) }

func (d *dice) rule() dataplane.PolicyRule {
	var r dataplane.PolicyRule
	for range d.roll(3) {
		s := dataplane.PolicySource{
			Principals: d.principals(), NotPrincipals: d.principals(), Namespaces: d.namespaces(), NotNamespaces: d.namespaces(),
			ServiceAccounts: d.accounts(), NotServiceAccounts: d.accounts(), IPBlocks: d.blocks(), NotIPBlocks: d.blocks(),
		}
		if d.roll(8) == 7 {
			s.RequestPrincipals = []string{"*"}
		}
		r.From = append(r.From, s)
	}
	for range d.roll(3) {
		o := dataplane.PolicyOperation{Ports: d.ports(), NotPorts: d.ports()}
		if d.roll(8) == 7 {
			o.NotMethods = []string{"GET"}
		}
		r.To = append(r.To, o)
	}
	for range d.roll(3) {
		c := dataplane.PolicyCondition{Key: "request.headers[x]", Values: []string{"y"}}
		switch d.roll(7) {
		case 1:
			c = dataplane.PolicyCondition{Key: "source.principal", Values: append(d.principals(), "*"), NotValues: d.principals()}
		case 2:
			c = dataplane.PolicyCondition{Key: "source.namespace", Values: append(d.namespaces(), "shop"), NotValues: d.namespaces()}
		case 3:
			c = dataplane.PolicyCondition{Key: "source.serviceAccount", Values: append(d.accounts(), "web"), NotValues: d.accounts()}
		case 4:
			c = dataplane.PolicyCondition{Key: "source.ip", Values: append(texts(d.blocks()), "10.0.0.1"), NotValues: texts(d.blocks())}
		case 5:
			c = dataplane.PolicyCondition{Key: "destination.ip", Values: append(texts(d.blocks()), "10.0.0.9"), NotValues: texts(d.blocks())}
		case 6:
			c = dataplane.PolicyCondition{Key: "destination.port", Values: []string{"3306"}, NotValues: pickSome(d, "80", "3306")}
		}
		r.When = append(r.When, c)
	}
	return r
}

func (d *dice) policy(i int) dataplane.AuthorizationPolicy {
	p := dataplane.AuthorizationPolicy{
		Name:   named([]string{"shop", rootNamespace, "jobs"}[d.roll(3)], fmt.Sprintf("p%d", i)),
		Action: []dataplane.PolicyAction{dataplane.ActionAllow, dataplane.ActionDeny, dataplane.ActionCustom, dataplane.ActionAudit}[d.roll(4)],
	}
	switch d.roll(12) {
	case 1:
		p.DryRun = true
	case 2:
		p.TargetRefs = true
	case 3:
		p.Invalid = "bad"
	case 4:
		p.Selector = map[string]string{"app": "db"}
	case 5:
		p.Selector = map[string]string{"app": "web"}
	}
	for range d.roll(4) {
		p.Rules = append(p.Rules, d.rule())
	}
	return p
}

func (d *dice) request() Request {
	return Request{
		Peer: []spiffe.ID{nobody, web, cron, foreign}[d.roll(4)],
		Source: []netip.Addr{
			netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.1"), netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00::1"),
		}[d.roll(4)],
		Destination: netip.AddrPortFrom([]netip.Addr{
			netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9"), netip.MustParseAddr("::ffff:10.0.0.9"),
		}[d.roll(3)], []uint16{3306, 80, 81}[d.roll(3)]),
	}
}

// FuzzEvaluate holds Evaluate against the reference, and against what must be true of any
// set of policies: one more DENY never allows more, one more rule in an ALLOW never allows
// less, a dry run changes nothing, STRICT refuses every peer without identity and only those.
func FuzzEvaluate(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{2, 0, 0, 0, 1, 1, 1, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{3, 0, 1, 0, 2, 2, 2, 4, 5, 1, 0, 2, 1, 1, 0, 0, 3, 2, 1, 7, 2, 1, 1, 4, 4, 4, 2, 1, 1, 2, 3, 5, 6})
	f.Fuzz(expectSound)
}

func TestRandomPoliciesAreSound(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		data := make([]byte, 300)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		expectSound(t, data)
	}
}

func expectSound(t *testing.T, data []byte) {
	t.Helper()
	d := &dice{data: data}
	q := d.request()
	extra := d.policy(99)
	var policies []dataplane.AuthorizationPolicy
	for i := range d.roll(5) {
		policies = append(policies, d.policy(i))
	}
	w := db()
	v := compiled(policies).Evaluate(q)
	if want := referenceAllows(policies, &w, q); v.Allowed != want {
		t.Fatalf("%+v, the reference says %v, of %+v in %+v", v, want, q, policies)
	}
	if v.Reason == "" {
		t.Fatalf("%+v has no reason", v)
	}
	with := func(p dataplane.AuthorizationPolicy) Verdict {
		return compiled(append(policies[:len(policies):len(policies)], p)).Evaluate(q)
	}
	deny := extra
	deny.Action, deny.DryRun = dataplane.ActionDeny, false
	if with(deny).Allowed && !v.Allowed {
		t.Fatalf("adding the DENY %+v allows %+v", deny, q)
	}
	allow := extra
	allow.Action, allow.DryRun = dataplane.ActionAllow, false
	wider := allow
	wider.Rules = append(allow.Rules[:len(allow.Rules):len(allow.Rules)], dataplane.PolicyRule{})
	if with(allow).Allowed && !with(wider).Allowed {
		t.Fatalf("adding a rule to the ALLOW %+v denies %+v", allow, q)
	}
	dry := extra
	dry.DryRun = true
	if rehearsed := with(dry); rehearsed.Allowed != v.Allowed {
		t.Fatalf("the dry run of %+v changes the verdict on %+v", dry, q)
	} else if v.Allowed && dry.Invalid == "" {
		expectRehearsal(t, rehearsed, dry, with)
	}
	strict := compiled(policies, dataplane.PeerAuthentication{Name: named("shop", "strict"), Mode: dataplane.MTLSStrict}).Evaluate(q)
	if want := v.Allowed && !q.Peer.IsZero(); strict.Allowed != want {
		t.Fatalf("STRICT says %+v of %+v, want allowed: %v", strict, q, want)
	}
}

// expectRehearsal: what a dry run says of an allowed request is what the policy then does.
func expectRehearsal(t *testing.T, rehearsed Verdict, dry dataplane.AuthorizationPolicy, with func(dataplane.AuthorizationPolicy) Verdict) {
	t.Helper()
	wouldDeny := false
	for _, r := range rehearsed.DryRun {
		if r.Policy == dry.Name {
			wouldDeny = r.WouldDeny
		}
	}
	dry.DryRun = false
	if real := with(dry); real.Allowed == wouldDeny {
		t.Fatalf("the dry run of %+v says it would deny: %v, but %+v", dry, wouldDeny, real)
	}
}
