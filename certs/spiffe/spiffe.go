// Package spiffe holds the workload identity that Raceway's certificates carry:
// a SPIFFE ID of the form that Istio gives to Kubernetes workloads,
// spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>.
package spiffe

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// ID is a Kubernetes workload's SPIFFE identity. The zero ID means "no identity";
// it is comparable and usable as a map key.
type ID struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// IsZero reports whether id is absent.
func (id ID) IsZero() bool { return id == ID{} }

// String is the URI form, and "" for the zero ID.
func (id ID) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// Principal is the form that Istio's policies use: the URI without its scheme.
func (id ID) Principal() string {
	return strings.TrimPrefix(id.String(), "spiffe://")
}

// URL is the URI form as a certificate's SAN wants it.
func (id ID) URL() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain, Path: "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount}
}

// MarshalText and UnmarshalText make an ID a plain string in JSON and YAML.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText parses the URI form; the empty text is the zero ID.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ID{}
		return nil
	}
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// maxLength is the longest SPIFFE ID that implementations must take (SPIFFE-ID section 2.3).
const maxLength = 2048

// Parse reads spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>.
// Anything else (a port, a query, percent-encoding, an empty segment, a trust domain
// with a character that the SPIFFE-ID specification, section 2.1, forbids) is an error.
func Parse(uri string) (ID, error) {
	if len(uri) > maxLength {
		return ID{}, fmt.Errorf("SPIFFE ID of %d bytes is longer than %d", len(uri), maxLength)
	}
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	if !ok {
		return ID{}, fmt.Errorf("SPIFFE ID %q does not start with spiffe://", uri)
	}
	part := strings.Split(rest, "/")
	if len(part) != 5 || part[1] != "ns" || part[3] != "sa" {
		return ID{}, fmt.Errorf("SPIFFE ID %q is not spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>", uri)
	}
	id := ID{TrustDomain: part[0], Namespace: part[2], ServiceAccount: part[4]}
	if err := id.Validate(); err != nil {
		return ID{}, fmt.Errorf("SPIFFE ID %q: %w", uri, err)
	}
	return id, nil
}

// Validate reports the first part of id that a SPIFFE ID cannot carry.
func (id ID) Validate() error {
	if err := validateSegment("trust domain", id.TrustDomain, false); err != nil {
		return err
	}
	if err := validateSegment("namespace", id.Namespace, true); err != nil {
		return err
	}
	return validateSegment("service account", id.ServiceAccount, true)
}

func validateSegment(what, s string, upper bool) error {
	if s == "" {
		return fmt.Errorf("%s is empty", what)
	}
	if s == "." || s == ".." {
		return fmt.Errorf("%s %q is a relative path segment", what, s)
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '-', c == '_':
		case upper && 'A' <= c && c <= 'Z':
		default:
			return fmt.Errorf("%s %q has the character %q", what, s, c)
		}
	}
	return nil
}

// ErrURISANs marks a certificate that has not exactly one URI SAN (X509-SVID section 2).
var ErrURISANs = errors.New("certificate must have exactly one URI SAN")

// FromCertificate returns the identity that a leaf certificate carries.
func FromCertificate(leaf *x509.Certificate) (ID, error) {
	if len(leaf.URIs) != 1 {
		return ID{}, fmt.Errorf("%w, this one has %d", ErrURISANs, len(leaf.URIs))
	}
	return Parse(leaf.URIs[0].String())
}
