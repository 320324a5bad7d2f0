package authz

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/raceway-mesh/raceway/dataplane"
)

// The reference is the semantics of the package written the slow and plain way, straight
// from the vocabulary: no compilation, no index, strings for identities. The fuzz test
// holds Evaluate against it.

func referenceAllows(policies []dataplane.AuthorizationPolicy, w *dataplane.Workload, q Request) bool {
	restricted, allowed := false, false
	for i := range policies {
		p := &policies[i]
		mine := p.Name.Namespace == w.Name.Namespace || p.Name.Namespace == rootNamespace
		if !mine || p.TargetRefs || p.DryRun || p.Action == dataplane.ActionAudit || !dataplane.MatchLabels(p.Selector, w.Labels) {
			continue
		}
		matches := slices.ContainsFunc(p.Rules, func(r dataplane.PolicyRule) bool { return referenceMatches(p, &r, q) })
		if p.Action == dataplane.ActionAllow {
			restricted = true
			allowed = allowed || matches && p.Invalid == ""
		} else if matches || p.Invalid != "" {
			return false
		}
	}
	return allowed || !restricted
}

func referenceMatches(p *dataplane.AuthorizationPolicy, r *dataplane.PolicyRule, q Request) bool {
	if p.Action == dataplane.ActionAllow && len(l7Attributes(r)) > 0 {
		return false
	}
	for _, c := range r.When {
		got := referenceAttribute(c.Key, q)
		if got == nil {
			continue
		}
		if len(c.Values) > 0 && !referenceAny(p, c.Key, c.Values, got) || len(c.NotValues) > 0 && referenceAny(p, c.Key, c.NotValues, got) {
			return false
		}
	}
	source := func(s dataplane.PolicySource) bool {
		for _, field := range []struct {
			key         string
			values, not []string
		}{
			{"source.principal", s.Principals, s.NotPrincipals},
			{"source.namespace", s.Namespaces, s.NotNamespaces},
			{"source.serviceAccount", s.ServiceAccounts, s.NotServiceAccounts},
			{"source.ip", texts(s.IPBlocks), texts(s.NotIPBlocks)},
		} {
			got := referenceAttribute(field.key, q)
			if len(field.values) > 0 && !referenceAny(p, field.key, field.values, got) || referenceAny(p, field.key, field.not, got) {
				return false
			}
		}
		return true
	}
	operation := func(o dataplane.PolicyOperation) bool {
		port := q.Destination.Port()
		return (len(o.Ports) == 0 || slices.Contains(o.Ports, port)) && !slices.Contains(o.NotPorts, port)
	}
	return (len(r.From) == 0 || slices.ContainsFunc(r.From, source)) && (len(r.To) == 0 || slices.ContainsFunc(r.To, operation))
}

// referenceAttribute returns nil for an attribute that L4 does not know.
func referenceAttribute(key string, q Request) *string {
	var text string
	switch key {
	case "source.principal":
		text = q.Peer.Principal()
	case "source.namespace":
		text = q.Peer.Namespace
	case "source.serviceAccount":
		if !q.Peer.IsZero() {
			text = q.Peer.Namespace + "/" + q.Peer.ServiceAccount
		}
	case "source.ip":
		text = q.Source.Unmap().String()
	case "destination.ip":
		text = q.Destination.Addr().Unmap().String()
	case "destination.port":
		text = strconv.Itoa(int(q.Destination.Port()))
	default:
		return nil
	}
	return &text
}

func referenceAny(p *dataplane.AuthorizationPolicy, key string, values []string, got *string) bool {
	return slices.ContainsFunc(values, func(v string) bool {
		switch key {
		case "source.ip", "destination.ip":
			if a, err := netip.ParseAddr(v); err == nil {
				return a.String() == *got
			}
			return netip.MustParsePrefix(v).Contains(netip.MustParseAddr(*got))
		case "destination.port":
			return v == *got
		case "source.serviceAccount":
			if !strings.Contains(v, "/") {
				v = p.Name.Namespace + "/" + v
			}
			return v == *got
		case "source.principal":
			v = strings.TrimPrefix(v, "spiffe://")
		}
		if *got == "" {
			return false
		}
		if suffix, ok := strings.CutPrefix(v, "*"); ok {
			return strings.HasSuffix(*got, suffix)
		}
		if prefix, ok := strings.CutSuffix(v, "*"); ok {
			return strings.HasPrefix(*got, prefix)
		}
		return v == *got
	})
}

func texts(prefixes []netip.Prefix) []string {
	var all []string
	for _, p := range prefixes {
		all = append(all, p.String())
	}
	return all
}
