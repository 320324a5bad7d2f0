// Package kube is what raceway-ca needs of a Kubernetes API server: who calls (TokenReview),
// which service accounts have a pod on the caller's node (Pods), where the authority's key is
// (a Secret), and where its roots are published (a ConfigMap). It alone of the CA imports
// client-go.
//
// # Rights
//
// The CA's service account needs, for the whole cluster:
//
//	authentication.k8s.io  tokenreviews  create
//	""                     pods          get, list, watch
//
// and in its own namespace, of the objects that --secret and --bundle-configmap name (a list or
// a watch of one object counts as one of that name):
//
//	""  secrets     get, list, watch   resourceNames: [raceway-ca]
//	""  secrets     create             (a name cannot limit it); not with --generate-root=false
//	""  configmaps  get, list, watch, patch   resourceNames: [raceway-ca-root]
//	""  configmaps  create             (a name cannot limit it)
//
// It never changes or deletes a Secret. To see that the API server answers it creates
// selfsubjectreviews, which everybody may by the ClusterRole system:basic-user.
//
// # When the API server is away
//
// No token can be reviewed then, so requests are answered with Unavailable; a caller that was
// reviewed within the last 30 seconds may still be served from what is known of the pods. The
// replica is not ready, and stays alive.
package kube
