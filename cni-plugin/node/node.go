// Package node is what the CNI plugin and the agent of its node say to each other: JSON over
// HTTP on a unix socket that root alone can use.
//
//	kubelet → container runtime → raceway-cni ──POST /v1/add──→ agent: Handler.Add
package node

import (
	"context"
	"errors"
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// Handler is the agent. Its methods may be called concurrently, and again for the same
// sandbox: the runtime tries again what failed.
type Handler interface {
	// Add returns true when capture of the sandbox's pod is in force, and false at once when
	// the pod is not to be enrolled. An error that wraps ErrNotReady says that the agent
	// cannot tell yet.
	Add(ctx context.Context, s discovery.Sandbox) (captured bool, err error)
	// Check reports what keeps the sandbox from being as Add is to leave it.
	Check(ctx context.Context, s discovery.Sandbox) error
	// Del says that the sandbox is gone. One that was never added is no error.
	Del(ctx context.Context, s discovery.Sandbox) error
}

var (
	// ErrAway says that no agent can be reached on this node, or that it went while it was asked.
	ErrAway = errors.New("raceway agent is not running on this node")
	// ErrNotReady says that the agent has not seen the cluster yet.
	ErrNotReady = errors.New("raceway agent has not seen the cluster yet")
)

// Verbs, as paths.
const (
	pathAdd   = "/v1/add"
	pathCheck = "/v1/check"
	pathDel   = "/v1/del"
)

// sandbox is a discovery.Sandbox as it is written.
type sandbox struct {
	Pod   dataplane.Name `json:"pod"`
	UID   string         `json:"uid,omitempty"`
	NetNS string         `json:"netns,omitempty"`
	Addrs []netip.Addr   `json:"addrs,omitempty"`
}

// answer is the body of every answer.
type answer struct {
	Captured bool   `json:"captured,omitempty"`
	Error    string `json:"error,omitempty"`
}
