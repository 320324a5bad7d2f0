package ca

import "context"

// Source is where an authority's key and certificates come from: a directory (Dir), or a
// Secret that somebody watches. It checks nothing of what is in them, the Authority does.
type Source interface {
	// Load returns the newest material.
	Load() (Material, error)
	// Run calls changed, never twice at a time, whenever Load may return something else,
	// until ctx ends.
	Run(ctx context.Context, changed func()) error
	// Close releases what the source holds. It may be called again.
	Close() error
	// String says where it is, for logs and errors.
	String() string
}

// Material is one set of what an authority consists of.
type Material struct {
	Key   Part // the signing key
	Cert  Part // the signing certificate, and perhaps what leads from it to a root
	Chain Part // what else leads to a root; may be empty
	Roots Part // every root that agents are to trust
}

// Part is PEM, and the name that it has where it comes from.
type Part struct {
	Name string
	PEM  []byte
}

// Names of the parts in the layout of Istio's cacerts.
const (
	KeyFile   = "ca-key.pem"
	CertFile  = "ca-cert.pem"
	ChainFile = "cert-chain.pem"
	RootFile  = "root-cert.pem" // the roots for agents
)
