package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Bundle is the roots of every trust domain that is known. It never changes.
type Bundle struct {
	domains map[string]domainRoots
}

type domainRoots struct {
	pool  *x509.CertPool
	certs []*x509.Certificate
}

// NewBundle takes the roots by trust domain. A trust domain without roots, and a root that
// is no CA certificate (a leaf there would be an authority over itself), are errors.
func NewBundle(roots map[string][]*x509.Certificate) (*Bundle, error) {
	b := &Bundle{domains: make(map[string]domainRoots, len(roots))}
	for td, certs := range roots {
		if len(certs) == 0 {
			return nil, fmt.Errorf("trust domain %s has no root certificate", td)
		}
		pool := x509.NewCertPool()
		for _, c := range certs {
			if !c.BasicConstraintsValid || !c.IsCA {
				return nil, fmt.Errorf("trust domain %s: root %q (serial %x) is not a CA certificate", td, c.Subject, c.SerialNumber)
			}
			pool.AddCert(c)
		}
		b.domains[td] = domainRoots{pool: pool, certs: slices.Clone(certs)}
	}
	return b, nil
}

// TrustDomains lists, sorted, those that have roots.
func (b *Bundle) TrustDomains() []string { return slices.Sorted(maps.Keys(b.domains)) }

// Roots returns the roots of a trust domain, none when it is not known.
func (b *Bundle) Roots(trustDomain string) []*x509.Certificate { return b.domains[trustDomain].certs }

// equal reports whether both hold the same roots in the same order.
func (b *Bundle) equal(other *Bundle) bool {
	return maps.EqualFunc(b.domains, other.domains, func(x, y domainRoots) bool {
		return slices.EqualFunc(x.certs, y.certs, (*x509.Certificate).Equal)
	})
}

// Load makes a Bundle a RootSource that never changes.
func (b *Bundle) Load() (*Bundle, <-chan struct{}) { return b, nil }

// ParseCertificates reads the certificates of a PEM file, at least one. A block of another
// kind is an error: a private key among roots is a mistake to hear about.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		data = bytes.TrimSpace(data)
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is a %s, not a CERTIFICATE", len(certs)+1, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
		data = rest
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM encoded certificate found")
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, fmt.Errorf("PEM after certificate %d is damaged", len(certs))
	}
	return certs, nil
}
