package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
)

// verdict is whether a pod must not start without the agent, and why.
type verdict struct {
	wanted bool
	reason string // of a wanted one
}

// decide finds out without the agent whether the pod is to be enrolled: from the API server,
// else from the node's last state. What nobody knows is held up, for a pod that starts in
// plaintext cannot be taken back. agentErr is why the agent could not be asked.
func (a *attachment) decide(ctx context.Context, agentErr error) verdict {
	state, stateErr := install.ReadState(a.entry.StateDir)
	if stateErr == nil && state.Cluster.Released {
		return verdict{}
	}
	pod := a.sandbox.Pod
	labels, apiErr := ask(ctx, state.API, pod)
	switch {
	case apiErr == nil:
		wanted := dataplane.WantsEnrolment(labels.pod, labels.namespace, state.Cluster.EnrollLabels...)
		return verdict{wanted, "it is to be enrolled, says the API server"}
	case errors.Is(apiErr, errUninstalled) && errors.Is(agentErr, node.ErrAway):
		a.uninstall()
		return verdict{}
	case stateErr != nil:
		return verdict{true, fmt.Sprintf("nobody knows whether it is to be enrolled: %v", stateErr)}
	}
	wanted, known := state.Cluster.Wants(pod.Namespace, a.sandbox.UID)
	switch {
	case known:
		return verdict{wanted, fmt.Sprintf("it is to be enrolled by what this node knew last (%v)", apiErr)}
	case slices.Contains(state.Exempt, pod.Namespace):
		return verdict{}
	}
	return verdict{true, fmt.Sprintf("nobody knows whether it is to be enrolled: its namespace is newer than what this node knows (%v)", apiErr)}
}

// uninstall takes the plugin off this node, which nobody else is left to do. What goes wrong
// is tried again with the next pod, and none is held up for it.
//
// Whoever may have configuration of their own run (a NetworkAttachmentDefinition of Multus)
// decides where the state is, and so what it says. Nothing is deleted for it but what lies
// beside the state, in the very directory that it was read from.
func (a *attachment) uninstall() {
	self, err := os.Executable()
	if err != nil || a.entry.StateDir == "" {
		return
	}
	home, name := filepath.Split(filepath.Clean(a.entry.StateDir))
	beside, err := os.OpenRoot(home)
	if err != nil {
		return
	}
	defer func() { _ = beside.Close() }()
	state, err := install.ReadStateIn(beside, name)
	if err != nil || state.ConfDir == "" {
		return
	}
	for _, file := range state.Files {
		if dir, file := filepath.Split(file); dir == home {
			_ = beside.Remove(file)
		}
	}
	// The state goes last: it says what else there is.
	if install.Remove(install.Config{ConfDir: state.ConfDir, BinDir: filepath.Dir(self)}) == nil {
		_ = beside.RemoveAll(name)
	}
}

// expired reports whether a token's time is over.
func expired(api install.API, now time.Time) bool {
	return !api.Expires.IsZero() && !now.Before(api.Expires)
}
