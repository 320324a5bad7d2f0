package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/certs"
)

// credentials are material that fits together.
type credentials struct {
	key                 crypto.Signer
	cert                *x509.Certificate
	intermediates       []*x509.Certificate // what peers need beside the roots, the signing one first
	roots               []*x509.Certificate
	notBefore, notAfter time.Time     // of the whole way to the root
	replaced            chan struct{} // closed when others came into force
}

func (c *credentials) isRoot() bool { return selfIssued(c.cert) }

// endIsNear says that a new signing certificate is due: a month before the end, or, of one
// that does not live for months, in the last fifth of its life.
func (c *credentials) endIsNear(now time.Time) bool {
	return c.notAfter.Sub(now) < min(expiryNotice, c.notAfter.Sub(c.notBefore)/5)
}

func (c *credentials) equal(other *credentials) bool {
	return c.cert.Equal(other.cert) &&
		slices.EqualFunc(c.intermediates, other.intermediates, (*x509.Certificate).Equal) &&
		slices.EqualFunc(c.roots, other.roots, (*x509.Certificate).Equal)
}

func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// parse reads the material and checks that its parts fit together.
func parse(m Material) (*credentials, error) {
	key, err := parseKey(m.Key.PEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Key.Name, err)
	}
	signing, err := m.Cert.certificates()
	if err != nil {
		return nil, err
	}
	roots, err := m.Roots.certificates()
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	if len(bytes.TrimSpace(m.Chain.PEM)) > 0 {
		if chain, err = m.Chain.certificates(); err != nil {
			return nil, err
		}
	}
	creds := &credentials{key: key, cert: signing[0], roots: unique(roots)}
	if err := creds.verify(m, slices.Concat(signing, chain)); err != nil {
		return nil, fmt.Errorf("%s: %w", m.Cert.Name, err)
	}
	return creds, nil
}

func (p Part) certificates() ([]*x509.Certificate, error) {
	parsed, err := certs.ParseCertificates(p.PEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name, err)
	}
	return parsed, nil
}

// unique keeps the first of equal certificates.
func unique(all []*x509.Certificate) []*x509.Certificate {
	var kept []*x509.Certificate
	for _, c := range all {
		if !slices.ContainsFunc(kept, c.Equal) {
			kept = append(kept, c)
		}
	}
	return kept
}

// verify checks the signing certificate and finds out how long its way to a root is valid.
func (c *credentials) verify(m Material, chain []*x509.Certificate) error {
	pub, ok := c.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(c.key.Public()) {
		return fmt.Errorf("it is not the certificate of the key in %s", m.Key.Name)
	}
	if err := checkKey(c.cert.PublicKey); err != nil {
		return err
	}
	if !c.cert.BasicConstraintsValid || !c.cert.IsCA || c.cert.KeyUsage != 0 && c.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("it is not a CA certificate: it may not sign others")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range c.roots {
		if !r.BasicConstraintsValid || !r.IsCA {
			return fmt.Errorf("%s holds %q, which is not a CA certificate", m.Roots.Name, r.Subject)
		}
		roots.AddCert(r)
	}
	for _, i := range chain {
		intermediates.AddCert(i)
		known := slices.ContainsFunc(c.intermediates, i.Equal)
		// What issued itself is a root, and roots go last in a reply.
		if !selfIssued(i) && !known {
			c.intermediates = append(c.intermediates, i)
		}
	}
	ways, err := c.cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("chain to %s by %s: %w", m.Roots.Name, m.Chain.Name, err)
	}
	for _, way := range ways { // of several, the one that lasts longest
		notBefore, notAfter := way[0].NotBefore, way[0].NotAfter
		for _, above := range way[1:] {
			notBefore = latest(notBefore, above.NotBefore)
			notAfter = earliest(notAfter, above.NotAfter)
		}
		if notAfter.After(c.notAfter) {
			c.notBefore, c.notAfter = notBefore, notAfter
		}
	}
	return nil
}

// parseKey reads the forms that openssl writes.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("no PEM encoded private key found")
		}
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS": // `openssl ecparam -genkey` writes them in front
			data = rest
			continue
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			return nil, fmt.Errorf("PEM block is a %q, not an unencrypted private key", block.Type)
		}
		if err != nil {
			return nil, fmt.Errorf("parse private key: %w", err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a key of type %T cannot sign", key)
		}
		return signer, nil
	}
}
