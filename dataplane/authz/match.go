package authz

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// A rule is a list of groups that must all match; a group is a list of alternatives of
// which one must match; an alternative is a list of terms that must all match. It is the
// form of ztunnel's RBAC: one group is `from`, one is `to`, and one is each `when`.
type (
	rule struct {
		policy *policy
		index  int
		title  string
		groups []group
	}
	group       []alternative
	alternative []term
)

func (r *rule) matches(q Request) bool {
	for _, g := range r.groups {
		if !g.matches(q) {
			return false
		}
	}
	return true
}

func (g group) matches(q Request) bool {
	for _, a := range g {
		if a.matches(q) {
			return true
		}
	}
	return false
}

func (a alternative) matches(q Request) bool {
	for i := range a {
		if a[i].matches(q) == a[i].not {
			return false
		}
	}
	return true
}

// attribute is what a term looks at.
type attribute int

const (
	sourcePrincipal attribute = iota
	sourceNamespace
	sourceServiceAccount
	sourceIP
	destinationIP
	destinationPort
)

// term compares one attribute with a set of values: the one of the three fields that fits
// the attribute. not turns the outcome around.
type term struct {
	attribute attribute
	not       bool
	peers     peerSet
	prefixes  []netip.Prefix
	ports     []uint16
}

func (t *term) matches(q Request) bool {
	switch t.attribute {
	case sourcePrincipal, sourceNamespace, sourceServiceAccount:
		return !q.Peer.IsZero() && t.peers.contains(t.attribute, q.Peer)
	case sourceIP:
		return within(t.prefixes, q.Source)
	case destinationIP:
		return within(t.prefixes, q.Destination.Addr())
	case destinationPort:
		return slices.Contains(t.ports, q.Destination.Port())
	}
	return false
}

func within(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// peerSet is a set of principals, namespaces or service accounts. An exact value is kept as
// the part of an identity that it fixes (see project), so that a set of ten thousand costs
// one look-up.
type peerSet struct {
	exact    map[spiffe.ID]struct{}
	patterns []pattern
}

func (s *peerSet) contains(a attribute, peer spiffe.ID) bool {
	if _, ok := s.exact[project(a, peer)]; ok {
		return true
	}
	for _, p := range s.patterns {
		if p.matches(a, peer) {
			return true
		}
	}
	return false
}

// project keeps of an identity what the attribute sees. A namespace and a service account
// are the same in every trust domain that the mesh accepts, as in Istio.
func project(a attribute, id spiffe.ID) spiffe.ID {
	switch a {
	case sourceNamespace:
		return spiffe.ID{Namespace: id.Namespace}
	case sourceServiceAccount:
		return spiffe.ID{Namespace: id.Namespace, ServiceAccount: id.ServiceAccount}
	case sourcePrincipal, sourceIP, destinationIP, destinationPort:
	}
	return id
}

// pattern is "*" (presence: both fields empty), "prefix*" or "*suffix".
type pattern struct {
	prefix, suffix string
}

func (p pattern) matches(a attribute, peer spiffe.ID) bool {
	if a == sourceNamespace {
		return strings.HasPrefix(peer.Namespace, p.prefix) && strings.HasSuffix(peer.Namespace, p.suffix)
	}
	text := [...]string{peer.TrustDomain, "/ns/", peer.Namespace, "/sa/", peer.ServiceAccount}
	return hasPrefix(text[:], p.prefix) && hasSuffix(text[:], p.suffix)
}

// hasPrefix and hasSuffix are strings.HasPrefix and HasSuffix of the joined parts, without
// the allocation of joining them.
func hasPrefix(parts []string, prefix string) bool {
	for _, part := range parts {
		if len(prefix) <= len(part) {
			return strings.HasPrefix(part, prefix)
		}
		if !strings.HasPrefix(prefix, part) {
			return false
		}
		prefix = prefix[len(part):]
	}
	return prefix == ""
}

func hasSuffix(parts []string, suffix string) bool {
	for _, part := range slices.Backward(parts) {
		if len(suffix) <= len(part) {
			return strings.HasSuffix(part, suffix)
		}
		if !strings.HasSuffix(suffix, part) {
			return false
		}
		suffix = suffix[:len(suffix)-len(part)]
	}
	return suffix == ""
}

// index finds the first of many rules that matches. Rules that ask for one of a number of
// exact peers are found by the peer, so that a policy of one rule for each client costs
// three look-ups; the others are tried one by one.
type index struct {
	rules  []*rule
	byPeer map[spiffe.ID][]int // keys as project makes them
	others []int
}

func newIndex(rules []*rule) index {
	x := index{rules: rules, byPeer: make(map[spiffe.ID][]int)}
	for i, r := range rules {
		keys := r.peers()
		if keys == nil {
			x.others = append(x.others, i)
		}
		for key := range keys {
			x.byPeer[key] = append(x.byPeer[key], i)
		}
	}
	return x
}

// first returns the first rule that matches, or nil.
func (x *index) first(q Request) *rule {
	best := len(x.rules)
	best = x.firstOf(x.others, best, q)
	if !q.Peer.IsZero() && len(x.byPeer) > 0 {
		for _, a := range [...]attribute{sourcePrincipal, sourceNamespace, sourceServiceAccount} {
			best = x.firstOf(x.byPeer[project(a, q.Peer)], best, q)
		}
	}
	if best == len(x.rules) {
		return nil
	}
	return x.rules[best]
}

func (x *index) firstOf(candidates []int, best int, q Request) int {
	for _, i := range candidates {
		if i >= best {
			return best
		}
		if x.rules[i].matches(q) {
			return i
		}
	}
	return best
}

// peers returns the exact peers of which a request must have one for r to match, nil when
// r has no such group.
func (r *rule) peers() map[spiffe.ID]struct{} {
	for _, g := range r.groups {
		if keys := g.peers(); keys != nil {
			return keys
		}
	}
	return nil
}

func (g group) peers() map[spiffe.ID]struct{} {
	if len(g) == 1 {
		return g[0].peers()
	}
	keys := make(map[spiffe.ID]struct{})
	for _, a := range g {
		exact := a.peers()
		if exact == nil {
			return nil
		}
		for key := range exact {
			keys[key] = struct{}{}
		}
	}
	return keys
}

func (a alternative) peers() map[spiffe.ID]struct{} {
	for i := range a {
		if !a[i].not && a[i].peers.exact != nil && len(a[i].peers.patterns) == 0 {
			return a[i].peers.exact
		}
	}
	return nil
}
