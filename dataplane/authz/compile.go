package authz

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// policy is a compiled AuthorizationPolicy.
type policy struct {
	name    dataplane.Name
	source  *dataplane.AuthorizationPolicy
	denies  bool // DENY, CUSTOM, and whatever is not an action; otherwise ALLOW
	invalid bool // it could not be read, and its rules are the strictest it can have meant
	index
	// issues is what of it cannot be enforced as written.
	issues []string
}

// readAction returns whether a denies, and what to say of it. An action that is not Istio's
// counts as DENY: its author wanted a restriction that is not understood here.
func readAction(a dataplane.PolicyAction) (denies bool, issue string) {
	switch a {
	case dataplane.ActionAllow, "":
		return false, ""
	case dataplane.ActionDeny:
		return true, ""
	case dataplane.ActionCustom:
		return true, "action CUSTOM needs an external authorizer, which does not exist at L4: it is enforced as DENY of what it matches"
	case dataplane.ActionAudit:
		return false, "action AUDIT is not carried out at L4 and has no effect"
	}
	return true, fmt.Sprintf("action %q is unknown: it is enforced as DENY", string(a))
}

// compile never fails: what cannot be enforced as written is in the result's issues, and
// enforced as strictly as its author can have meant it.
func compile(p *dataplane.AuthorizationPolicy) *policy {
	denies, issue := readAction(p.Action)
	c := &compiler{policy: &policy{name: p.Name, source: p, denies: denies}}
	if issue != "" {
		c.report("%s", issue)
	}
	if p.Action == dataplane.ActionAudit {
		return c.policy
	}
	if p.Invalid != "" {
		c.unreadable("%s", p.Invalid)
	}
	var rules []*rule
	for i := range p.Rules {
		if r := c.rule(i, &p.Rules[i]); r != nil {
			r.title = title(p, i)
			rules = append(rules, r)
		}
	}
	if len(c.faults) > 0 {
		c.policy.invalid = true
		rules = c.strictest(p)
	}
	c.policy.index = newIndex(rules)
	return c.policy
}

func title(p *dataplane.AuthorizationPolicy, rule int) string {
	return fmt.Sprintf("AuthorizationPolicy %s (%s) rule %d", p.Name, cmp.Or(p.Action, dataplane.ActionAllow), rule)
}

// compiler collects what there is to say about one policy.
type compiler struct {
	policy *policy
	faults []string // why it cannot be read
}

func (c *compiler) report(format string, args ...any) {
	c.policy.issues = append(c.policy.issues, fmt.Sprintf(format, args...))
}

func (c *compiler) unreadable(format string, args ...any) {
	c.faults = append(c.faults, fmt.Sprintf(format, args...))
}

// strictest replaces the rules of a policy that cannot be read.
func (c *compiler) strictest(p *dataplane.AuthorizationPolicy) []*rule {
	cause := strings.Join(c.faults, "; ")
	switch {
	case p.DryRun:
		c.report("the policy could not be read (%s): its dry run is skipped", cause)
		return nil
	case c.policy.denies:
		c.report("the policy could not be read (%s): it denies every connection to the workloads it selects", cause)
		all := &rule{policy: c.policy, index: -1}
		all.title = fmt.Sprintf("AuthorizationPolicy %s (%s)%s", p.Name, p.Action, invalidity(cause))
		return []*rule{all}
	}
	c.report("the policy could not be read (%s): it allows nothing", cause)
	return nil
}

// rule returns nil when the rule can never match.
func (c *compiler) rule(i int, from *dataplane.PolicyRule) *rule {
	r := &rule{policy: c.policy, index: i}
	enforceable := c.judgeL7(i, from)
	if len(from.From) > 0 {
		g := make(group, 0, len(from.From))
		for j := range from.From {
			g = append(g, c.source(&from.From[j]))
		}
		r.groups = append(r.groups, g)
	}
	if len(from.To) > 0 {
		g := make(group, 0, len(from.To))
		for j := range from.To {
			g = append(g, c.operation(&from.To[j]))
		}
		r.groups = append(r.groups, g)
	}
	for j := range from.When {
		r.groups = append(r.groups, group{c.condition(&from.When[j])})
	}
	if !enforceable {
		return nil
	}
	return r
}

// judgeL7 reports the attributes of a rule that L4 does not know, and whether the rule can
// match all the same: without them if it denies, not at all if it allows.
func (c *compiler) judgeL7(i int, r *dataplane.PolicyRule) bool {
	unknown := l7Attributes(r)
	if len(unknown) == 0 {
		return true
	}
	names := strings.Join(unknown, ", ")
	if c.policy.denies {
		c.report("rule %d uses %s, which L4 does not know: the rule denies as if that were not there, so it matches more", i, names)
		return true
	}
	c.report("rule %d uses %s, which L4 does not know: the rule allows nothing", i, names)
	return false
}

// l7Attributes names what of r is not known at L4. The address before proxies
// (remoteIpBlocks, remote.ip) is among it.
func l7Attributes(r *dataplane.PolicyRule) []string {
	var names []string
	note := func(name string, values int) {
		if values > 0 && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for i := range r.From {
		s := &r.From[i]
		note("remoteIpBlocks", len(s.RemoteIPBlocks))
		note("notRemoteIpBlocks", len(s.NotRemoteIPBlocks))
		note("requestPrincipals", len(s.RequestPrincipals))
		note("notRequestPrincipals", len(s.NotRequestPrincipals))
	}
	for i := range r.To {
		o := &r.To[i]
		note("hosts", len(o.Hosts))
		note("notHosts", len(o.NotHosts))
		note("methods", len(o.Methods))
		note("notMethods", len(o.NotMethods))
		note("paths", len(o.Paths))
		note("notPaths", len(o.NotPaths))
	}
	for i := range r.When {
		if _, ok := conditionAttribute(r.When[i].Key); !ok {
			note(strconv.Quote(r.When[i].Key), 1)
		}
	}
	return names
}

func conditionAttribute(key string) (attribute, bool) {
	switch key {
	case "source.principal":
		return sourcePrincipal, true
	case "source.namespace":
		return sourceNamespace, true
	case "source.serviceAccount":
		return sourceServiceAccount, true
	case "source.ip":
		return sourceIP, true
	case "destination.ip":
		return destinationIP, true
	case "destination.port":
		return destinationPort, true
	}
	return 0, false
}

func (c *compiler) source(s *dataplane.PolicySource) alternative {
	var a alternative
	a = c.addPeers(a, sourcePrincipal, s.Principals, s.NotPrincipals)
	a = c.addPeers(a, sourceNamespace, s.Namespaces, s.NotNamespaces)
	a = c.addPeers(a, sourceServiceAccount, s.ServiceAccounts, s.NotServiceAccounts)
	a = c.addPrefixes(a, sourceIP, s.IPBlocks, s.NotIPBlocks)
	return a
}

func (c *compiler) operation(o *dataplane.PolicyOperation) alternative {
	return c.addPorts(nil, o.Ports, o.NotPorts)
}

// condition returns the empty alternative, which always matches, for an attribute that is
// not known; judgeL7 has removed the rule where that would allow too much.
func (c *compiler) condition(w *dataplane.PolicyCondition) alternative {
	a, ok := conditionAttribute(w.Key)
	if !ok {
		return nil
	}
	if len(w.Values) == 0 && len(w.NotValues) == 0 {
		c.unreadable("condition %s has no values", w.Key)
		return nil
	}
	switch a {
	case sourceIP, destinationIP:
		return c.addPrefixes(nil, a, c.parsePrefixes(w.Key, w.Values), c.parsePrefixes(w.Key, w.NotValues))
	case destinationPort:
		return c.addPorts(nil, c.parsePorts(w.Values), c.parsePorts(w.NotValues))
	case sourcePrincipal, sourceNamespace, sourceServiceAccount:
	}
	return c.addPeers(nil, a, w.Values, w.NotValues)
}

func (c *compiler) addPeers(to alternative, a attribute, values, notValues []string) alternative {
	if len(values) > 0 {
		to = append(to, term{attribute: a, peers: c.peerSet(a, values)})
	}
	if len(notValues) > 0 {
		to = append(to, term{attribute: a, peers: c.peerSet(a, notValues), not: true})
	}
	return to
}

func (c *compiler) addPrefixes(to alternative, a attribute, values, notValues []netip.Prefix) alternative {
	if len(values) > 0 {
		to = append(to, term{attribute: a, prefixes: c.prefixes(values)})
	}
	if len(notValues) > 0 {
		to = append(to, term{attribute: a, prefixes: c.prefixes(notValues), not: true})
	}
	return to
}

func (c *compiler) addPorts(to alternative, values, notValues []uint16) alternative {
	if len(values) > 0 {
		to = append(to, term{attribute: destinationPort, ports: values})
	}
	if len(notValues) > 0 {
		to = append(to, term{attribute: destinationPort, ports: notValues, not: true})
	}
	return to
}

func (c *compiler) peerSet(a attribute, values []string) peerSet {
	set := peerSet{exact: make(map[spiffe.ID]struct{}, len(values))}
	for _, v := range values {
		if a == sourceServiceAccount {
			c.addServiceAccount(&set, v)
			continue
		}
		text := v
		if a == sourcePrincipal {
			text = strings.TrimPrefix(v, "spiffe://")
		}
		switch {
		case text == "":
			c.unreadable("%s has an empty value", a)
		case strings.HasPrefix(text, "*"):
			set.patterns = append(set.patterns, pattern{suffix: text[1:]})
		case strings.HasSuffix(text, "*"):
			set.patterns = append(set.patterns, pattern{prefix: text[:len(text)-1]})
		case a == sourceNamespace:
			set.exact[spiffe.ID{Namespace: text}] = struct{}{}
		default:
			c.addPrincipal(&set, text)
		}
	}
	return set
}

// addPrincipal takes a value of another form than an identity's as Istio does: it is
// compared literally and so equals nobody's.
func (c *compiler) addPrincipal(set *peerSet, text string) {
	id, err := spiffe.Parse("spiffe://" + text)
	if err != nil {
		c.report("principal %q is no <trust-domain>/ns/<namespace>/sa/<service-account>, so it matches no peer (a * counts at the start or the end only)", text)
		return
	}
	set.exact[id] = struct{}{}
}

// addServiceAccount reads "namespace/name", or "name" in the policy's own namespace.
// Istio allows no wildcard here.
func (c *compiler) addServiceAccount(set *peerSet, text string) {
	namespace, name, qualified := strings.Cut(text, "/")
	if !qualified {
		namespace, name = c.policy.name.Namespace, text
	}
	if namespace == "" || name == "" || strings.ContainsAny(text, "*") || strings.Contains(name, "/") {
		c.unreadable("service account %q is neither name nor namespace/name", text)
		return
	}
	set.exact[spiffe.ID{Namespace: namespace, ServiceAccount: name}] = struct{}{}
}

// prefixes unmaps v4-mapped ones, since addresses are compared unmapped.
func (c *compiler) prefixes(values []netip.Prefix) []netip.Prefix {
	const mappedBits = 96
	set := make([]netip.Prefix, 0, len(values))
	for _, p := range values {
		switch {
		case !p.IsValid():
			c.unreadable("an address block is not valid")
			continue
		case p.Addr().Is4In6() && p.Bits() >= mappedBits:
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mappedBits)
		}
		set = append(set, p)
	}
	return set
}

func (c *compiler) parsePrefixes(key string, values []string) []netip.Prefix {
	var set []netip.Prefix
	for _, v := range values {
		if a, err := netip.ParseAddr(v); err == nil && a.Zone() == "" {
			set = append(set, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(v)
		if err != nil {
			c.unreadable("%s value %q is neither an IP address nor a CIDR block", key, v)
			continue
		}
		set = append(set, p)
	}
	return set
}

func (c *compiler) parsePorts(values []string) []uint16 {
	var set []uint16
	for _, v := range values {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			c.unreadable("destination.port value %q is no port", v)
			continue
		}
		set = append(set, uint16(n))
	}
	return set
}

func (a attribute) String() string {
	return [...]string{"source.principal", "source.namespace", "source.serviceAccount", "source.ip", "destination.ip", "destination.port"}[a]
}
