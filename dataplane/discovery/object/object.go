// Package object turns Kubernetes and Istio objects into the vocabulary of package
// dataplane. It is pure and knows nothing of where objects come from: a source puts them
// into a Set as they appear and takes them out as they go, and asks the Set for the
// Contents of the next Snapshot.
//
//	JSON ──Decode──► Object ──Put──► Set ──Contents──► dataplane.NewSnapshot
//	typed ─FromPod…─┘
package object

import (
	"strings"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Kind is a kind of object that the data plane reads.
type Kind string

// The kinds that a Set holds.
const (
	KindNamespace           Kind = "Namespace"
	KindNode                Kind = "Node"
	KindPod                 Kind = "Pod"
	KindService             Kind = "Service"
	KindEndpointSlice       Kind = "EndpointSlice"
	KindAuthorizationPolicy Kind = "AuthorizationPolicy"
	KindPeerAuthentication  Kind = "PeerAuthentication"
)

// IsPolicy reports whether losing an object of this kind could open what it kept closed.
func (k Kind) IsPolicy() bool {
	return k == KindAuthorizationPolicy || k == KindPeerAuthentication
}

// Key identifies an object in a Set.
type Key struct {
	Kind Kind
	Name dataplane.Name // Namespace is "" for Namespace and Node
}

func (k Key) String() string {
	if k.Name.Namespace == "" {
		return string(k.Kind) + " " + k.Name.Name
	}
	return string(k.Kind) + " " + k.Name.String()
}

// Compare orders keys by kind, namespace and name.
func (k Key) Compare(other Key) int {
	for _, pair := range [...][2]string{
		{string(k.Kind), string(other.Kind)},
		{k.Name.Namespace, other.Name.Namespace},
		{k.Name.Name, other.Name.Name},
	} {
		if c := strings.Compare(pair[0], pair[1]); c != 0 {
			return c
		}
	}
	return 0
}

// Object is one converted object, immutable. Make it with Decode or a From function.
type Object struct {
	Key   Key
	value any // dataplane.Namespace, dataplane.Node, pod, service, endpointSlice, or a policy
}

// Mesh is what Contents has to know beside the objects.
type Mesh struct {
	TrustDomain   string
	RootNamespace string
	ClusterDomain string // of service host names; "" is cluster.local
	Cluster       string // the name of this cluster, "" when it has none
}

// Conflict is an object that could not be taken as written beside another.
type Conflict struct {
	Key   Key
	Cause string
}

// Workload returns the pod, and whether o is one. What depends on other objects is not set.
func (o Object) Workload() (dataplane.Workload, bool) {
	p, ok := o.value.(pod)
	return p.Workload, ok
}

// Namespace returns the namespace, and whether o is one.
func (o Object) Namespace() (dataplane.Namespace, bool) {
	n, ok := o.value.(dataplane.Namespace)
	return n, ok
}

// Invalid says why a policy could not be read as written, "" when it could.
func (o Object) Invalid() string {
	switch value := o.value.(type) {
	case dataplane.AuthorizationPolicy:
		return value.Invalid
	case dataplane.PeerAuthentication:
		return value.Invalid
	default:
		return ""
	}
}
