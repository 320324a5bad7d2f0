// Package dataplane is the vocabulary of Raceway: what a node agent knows of the
// cluster (Snapshot and its parts), and the words for what it decides and does.
// It depends on the standard library and on the identity type alone, so every
// other package may speak it.
package dataplane

import (
	"fmt"
	"strings"
)

// Labels and annotations that users and agents write on Kubernetes objects.
const (
	// ModeLabel on a namespace enrols its pods, on a pod it overrides the namespace:
	// ModeAmbient enrols, ModeNone opts out.
	ModeLabel   = "raceway.dev/dataplane-mode"
	ModeAmbient = "ambient"
	ModeNone    = "none"

	// RedirectionAnnotation on a pod says that its agent has captured it, when it is
	// RedirectionEnabled. Only the agent of the pod's node writes it.
	RedirectionAnnotation = "raceway.dev/redirection"
	RedirectionEnabled    = "enabled"

	// UDPAnnotation on a pod says that its agent takes UDP for it in tunnels, when it is
	// UDPEnabled. Only the agent of the pod's node writes it. The label of that name on a
	// namespace is a UDPMode.
	UDPAnnotation = "raceway.dev/udp"
	UDPEnabled    = "enabled"
	UDPLabel      = UDPAnnotation

	// UDPClearAnnotation on a pod names UDP ports that are left alone, those of the pod and
	// those that it asks others at: "123,10000-20000".
	UDPClearAnnotation = "raceway.dev/udp-clear-ports"

	// TransportLabel on a namespace says what its pods' connections are carried by: a
	// TransportMode.
	TransportLabel = "raceway.dev/transport"

	// SameNodeLabel on a namespace says how its pods talk to others of their node: a
	// SameNodeMode.
	SameNodeLabel = "raceway.dev/same-node"

	// NetNSAnnotation names the network namespace of a pod on this machine,
	// for clusters that are a directory of YAML.
	NetNSAnnotation = "raceway.dev/netns"

	// DryRunAnnotation on an AuthorizationPolicy evaluates and counts it without effect.
	DryRunAnnotation = "istio.io/dry-run"
)

// Ports of the data plane inside every enrolled pod. No tunnel may target them.
const (
	PortOutbound = 15001 // outbound capture
	PortInbound  = 15006 // inbound plaintext capture
	PortTunnel   = 15008 // HBONE
)

// IsDataPlanePort reports whether port belongs to the data plane of a pod,
// and so is never the target of an application's connection.
func IsDataPlanePort(port uint16) bool {
	return port == PortOutbound || port == PortInbound || port == PortTunnel
}

// Name identifies a namespaced Kubernetes object.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// CaptureState is how far the enrolment of one pod on this node has come.
// A state is reported only once it is true.
type CaptureState int

const (
	// CaptureNone is a pod that is not and should not be captured.
	CaptureNone CaptureState = iota
	// CapturePending is a pod on its way in; the reason says what it waits for.
	CapturePending
	// CaptureInForce is a pod whose inbound and outbound traffic is captured.
	CaptureInForce
	// CaptureFailed is a pod whose last attempt failed; it is tried again.
	CaptureFailed
	// CaptureReleasing is a pod on its way out: new connections are plain,
	// those in flight go on through the agent.
	CaptureReleasing
)

var captureStates = [...]string{"none", "pending", "captured", "failed", "releasing"}

func (s CaptureState) String() string { return captureStates[s] }

// MarshalText makes the state a word in JSON and YAML.
func (s CaptureState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (s *CaptureState) UnmarshalText(text []byte) error {
	for i, word := range captureStates {
		if word == string(text) {
			*s = CaptureState(i)
			return nil
		}
	}
	return fmt.Errorf("capture state %q is none of %s", text, strings.Join(captureStates[:], ", "))
}

// Protocol is how a workload is reached.
type Protocol string

const (
	// ProtocolTCP reaches the workload as plain TCP.
	ProtocolTCP Protocol = "TCP"
	// ProtocolHBONE reaches the workload through a tunnel to its port 15008.
	ProtocolHBONE Protocol = "HBONE"
	// ProtocolHBONEUDP is a flow of UDP through a tunnel.
	ProtocolHBONEUDP Protocol = "HBONE/UDP"
	// ProtocolKernel is a connection between two captured pods of a node that goes by the
	// kernel alone, authorized but not encrypted.
	ProtocolKernel Protocol = "KERNEL"
)

// UDPMode is what becomes of the UDP of a namespace's pods.
type UDPMode string

// Modes of UDP. The zero value has tunnels carry it wherever both ends can.
const (
	UDPDefault UDPMode = ""
	UDPOff     UDPMode = "off"     // it is left alone
	UDPRequire UDPMode = "require" // what its pods send and no tunnel can carry is refused
)

// Validate complains of anything that is no mode.
func (m UDPMode) Validate() error {
	switch m {
	case UDPDefault, UDPOff, UDPRequire:
		return nil
	}
	return fmt.Errorf("UDP mode %q is neither %s nor %s", string(m), UDPOff, UDPRequire)
}

// TransportMode is what carries the tunnels of connections.
type TransportMode string

// Modes of transport. The zero value is HTTP/2.
const (
	TransportDefault TransportMode = ""
	TransportH2      TransportMode = "h2"
	TransportH3      TransportMode = "h3"   // HTTP/3, where the peer can
	TransportAuto    TransportMode = "auto" // HTTP/3 there on a path that loses packets
)

// Validate complains of anything that is no mode.
func (m TransportMode) Validate() error {
	switch m {
	case TransportDefault, TransportH2, TransportH3, TransportAuto:
		return nil
	}
	return fmt.Errorf("transport %q is none of %s, %s and %s", string(m), TransportH2, TransportH3, TransportAuto)
}

// SameNodeMode is how pods of one node talk to each other.
type SameNodeMode string

// Modes of talking on one node. The zero value is the kernel's, except to what PeerAuthentication
// makes STRICT.
const (
	SameNodeDefault SameNodeMode = ""
	SameNodeKernel  SameNodeMode = "kernel" // unencrypted, by the kernel alone
	SameNodeTunnel  SameNodeMode = "tunnel" // as between nodes
)

// Validate complains of anything that is no mode.
func (m SameNodeMode) Validate() error {
	switch m {
	case SameNodeDefault, SameNodeKernel, SameNodeTunnel:
		return nil
	}
	return fmt.Errorf("same-node mode %q is neither %s nor %s", string(m), SameNodeKernel, SameNodeTunnel)
}
