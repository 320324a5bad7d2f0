// Package discovery says what the agent needs of a source of cluster state. Its folders are
// the sources: a directory of YAML, the Kubernetes API.
package discovery

import (
	"context"
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane"
)

// Source publishes Snapshots of one cluster.
type Source interface {
	// Run publishes to store until ctx ends, and then returns nil. It is called once.
	// Nothing is published before all policies are known; what was known last stays in force
	// while the source is away.
	Run(ctx context.Context, store *dataplane.Store) error
	// Problems lists what is wrong now. Safe for concurrent use.
	Problems() []Problem
}

// Problem is something that the source cannot take as it is.
type Problem struct {
	Where string `json:"where"` // file and line, or kind, namespace and name
	Cause string `json:"cause"`
}

func (p Problem) String() string { return p.Where + ": " + p.Cause }

// Publisher tells the agents of all nodes which pods of this one take tunnels.
type Publisher interface {
	// PublishCaptured makes uids the published set: pods of this node that are not in it are
	// unpublished. udp are those of them that take UDP in tunnels as well. It may be called
	// again with the same sets.
	PublishCaptured(ctx context.Context, uids, udp []string) error
}

// Sandbox is the network of a pod, as the container runtime made it.
type Sandbox struct {
	Pod   dataplane.Name
	UID   string // of the pod; "" when the runtime did not say
	NetNS string
	Addrs []netip.Addr
}

// Sandboxes is a Source that takes in, from the node itself, pods whose network is being set
// up: before the cluster knows their addresses.
type Sandboxes interface {
	// Started adds what is known of a pod's sandbox to the pod until the cluster has its
	// address, and returns the pod as the next Snapshots show it. It asks the cluster for a
	// pod that it has not seen yet.
	Started(ctx context.Context, sandbox Sandbox) (dataplane.Workload, error)
	// Stopped takes it back: the sandbox is gone. UID "" means any pod of that name.
	Stopped(pod dataplane.Name, uid string)
}
