package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// PeerIdentity returns the identity that the peer of an established connection proved.
func PeerIdentity(state tls.ConnectionState) (spiffe.ID, error) {
	if len(state.PeerCertificates) == 0 {
		return spiffe.ID{}, refuse(CauseNoCertificate, spiffe.ID{}, "no certificate was presented")
	}
	id, err := spiffe.FromCertificate(state.PeerCertificates[0])
	if err != nil {
		return spiffe.ID{}, refuse(CauseURISAN, spiffe.ID{}, "%w", err)
	}
	return id, nil
}

// verifier decides whether a certificate chain proves an identity.
type verifier struct {
	trustDomain string
	aliases     []string
	federated   []string
	roots       RootSource
	revocations RevocationSource // may be nil
}

// connection checks all that crypto/tls was told to leave out (it can neither choose roots by
// the peer's identity nor match a URI SAN): everything but the handshake signature itself.
// expected is who may answer; empty accepts every identity of an accepted trust domain.
func (v *verifier) connection(state tls.ConnectionState, usage x509.ExtKeyUsage, expected []spiffe.ID) error {
	id, err := PeerIdentity(state)
	if err != nil {
		return err
	}
	if state.NegotiatedProtocol != protocol && state.NegotiatedProtocol != protocolQUIC {
		return refuse(CauseALPN, id, "it offers no %q in ALPN", protocol)
	}
	if err := v.chain(id, state.PeerCertificates, usage); err != nil {
		return err
	}
	if len(expected) > 0 && !v.isOneOf(id, expected) {
		return refuse(CauseWrongIdentity, id, "expected %s", join(expected))
	}
	return nil
}

// live verifies a connection's chain against the trust of now. On which side of the handshake
// the peer was is not known any more, and its certificate was good for that side.
func (v *verifier) live(state tls.ConnectionState) error {
	id, err := PeerIdentity(state)
	if err != nil {
		return err
	}
	return v.chain(id, state.PeerCertificates, x509.ExtKeyUsageAny)
}

// chain verifies certs, leaf first, against the roots of id's own trust domain.
func (v *verifier) chain(id spiffe.ID, certs []*x509.Certificate, usage x509.ExtKeyUsage) error {
	leaf := certs[0]
	if !v.accepts(id.TrustDomain) {
		return refuse(CauseTrustDomain, id, "trust domain %s is neither the own one (%s), nor an alias, nor federated", id.TrustDomain, v.trustDomain)
	}
	// X509-SVID section 5.2: a leaf is no CA and may not sign certificates or CRLs.
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return refuse(CauseUsage, id, "a signing certificate is not a workload's")
	}
	intermediates := x509.NewCertPool()
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	now := time.Now()
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         v.rootsOf(id.TrustDomain).pool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return explain(id, err, now)
	}
	for _, chain := range chains {
		if err = v.revoked(id, chain); err == nil {
			return nil
		}
	}
	return err
}

// explain gives a chain's failure its cause and the operator's likely remedy.
func explain(id spiffe.ID, err error, now time.Time) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil && now.Before(invalid.Cert.NotBefore):
		return refuse(CauseNotYetValid, id, "certificate %x is not valid before %s: compare the clocks of both nodes", invalid.Cert.SerialNumber, invalid.Cert.NotBefore.UTC().Format(time.RFC3339))
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil:
		return refuse(CauseExpired, id, "certificate %x expired at %s: its node may have lost the CA", invalid.Cert.SerialNumber, invalid.Cert.NotAfter.UTC().Format(time.RFC3339))
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return refuse(CauseUsage, id, "its extended key usage does not allow this side of a TLS connection")
	case errors.As(err, &unknown):
		return refuse(CauseUntrusted, id, "no chain to a root of trust domain %s: the nodes' trust roots may differ: %w", id.TrustDomain, err)
	default:
		return refuse(CauseUntrusted, id, "chain to the roots of trust domain %s: %w", id.TrustDomain, err)
	}
}

// accepts reports whether trust domain td may talk to this mesh.
func (v *verifier) accepts(td string) bool {
	return td == v.trustDomain || slices.Contains(v.aliases, td) || slices.Contains(v.federated, td)
}

// rootsOf returns the roots that alone count for td: its own, or for an alias without any,
// those of the trust domain that it is another name of.
func (v *verifier) rootsOf(td string) domainRoots {
	bundle, _ := v.roots.Load()
	roots, ok := bundle.domains[td]
	if !ok && slices.Contains(v.aliases, td) {
		roots, ok = bundle.domains[v.trustDomain]
	}
	if !ok { // x509 takes a nil pool for the system's roots
		roots.pool = x509.NewCertPool()
	}
	return roots
}

// isOneOf compares identities; one of the own trust domain is also expected under its aliases.
func (v *verifier) isOneOf(id spiffe.ID, expected []spiffe.ID) bool {
	if slices.Contains(expected, id) {
		return true
	}
	if !slices.Contains(v.aliases, id.TrustDomain) {
		return false
	}
	id.TrustDomain = v.trustDomain
	return slices.Contains(expected, id)
}

// revoked looks up every certificate of a chain but its root, which only the roots can revoke.
func (v *verifier) revoked(id spiffe.ID, chain []*x509.Certificate) error {
	if v.revocations == nil {
		return nil
	}
	lists, _ := v.revocations.Load()
	for i, cert := range chain[:len(chain)-1] {
		if at, ok := lists.check(cert, chain[i+1]); ok {
			return refuse(CauseRevoked, id, "certificate %x was revoked at %s", cert.SerialNumber, at.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// liveRevoked is revoked for a connection that exists: neither the time nor the presence of
// its root matter any more, so the chain is followed only as far as it can be.
func (v *verifier) liveRevoked(state tls.ConnectionState) error {
	if v.revocations == nil || len(state.PeerCertificates) == 0 {
		return nil
	}
	lists, _ := v.revocations.Load()
	if len(lists.lists) == 0 {
		return nil
	}
	id, err := PeerIdentity(state)
	if err != nil {
		return err
	}
	candidates := slices.Concat(state.PeerCertificates[1:], v.rootsOf(id.TrustDomain).certs)
	cert := state.PeerCertificates[0]
	for range len(state.PeerCertificates) {
		at := slices.IndexFunc(candidates, func(c *x509.Certificate) bool {
			return bytes.Equal(c.RawSubject, cert.RawIssuer) && cert.CheckSignatureFrom(c) == nil
		})
		var issuer *x509.Certificate
		if at >= 0 {
			issuer = candidates[at]
		}
		if when, ok := lists.check(cert, issuer); ok {
			return refuse(CauseRevoked, id, "certificate %x was revoked at %s", cert.SerialNumber, when.UTC().Format(time.RFC3339))
		}
		if issuer == nil || at >= len(state.PeerCertificates)-1 { // a root
			break
		}
		cert = issuer
	}
	return nil
}
