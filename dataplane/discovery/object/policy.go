package object

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"
	selection "istio.io/api/type/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane"
)

// FromAuthorizationPolicy converts an AuthorizationPolicy of any of its API versions, which
// share the spec. What Istio's own validation rejects makes the policy Invalid. Typed
// clients drop fields that they do not know: where the JSON is at hand, Decode is stricter.
func FromAuthorizationPolicy(meta *metav1.ObjectMeta, spec *security.AuthorizationPolicy) (Object, error) {
	out, key, err := newAuthorization(meta)
	if err != nil {
		return Object{}, err
	}
	invalid := readAuthorization(&out, spec)
	out.Invalid = joinCauses(append(dryRun(meta, &out), invalid...))
	return Object{Key: key, value: out}, nil
}

// decodeAuthorization reads a policy whose JSON may hold anything. What cannot be read
// leaves it Invalid, with the action and the selector as far as they can be told.
func decodeAuthorization(meta *metav1.ObjectMeta, doc map[string]json.RawMessage) (Object, error) {
	out, key, err := newAuthorization(meta)
	if err != nil {
		return Object{}, err
	}
	causes := append(dryRun(meta, &out), unknownFields(doc)...)
	causes = append(causes, emptyClauses(doc["spec"])...)
	spec := new(security.AuthorizationPolicy)
	if err := decodeSpec(doc["spec"], spec); err != nil {
		causes = append(causes, err)
		salvage(&out, doc["spec"])
	} else {
		causes = append(causes, readAuthorization(&out, spec)...)
	}
	out.Invalid = joinCauses(causes)
	return Object{Key: key, value: out}, nil
}

func newAuthorization(meta *metav1.ObjectMeta) (dataplane.AuthorizationPolicy, Key, error) {
	name, err := namespacedName(meta)
	if err != nil {
		return dataplane.AuthorizationPolicy{}, Key{}, err
	}
	out := dataplane.AuthorizationPolicy{Name: name, UID: string(meta.UID), CreatedAt: meta.CreationTimestamp.UTC()}
	return out, Key{Kind: KindAuthorizationPolicy, Name: name}, nil
}

func dryRun(meta *metav1.ObjectMeta, out *dataplane.AuthorizationPolicy) []error {
	value, ok := meta.Annotations[dataplane.DryRunAnnotation]
	if !ok {
		return nil
	}
	on, err := strconv.ParseBool(value)
	if err != nil {
		return []error{fmt.Errorf("annotation %s: %q is neither true nor false", dataplane.DryRunAnnotation, value)}
	}
	out.DryRun = on
	return nil
}

func joinCauses(causes []error) string {
	err := errors.Join(causes...)
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}

func actionOf(in security.AuthorizationPolicy_Action) (dataplane.PolicyAction, bool) {
	switch in {
	case security.AuthorizationPolicy_ALLOW:
		return dataplane.ActionAllow, true
	case security.AuthorizationPolicy_DENY:
		return dataplane.ActionDeny, true
	case security.AuthorizationPolicy_AUDIT:
		return dataplane.ActionAudit, true
	case security.AuthorizationPolicy_CUSTOM:
		return dataplane.ActionCustom, true
	default:
		return dataplane.ActionDeny, false
	}
}

// readAuthorization fills out from spec and returns what is wrong with it.
func readAuthorization(out *dataplane.AuthorizationPolicy, spec *security.AuthorizationPolicy) []error {
	var c complaints
	action, known := actionOf(spec.GetAction())
	if !known {
		c.addf("spec.action: %d is unknown", spec.GetAction())
	}
	out.Action = action
	out.Selector = c.selector(spec.GetSelector())
	refs := spec.GetTargetRef() != nil || len(spec.GetTargetRefs()) > 0
	switch {
	case refs && spec.GetSelector() != nil:
		c.addf("spec: only one of selector and targetRefs may be set")
	default:
		out.TargetRefs = refs
	}
	c.provider(spec)
	if len(spec.GetRules()) == 0 && (action == dataplane.ActionDeny || action == dataplane.ActionCustom) {
		c.addf("spec: %s without rules never applies; for every connection write a rule {}", action)
	}
	for i, rule := range spec.GetRules() {
		out.Rules = append(out.Rules, c.rule(fmt.Sprintf("spec.rules[%d]", i), rule))
	}
	return c.found
}

// complaints collects what is wrong with a policy while it is read.
type complaints struct{ found []error }

func (c *complaints) addf(format string, args ...any) {
	c.found = append(c.found, fmt.Errorf(format, args...))
}

func (c *complaints) add(err error) { c.found = append(c.found, err) }

// selector rejects wildcards, as Istio does: they look like patterns and are not.
func (c *complaints) selector(s *selection.WorkloadSelector) map[string]string {
	for _, k := range slices.Sorted(maps.Keys(s.GetMatchLabels())) {
		v := s.GetMatchLabels()[k]
		if k == "" || strings.Contains(k, "*") || strings.Contains(v, "*") {
			c.addf("spec.selector.matchLabels: %q: %q has an empty key or a wildcard", k, v)
		}
	}
	return s.GetMatchLabels()
}

func (c *complaints) provider(spec *security.AuthorizationPolicy) {
	custom := spec.GetAction() == security.AuthorizationPolicy_CUSTOM
	switch {
	case custom && spec.GetProvider().GetName() == "":
		c.addf("spec.provider.name: missing, action CUSTOM needs it")
	case !custom && spec.GetProvider() != nil:
		c.addf("spec.provider: only action CUSTOM has one")
	}
}

func (c *complaints) rule(field string, in *security.Rule) dataplane.PolicyRule {
	var out dataplane.PolicyRule
	for i, from := range in.GetFrom() {
		out.From = append(out.From, c.source(fmt.Sprintf("%s.from[%d].source", field, i), from.GetSource()))
	}
	for i, to := range in.GetTo() {
		out.To = append(out.To, c.operation(fmt.Sprintf("%s.to[%d].operation", field, i), to.GetOperation()))
	}
	for i, when := range in.GetWhen() {
		out.When = append(out.When, c.condition(fmt.Sprintf("%s.when[%d]", field, i), when))
	}
	return out
}

func (c *complaints) source(field string, in *security.Source) dataplane.PolicySource {
	out := dataplane.PolicySource{
		Principals:           c.values(field+".principals", in.GetPrincipals()),
		NotPrincipals:        c.values(field+".notPrincipals", in.GetNotPrincipals()),
		Namespaces:           c.values(field+".namespaces", in.GetNamespaces()),
		NotNamespaces:        c.values(field+".notNamespaces", in.GetNotNamespaces()),
		ServiceAccounts:      c.serviceAccounts(field+".serviceAccounts", in.GetServiceAccounts()),
		NotServiceAccounts:   c.serviceAccounts(field+".notServiceAccounts", in.GetNotServiceAccounts()),
		IPBlocks:             c.prefixes(field+".ipBlocks", in.GetIpBlocks()),
		NotIPBlocks:          c.prefixes(field+".notIpBlocks", in.GetNotIpBlocks()),
		RemoteIPBlocks:       c.prefixes(field+".remoteIpBlocks", in.GetRemoteIpBlocks()),
		NotRemoteIPBlocks:    c.prefixes(field+".notRemoteIpBlocks", in.GetNotRemoteIpBlocks()),
		RequestPrincipals:    c.values(field+".requestPrincipals", in.GetRequestPrincipals()),
		NotRequestPrincipals: c.values(field+".notRequestPrincipals", in.GetNotRequestPrincipals()),
	}
	identities := len(out.Principals) + len(out.NotPrincipals) + len(out.Namespaces) + len(out.NotNamespaces)
	accounts := len(out.ServiceAccounts) + len(out.NotServiceAccounts)
	rest := len(in.GetIpBlocks()) + len(in.GetNotIpBlocks()) + len(in.GetRemoteIpBlocks()) + len(in.GetNotRemoteIpBlocks()) +
		len(out.RequestPrincipals) + len(out.NotRequestPrincipals)
	domains := len(in.GetTrustDomains()) + len(in.GetNotTrustDomains())
	switch {
	case domains > 0:
		// Experimental in Istio; read and not enforced, it would widen an ALLOW.
		c.addf("%s: trustDomains and notTrustDomains are not understood; write principals: [<trust domain>/*]", field)
	case identities+accounts+rest == 0:
		c.addf("%s: empty, it must name at least one field", field)
	case accounts > 0 && identities > 0:
		c.addf("%s: serviceAccounts cannot stand beside principals or namespaces", field)
	}
	return out
}

func (c *complaints) operation(field string, in *security.Operation) dataplane.PolicyOperation {
	out := dataplane.PolicyOperation{
		Ports:      c.ports(field+".ports", in.GetPorts()),
		NotPorts:   c.ports(field+".notPorts", in.GetNotPorts()),
		Hosts:      c.values(field+".hosts", in.GetHosts()),
		NotHosts:   c.values(field+".notHosts", in.GetNotHosts()),
		Methods:    c.values(field+".methods", in.GetMethods()),
		NotMethods: c.values(field+".notMethods", in.GetNotMethods()),
		Paths:      c.values(field+".paths", in.GetPaths()),
		NotPaths:   c.values(field+".notPaths", in.GetNotPaths()),
	}
	if len(in.GetPorts())+len(in.GetNotPorts())+len(out.Hosts)+len(out.NotHosts)+len(out.Methods)+len(out.NotMethods)+
		len(out.Paths)+len(out.NotPaths) == 0 {
		c.addf("%s: empty, it must name at least one field", field)
	}
	return out
}

func (c *complaints) values(field string, in []string) []string {
	for i, v := range in {
		if v == "" {
			c.addf("%s[%d]: empty", field, i)
		}
	}
	return in
}

func (c *complaints) serviceAccounts(field string, in []string) []string {
	for i, v := range in {
		namespace, name, slash := strings.Cut(v, "/")
		if v == "" || strings.ContainsAny(v, "*") || strings.Contains(name, "/") || slash && (namespace == "" || name == "") {
			c.addf("%s[%d]: %q is neither <name> nor <namespace>/<name>", field, i, v)
		}
	}
	return in
}

func (c *complaints) prefixes(field string, in []string) []netip.Prefix {
	var out []netip.Prefix
	for i, v := range in {
		p, err := parsePrefix(fmt.Sprintf("%s[%d]", field, i), v)
		if err != nil {
			c.add(err)
			continue
		}
		out = append(out, p)
	}
	return out
}

func (c *complaints) ports(field string, in []string) []uint16 {
	var out []uint16
	for i, v := range in {
		port, err := strconv.ParseUint(v, 10, 16)
		if err != nil || port == 0 {
			c.addf("%s[%d]: %q is not a port", field, i, v)
			continue
		}
		out = append(out, uint16(port))
	}
	return out
}
