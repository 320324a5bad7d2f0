// Package kube makes Snapshots from the API server of a Kubernetes cluster. It is the only
// part of the data plane that talks to it.
//
//	reflectors ──convert──► object.Set ──┐ overlaid by sandboxes and annotations
//	                            ▲        ├──► dataplane.Snapshot ──► Store
//	last-good file ──at start───┘        └──► last-good file
//
// Objects are converted as they arrive and kept once; what the data plane does not read is
// dropped at the door. Nothing is published before every kind is known, from the API server
// or from the file of the last good snapshot. While the API server is away, what was known
// last stays in force.
//
// # Rights
//
// All that the agent's service account needs. "own" means that a write is only ever for an
// object of the agent's own node; an admission policy can hold it to that.
//
//	where             group               resource                       verbs              for
//	cluster           ""                  namespaces                     get list watch     enrolment
//	cluster           ""                  nodes                          list watch         addresses, zones
//	cluster           ""                  pods                           get list watch     workloads
//	cluster           ""                  pods                           patch (own)        annotations raceway.dev/*
//	cluster           ""                  services                       list watch         routes
//	cluster           discovery.k8s.io    endpointslices                 list watch         endpoints
//	cluster           security.istio.io   authorizationpolicies          list watch         policy
//	cluster           security.istio.io   peerauthentications            list watch         policy
//	cluster           security.istio.io   authorizationpolicies/status   patch              status of policies
//	cluster           security.istio.io   peerauthentications/status     patch              status of policies
//	cluster           events.k8s.io       events                         create             Events of policies
//	agent's namespace coordination.k8s.io leases                         create             who writes status
//	agent's namespace coordination.k8s.io leases raceway-policy-status   get update         who writes status
//	mesh config's ns  ""                  configmaps (its name only)     list watch         uninstallation
//	cluster           ""                  nodes                          get patch (own)    with a startup taint only
//
// Discovery (GET /apis) is used too, which every authenticated client may.
package kube
