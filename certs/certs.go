// Package certs holds the mesh's credentials on a node: a Keeper gets and refreshes one
// certificate per workload identity, and makes the TLS configurations that present them and
// check a peer's.
//
//	          Want(id)                         ClientTLS / ServerTLS
//	agent ───────────────► Keeper ◄───────────────────────────── handshake
//	                       │    ▲                                   │
//	             key, CSR  │    │ leaf + chain                      │ VerifyConnection
//	                       ▼    │                                   ▼
//	                       Signer (certs/istio)        RootSource, RevocationSource
//
// Keys never leave memory and are made anew at every refresh. A certificate that is still
// valid stays in use while the CA is away; without one no handshake succeeds, and the error
// says whose certificate is missing, since when and why. Connections that exist are not
// touched by any of this: only a revocation ends them, and that is the agent's to do, when
// Changed tells and Revoked confirms.
//
// # Rotating a root
//
// A RootSource may hold several roots for a trust domain, and a chain to any of them counts.
// Add the new root beside the old one on every node, then let the CA sign with the new one,
// and remove the old root when the last certificate under it has expired (the CA's maximum
// TTL). A Keeper that sees its own certificate lose its root asks for another one at once.
package certs

import (
	"context"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Signer is a certificate authority as the Keeper needs it.
type Signer interface {
	// Sign returns the certificate for id over the key of the PEM encoded request, as PEM:
	// leaf first, then intermediates, roots last; an element may hold several
	// certificates. The lifetime may differ from ttl. Sign is called concurrently.
	Sign(ctx context.Context, id spiffe.ID, csrPEM []byte, ttl time.Duration) (chainPEM [][]byte, err error)
}

// RootSource is where trust comes from.
type RootSource interface {
	// Load returns the roots in force, never nil, and a channel that is closed when
	// others came into force.
	Load() (*Bundle, <-chan struct{})
}

// RevocationSource is where revocations come from.
type RevocationSource interface {
	// Load returns the revocations in force, never nil, and a channel that is closed when
	// others came into force.
	Load() (*Revocations, <-chan struct{})
}
