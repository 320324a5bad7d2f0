package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

// nodeRule lets a node impersonate the identities of its own pods, as the CA itself sees the
// cluster: id is granted if and only if some live pod on the node has it. A pod that the CA
// does not know yet is refused, and its agent asks again.
type nodeRule struct {
	store *dataplane.Store
}

var errNoSnapshot = errors.New("the cluster's state has not been read yet")

// Authorize implements istio.Authorizer.
func (r nodeRule) Authorize(_ context.Context, caller istio.Caller, id spiffe.ID) error {
	snapshot, _ := r.store.Load()
	if snapshot == nil {
		return errNoSnapshot
	}
	node := caller.Node
	if node == "" { // also where pods are that are not scheduled yet
		return &istio.DeniedError{Reason: "the caller is no node"}
	}
	workloads := snapshot.Workloads()
	for i := range workloads {
		if w := &workloads[i]; w.Node == node && w.Identity == id && w.Live() {
			return nil
		}
	}
	return &istio.DeniedError{Reason: fmt.Sprintf("no live pod of service account %s/%s in trust domain %s is known on that node", id.Namespace, id.ServiceAccount, id.TrustDomain)}
}
