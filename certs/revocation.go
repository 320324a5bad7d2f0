package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Revocations is a set of certificate revocation lists. It never changes.
type Revocations struct {
	lists []*revocationList
}

type revocationList struct {
	crl     *x509.RevocationList
	revoked map[string]time.Time // by the serial's bytes
	signed  sync.Map             // issuer's raw certificate -> whether it signed the list
}

// reasonRemoveFromCRL takes a certificate off hold (RFC 5280 section 5.3.1).
const reasonRemoveFromCRL = 8

// ParseRevocations reads CRLs: any number in PEM, or one in DER. Empty data is no list.
func ParseRevocations(data []byte) (*Revocations, error) {
	r := &Revocations{}
	if len(bytes.TrimSpace(data)) == 0 {
		return r, nil
	}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		if err := r.add(data); err != nil {
			return nil, err
		}
		return r, nil
	}
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			return nil, fmt.Errorf("PEM block %d is a %s, not an X509 CRL", len(r.lists)+1, block.Type)
		}
		if err := r.add(block.Bytes); err != nil {
			return nil, err
		}
		data = rest
	}
	if len(r.lists) == 0 || bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("PEM of the revocation list is damaged")
	}
	return r, nil
}

func (r *Revocations) add(der []byte) error {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("parse revocation list %d: %w", len(r.lists)+1, err)
	}
	// A list with a critical extension that is not understood must not be used (RFC 5280
	// section 5.2): delta and indirect lists are of that kind.
	known := []asn1.ObjectIdentifier{{2, 5, 29, 20}, {2, 5, 29, 35}} // CRL number, authority key id
	for _, ext := range crl.Extensions {
		if ext.Critical && !ext.Id.Equal(known[0]) && !ext.Id.Equal(known[1]) {
			return fmt.Errorf("revocation list of %s has the critical extension %s: only complete, direct lists are supported", crl.Issuer, ext.Id)
		}
	}
	list := &revocationList{crl: crl, revoked: make(map[string]time.Time, len(crl.RevokedCertificateEntries))}
	for _, e := range crl.RevokedCertificateEntries {
		if e.ReasonCode != reasonRemoveFromCRL {
			list.revoked[string(e.SerialNumber.Bytes())] = e.RevocationTime
		}
	}
	r.lists = append(r.lists, list)
	return nil
}

// Load makes Revocations a RevocationSource that never changes.
func (r *Revocations) Load() (*Revocations, <-chan struct{}) { return r, nil }

// stale lists the issuers whose list should have been replaced by now. What such a list
// revokes stays revoked; what it does not know yet cannot be helped.
func (r *Revocations) stale(now time.Time) []string {
	var issuers []string
	for _, l := range r.lists {
		if next := l.crl.NextUpdate; !next.IsZero() && now.After(next) {
			issuers = append(issuers, l.crl.Issuer.String())
		}
	}
	return issuers
}

// check returns when cert was revoked, false when it is not. The issuer is nil when it is
// not at hand: then name and key id alone must match, which errs on the side of revoked.
func (r *Revocations) check(cert, issuer *x509.Certificate) (time.Time, bool) {
	for _, l := range r.lists {
		at, listed := l.revoked[string(cert.SerialNumber.Bytes())]
		if !listed || !bytes.Equal(l.crl.RawIssuer, cert.RawIssuer) {
			continue
		}
		if issuer != nil {
			if l.signedBy(issuer) {
				return at, true
			}
			continue
		}
		if len(l.crl.AuthorityKeyId) == 0 || len(cert.AuthorityKeyId) == 0 || bytes.Equal(l.crl.AuthorityKeyId, cert.AuthorityKeyId) {
			return at, true
		}
	}
	return time.Time{}, false
}

func (l *revocationList) signedBy(issuer *x509.Certificate) bool {
	key := string(issuer.Raw)
	if known, ok := l.signed.Load(key); ok {
		return known.(bool)
	}
	ok := l.crl.CheckSignatureFrom(issuer) == nil
	l.signed.Store(key, ok)
	return ok
}
