// Package istio speaks istio.v1.auth.IstioCertificateService over gRPC and TLS, as istiod,
// cert-manager's istio-csr and ztunnel do: Client asks such a service for the certificates
// of a node's workloads, and Server is one.
//
// A node agent sends a bearer token that says which node it is, and names in the metadata
// ImpersonatedIdentity whose certificate it wants. Who may have what is the Authorizer's to
// decide, from what it knows itself and never from what the caller says.
package istio

// Names on the wire.
const (
	impersonatedIdentity = "ImpersonatedIdentity"
	authorizationHeader  = "authorization"
	bearerPrefix         = "Bearer "
	clusterHeader        = "clusterid"
)

// minTokenLength is the shortest bearer token: 32 characters of hex are 128 bits.
const minTokenLength = 32
