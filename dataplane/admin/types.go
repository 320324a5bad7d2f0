// Package admin is the agent's local API: JSON over HTTP on a unix socket that only root
// of the node can open, and the client that the command line uses.
package admin

import (
	"net/netip"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// Workload is one row of `raceway workloads`.
type Workload struct {
	Namespace string                 `json:"namespace"`
	Name      string                 `json:"name"`
	Addrs     []netip.Addr           `json:"addresses"`
	Node      string                 `json:"node"`
	Identity  spiffe.ID              `json:"identity"`
	Protocol  dataplane.Protocol     `json:"protocol"`
	Enrolled  bool                   `json:"enrolled"`
	Capture   dataplane.CaptureState `json:"capture"`          // of pods on this agent's node
	Reason    string                 `json:"reason,omitempty"` // why it is pending or failed
	Since     time.Time              `json:"since,omitzero"`
	// Bypassing counts connections that are older than the enrolment and go on in clear.
	Bypassing int `json:"bypassing,omitempty"`
	// OlderUDP counts UDP sockets that are older than the capture of UDP and go on in clear.
	OlderUDP int `json:"olderUDP,omitempty"`
}

// Service is one row of `raceway services`.
type Service struct {
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	Addrs     []netip.Addr `json:"addresses"`
	Ports     []uint16     `json:"ports"`
	Endpoints int          `json:"endpoints"`
	Ready     int          `json:"ready"`
	Captured  int          `json:"captured"`
}

// Policy is one row of `raceway policies`.
type Policy struct {
	Kind      string   `json:"kind"` // AuthorizationPolicy or PeerAuthentication
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Action    string   `json:"action"` // ALLOW, DENY … or the mTLS mode
	DryRun    bool     `json:"dryRun,omitempty"`
	Workloads int      `json:"workloads"`        // how many pods of this node it selects
	Issues    []string `json:"issues,omitempty"` // what of it cannot be enforced as written
	Allowed   uint64   `json:"allowed"`          // decisions that it made
	Denied    uint64   `json:"denied"`           // connections that it denied, or would have in a dry run
}

// Certificate is one row of `raceway certificates`.
type Certificate struct {
	Identity  spiffe.ID `json:"identity"`
	State     string    `json:"state"` // valid, expired, pending, failed
	Serial    string    `json:"serial,omitempty"`
	NotBefore time.Time `json:"notBefore,omitzero"`
	NotAfter  time.Time `json:"notAfter,omitzero"`
	RefreshAt time.Time `json:"refreshAt,omitzero"`
	Error     string    `json:"error,omitempty"` // the last failure to get or refresh it
}

// Connection is one row of `raceway connections`, and the open and close events of
// `raceway flows`.
type Connection struct {
	ID          string             `json:"id"`
	Direction   string             `json:"direction"` // inbound or outbound
	Protocol    dataplane.Protocol `json:"protocol"`
	Source      Peer               `json:"source"`
	Destination Peer               `json:"destination"`
	Service     string             `json:"service,omitempty"`
	Tunnel      netip.AddrPort     `json:"tunnel,omitzero"`     // the peer's HBONE address
	Transport   string             `json:"transport,omitempty"` // what carries the tunnel, and why, where it is not h2 as ever
	Opened      time.Time          `json:"opened"`
	Sent        uint64             `json:"sent"`     // bytes from source to destination
	Received    uint64             `json:"received"` // bytes from destination to source
	RTTMicros   uint32             `json:"rttMicros,omitempty"`
	Retransmits uint32             `json:"retransmits,omitempty"`
	Policy      string             `json:"policy,omitempty"` // what decided, as "namespace/name rule 0"
}

// Peer is one end of a connection.
type Peer struct {
	Addr      netip.AddrPort `json:"address"`
	Workload  string         `json:"workload,omitempty"`
	Namespace string         `json:"namespace,omitempty"`
	Identity  spiffe.ID      `json:"identity,omitzero"`
}

// FlowEvent says what a Flow record tells.
type FlowEvent string

// Events of a connection's life.
const (
	FlowOpen   FlowEvent = "open"
	FlowUpdate FlowEvent = "update"
	FlowClose  FlowEvent = "close"
	FlowDenied FlowEvent = "denied"
	FlowFailed FlowEvent = "failed"
	// FlowLost is not about a connection: records were lost because their reader is slow,
	// and Cause says how many.
	FlowLost FlowEvent = "lost"
)

// Flow is one record of `raceway flows`.
type Flow struct {
	Time  time.Time `json:"time"`
	Event FlowEvent `json:"event"`
	Connection
	Duration time.Duration `json:"durationNanos,omitempty"`
	Cause    string        `json:"cause,omitempty"` // why it closed, was denied or failed
	Flags    string        `json:"flags,omitempty"` // response flags: -, DENY, CONNECT, TLS_FAILURE …
}

// Why is the answer of `raceway why SRC DST:PORT`.
type Why struct {
	Node        string    `json:"node"`       // of the agent that answers
	SourceNode  string    `json:"sourceNode"` // whose agent knows most
	Source      string    `json:"source"`
	Destination string    `json:"destination"`
	Steps       []WhyStep `json:"steps"`
	Outcome     string    `json:"outcome"` // one of the Outcome constants
	SourceID    spiffe.ID `json:"sourceIdentity,omitzero"`
	DestID      spiffe.ID `json:"destinationIdentity,omitzero"`
	Policy      string    `json:"policy,omitempty"` // the deciding policy and rule
	Next        string    `json:"next"`             // the command to try next
}

// WhyStep is one step of the way, in the order that a connection takes them.
type WhyStep struct {
	Step   string `json:"step"` // capture, resolve, route, identity, policy
	Result string `json:"result"`
	Detail string `json:"detail,omitempty"`
}

// Finding is one line of `raceway check`.
type Finding struct {
	Subject string `json:"subject"` // "agent", or a pod's namespace/name
	Check   string `json:"check"`   // what was looked at
	OK      bool   `json:"ok"`
	Detail  string `json:"detail,omitempty"` // what is wrong, and what to do
}

// Version says what runs.
type Version struct {
	Version string `json:"version"`
	Node    string `json:"node"`
	Kernel  string `json:"kernel"`
	Inbound string `json:"inboundCapture"` // sk_lookup or tc
}
