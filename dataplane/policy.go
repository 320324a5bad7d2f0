package dataplane

import (
	"net/netip"
	"time"
)

// PolicyAction is the action of an AuthorizationPolicy.
type PolicyAction string

// Actions of an AuthorizationPolicy. Custom cannot be carried out at L4; it fails
// closed, as a Deny of what it matches. Audit never changes a decision.
const (
	ActionAllow  PolicyAction = "ALLOW"
	ActionDeny   PolicyAction = "DENY"
	ActionCustom PolicyAction = "CUSTOM"
	ActionAudit  PolicyAction = "AUDIT"
)

// AuthorizationPolicy is Istio's, as read: nothing is dropped, reinterpreted or
// compiled yet (package authz does that).
type AuthorizationPolicy struct {
	Name      Name
	UID       string
	CreatedAt time.Time
	Action    PolicyAction
	DryRun    bool
	Selector  map[string]string // empty: every workload of the scope
	Rules     []PolicyRule

	// TargetRefs says that the policy is bound to a waypoint or gateway and not to workloads.
	TargetRefs bool
	// Invalid says why the policy could not be read as written, "" when it could.
	// An invalid policy is enforced as the strictest one that its author can have meant:
	// authz decides it from Action.
	Invalid string
}

// PolicyRule is one rule: any From, any To and all of When must match; an empty list matches all.
type PolicyRule struct {
	From []PolicySource
	To   []PolicyOperation
	When []PolicyCondition
}

// PolicySource is one `from.source`. Fields are combined with AND, values of a field with OR.
type PolicySource struct {
	Principals           []string
	NotPrincipals        []string
	Namespaces           []string
	NotNamespaces        []string
	ServiceAccounts      []string // "name" in the policy's own namespace, or "namespace/name"
	NotServiceAccounts   []string
	IPBlocks             []netip.Prefix
	NotIPBlocks          []netip.Prefix
	RemoteIPBlocks       []netip.Prefix // the address before proxies: not known at L4
	NotRemoteIPBlocks    []netip.Prefix
	RequestPrincipals    []string // L7
	NotRequestPrincipals []string // L7
}

// PolicyOperation is one `to.operation`.
type PolicyOperation struct {
	Ports      []uint16
	NotPorts   []uint16
	Hosts      []string // L7, as is all that follows
	NotHosts   []string
	Methods    []string
	NotMethods []string
	Paths      []string
	NotPaths   []string
}

// PolicyCondition is one `when`: the attribute must have one of Values and none of NotValues.
type PolicyCondition struct {
	Key       string
	Values    []string
	NotValues []string
}

// MTLSMode is a PeerAuthentication mode.
type MTLSMode string

// Modes of PeerAuthentication. The zero value inherits (UNSET). Disable is Permissive in
// this data plane: a captured workload always accepts the tunnel.
const (
	MTLSUnset      MTLSMode = ""
	MTLSPermissive MTLSMode = "PERMISSIVE"
	MTLSStrict     MTLSMode = "STRICT"
	MTLSDisable    MTLSMode = "DISABLE"
)

// PeerAuthentication is Istio's.
type PeerAuthentication struct {
	Name      Name
	CreatedAt time.Time
	Selector  map[string]string
	Mode      MTLSMode
	PortModes map[uint16]MTLSMode
	// Invalid says why it could not be read; an invalid one counts as STRICT for what it selects.
	Invalid string
}
