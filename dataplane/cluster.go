package dataplane

import (
	"net/netip"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// UDP is the mode of its pods' UDP. A label that cannot be read counts as the mode on the safe
// side, UDPRequire.
func (ns *Namespace) UDP() UDPMode {
	mode := UDPMode(ns.Labels[UDPLabel])
	if mode.Validate() != nil {
		return UDPRequire
	}
	return mode
}

// Transport is what carries its pods' connections. A label that cannot be read counts as none.
func (ns *Namespace) Transport() TransportMode {
	mode := TransportMode(ns.Labels[TransportLabel])
	if mode.Validate() != nil {
		return TransportDefault
	}
	return mode
}

// Node is a Kubernetes node.
type Node struct {
	Name     string
	Region   string // topology.kubernetes.io/region
	Zone     string // topology.kubernetes.io/zone
	Addrs    []netip.Addr
	PodCIDRs []netip.Prefix
}

// Phase is a pod's phase, in Kubernetes' words.
type Phase string

// The phases of a pod; a Succeeded or Failed one has no traffic and no address of its own.
const (
	PodPending   Phase = "Pending"
	PodRunning   Phase = "Running"
	PodSucceeded Phase = "Succeeded"
	PodFailed    Phase = "Failed"
)

// Owner is what a pod's controller is called to people: the Deployment rather than its ReplicaSet.
type Owner struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

// Workload is a pod.
type Workload struct {
	UID            string
	Name           Name
	ServiceAccount string
	Node           string
	Addrs          []netip.Addr // pod IPs, unmapped
	Labels         map[string]string
	Owner          Owner
	Phase          Phase
	Ready          bool
	HostNetwork    bool
	Terminating    bool
	Network        string // topology.istio.io/network; "" is the local one
	Cluster        string
	NetNS          string // path of the network namespace; only its own node can use it
	StaticHash     string // of a static pod: the UID that its kubelet knows it by
	// Starting says that its network is being set up and nothing runs in it yet, so that
	// it can be captured without a pause. Only its own node knows.
	Starting bool

	UDPClear []PortRange // UDP ports that are left alone, those of the pod and those it asks others at

	// Identity is what its certificate carries. Set by NewSnapshot.
	Identity spiffe.ID
	// Enrolled says that its labels and its namespace's ask for capture. Set by NewSnapshot.
	Enrolled bool
	// Captured says that the agent of its node published it as ready for tunnels. Set by NewSnapshot.
	Captured bool
	// UDP says that it published as well that it takes UDP in tunnels. Set by NewSnapshot.
	UDP bool
}

// Protocol is how this workload is reached now.
func (w *Workload) Protocol() Protocol {
	if w.Captured {
		return ProtocolHBONE
	}
	return ProtocolTCP
}

// Live reports whether the pod can have traffic: it has an address and has not finished.
func (w *Workload) Live() bool {
	return len(w.Addrs) > 0 && w.Phase != PodSucceeded && w.Phase != PodFailed
}

// TrafficPolicy is a service's internalTrafficPolicy.
type TrafficPolicy string

// Values of internalTrafficPolicy; the zero value is Cluster.
const (
	TrafficCluster TrafficPolicy = "Cluster"
	TrafficLocal   TrafficPolicy = "Local"
)

// TrafficDistribution is a service's trafficDistribution, a preference and never a restriction.
type TrafficDistribution string

// Values of trafficDistribution; the zero value is no preference.
const (
	PreferSameZone TrafficDistribution = "PreferSameZone"
	PreferSameNode TrafficDistribution = "PreferSameNode"
	PreferClose    TrafficDistribution = "PreferClose" // the older name of PreferSameZone
)

// ServicePort is one port of a service.
type ServicePort struct {
	Name     string
	Port     uint16
	NodePort uint16 // on every node's addresses, 0 for none
}

// Endpoint is one address behind a service.
type Endpoint struct {
	Addr        netip.Addr
	WorkloadUID string // "" when the address is not a pod
	Node        string
	Zone        string
	Ready       bool
	Serving     bool
	Terminating bool
	Ports       map[string]uint16 // target port by the service port's name
}

// Service is a Kubernetes service with its endpoints.
type Service struct {
	Name            Name
	Host            string       // fully qualified DNS name
	Addrs           []netip.Addr // cluster IPs: all of their ports are the service's
	External        []netip.Addr // of load balancers and external IPs: its own ports there are
	Ports           []ServicePort
	UDPPorts        []ServicePort
	Selector        map[string]string
	InternalTraffic TrafficPolicy
	SessionAffinity bool // ClientIP: a client keeps to one endpoint
	Distribution    TrafficDistribution
	PublishNotReady bool
	Endpoints       []Endpoint
}

// UDPPort returns the service's UDP port with that number.
func (s *Service) UDPPort(number uint16) (ServicePort, bool) {
	for _, p := range s.UDPPorts {
		if p.Port == number {
			return p, true
		}
	}
	return ServicePort{}, false
}

// Port returns the service's port with that number.
func (s *Service) Port(number uint16) (ServicePort, bool) {
	for _, p := range s.Ports {
		if p.Port == number {
			return p, true
		}
	}
	return ServicePort{}, false
}
