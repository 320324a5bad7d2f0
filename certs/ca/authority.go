// Package ca is the mesh's signing authority: it certifies workload identities over keys
// that it never sees, and decides nothing about who may have which. Its key and certificates
// come from a Source, which is watched: a set that does not fit together leaves the last good
// one in force.
//
// # On disk
//
// A Dir has the layout of Istio's `cacerts` secret, so that one made for istiod serves here
// too:
//
//	ca-key.pem      the signing key, 0600 (or readable for its group, as Kubernetes mounts it)
//	ca-cert.pem     the signing certificate: a root or an intermediate
//	cert-chain.pem  what leads from it to a root; may be missing or empty under a root
//	root-cert.pem   every root that agents are to trust; public, 0644
//
// An empty directory gets a new root. The files are first made in a directory of their own,
// ".making", which is renamed to ".made" when all are on disk: that is the moment at which
// the authority exists. A start after a crash throws ".making" away and completes ".made".
//
// # Rotating the root
//
// Every reply carries all of root-cert.pem, so old and new roots are served together:
//
//  1. Append the new root to root-cert.pem, and wait until every agent has it.
//  2. Replace ca-key.pem, ca-cert.pem and cert-chain.pem by the new ones (in Kubernetes: one
//     update of the secret). Leaves are signed under the new root from now on, and accepted,
//     as those under the old one still are.
//  3. When the longest lifetime (Config.MaxTTL) has passed, remove the old root from
//     root-cert.pem.
//
// An intermediate is replaced by step 2 alone.
package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Config of an Authority.
type Config struct {
	Source      Source        // of the key and the certificates; required
	TrustDomain string        // the only one that identities are certified for; required
	TTL         time.Duration // lifetime of a leaf that asks for none; 0: 24 h, or MaxTTL if that is shorter
	MaxTTL      time.Duration // longest lifetime of a leaf; 0: TTL
	Backdate    time.Duration // how far a leaf's validity begins in the past, for clocks that are behind; 0: 2 min
	Log         *slog.Logger  // nil: none
}

const defaultBackdate = 2 * time.Minute

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	usual := 24 * time.Hour
	if c.MaxTTL > 0 {
		usual = min(usual, c.MaxTTL)
	}
	set(&c.TTL, usual)
	set(&c.MaxTTL, c.TTL)
	set(&c.Backdate, defaultBackdate)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate joins every complaint about c.
func (c Config) Validate() error {
	var errs []error
	if c.Source == nil {
		errs = append(errs, errors.New("ca: no source of credentials"))
	}
	if err := (spiffe.ID{TrustDomain: c.TrustDomain, Namespace: "n", ServiceAccount: "s"}).Validate(); err != nil {
		errs = append(errs, fmt.Errorf("ca: %w", err))
	}
	if c.TTL < 0 || c.MaxTTL < 0 || c.Backdate < 0 {
		errs = append(errs, errors.New("ca: a duration is negative"))
	}
	if d := c.withDefaults(); d.TTL > d.MaxTTL {
		errs = append(errs, fmt.Errorf("ca: the default lifetime %s is longer than the longest, %s", d.TTL, d.MaxTTL))
	}
	return errors.Join(errs...)
}

// Authority signs. Its methods are safe for concurrent use.
type Authority struct {
	cfg     Config
	current atomic.Pointer[credentials]
}

// New takes over what cfg.Source holds. Run follows its changes; the source is closed by
// whoever opened it.
func New(cfg Config) (*Authority, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Authority{cfg: cfg.withDefaults()}
	creds, err := a.load()
	if err != nil {
		return nil, fmt.Errorf("certificate authority in %s: %w", cfg.Source, err)
	}
	a.current.Store(creds)
	a.cfg.Log.Info("certificate authority ready", "source", cfg.Source.String(), "signer", creds.cert.Subject.String(), "root", creds.isRoot(), "expires", creds.notAfter, "roots", len(creds.roots))
	return a, nil
}

func (a *Authority) load() (*credentials, error) {
	m, err := a.cfg.Source.Load()
	if err != nil {
		return nil, err
	}
	creds, err := parse(m)
	if err != nil {
		return nil, err
	}
	creds.replaced = make(chan struct{})
	return creds, nil
}

// Run takes over what changes in the source, and warns while the end is near, until ctx ends.
func (a *Authority) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		a.warnOfExpiry(ctx)
		return nil
	})
	var lastErr string
	group.Go(func() error {
		return a.cfg.Source.Run(ctx, func() {
			if err := a.reload(); err != nil {
				if err.Error() != lastErr {
					a.cfg.Log.Error("certificate authority not reloaded, the last good one stays in force", "source", a.cfg.Source.String(), "error", err)
				}
				lastErr = err.Error()
				return
			}
			lastErr = ""
		})
	})
	return group.Wait()
}

func (a *Authority) reload() error {
	creds, err := a.load()
	if err != nil {
		return err
	}
	old := a.current.Load()
	if creds.equal(old) {
		return nil
	}
	a.current.Store(creds)
	close(old.replaced)
	a.cfg.Log.Info("certificate authority reloaded", "signer", creds.cert.Subject.String(), "root", creds.isRoot(), "expires", creds.notAfter, "roots", len(creds.roots))
	return nil
}

const (
	expiryInterval = time.Hour // between warnings
	expiryNotice   = 30 * 24 * time.Hour
)

func (a *Authority) warnOfExpiry(ctx context.Context) {
	tick := time.NewTicker(expiryInterval)
	defer tick.Stop()
	for {
		if creds := a.current.Load(); creds.endIsNear(time.Now()) {
			a.cfg.Log.Warn("the signing certificate, or one above it, expires soon, and no certificate outlives it", "source", a.cfg.Source.String(), "signer", creds.cert.Subject.String(), "expires", creds.notAfter)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// TrustDomain is the only one that identities are certified for.
func (a *Authority) TrustDomain() string { return a.cfg.TrustDomain }

// Expires is when the signing certificate, or the first above it, does. No leaf outlives it.
func (a *Authority) Expires() time.Time { return a.current.Load().notAfter }

// Roots are those that agents are to trust.
func (a *Authority) Roots() []*x509.Certificate { return a.current.Load().roots }

// Bundle is the roots as PEM, and a channel that is closed when others may have come into
// force.
func (a *Authority) Bundle() ([]byte, <-chan struct{}) {
	creds := a.current.Load()
	return encode(creds.roots...), creds.replaced
}

// Issued is a certificate with its way to the roots.
type Issued struct {
	// Chain is PEM: the leaf, then the intermediates one by one, and last all roots
	// together in one element, which is what Istio's agents take it for.
	Chain               [][]byte
	Serial              string // in hex
	NotBefore, NotAfter time.Time
}

// ErrExpired says that the signing certificate is past its validity.
var ErrExpired = errors.New("the signing certificate has expired")

// Sign certifies id over the key of the PEM encoded request, of which it takes nothing else.
// A ttl of zero or less is the default, and one over the longest is cut. A request or an
// identity that cannot be certified gives a *RequestError.
func (a *Authority) Sign(csrPEM []byte, id spiffe.ID, ttl time.Duration) (Issued, error) {
	if err := id.Validate(); err != nil {
		return Issued{}, &RequestError{fmt.Errorf("identity: %w", err)}
	}
	if id.TrustDomain != a.cfg.TrustDomain {
		return Issued{}, &RequestError{fmt.Errorf("identity %s is not of the trust domain %s", id, a.cfg.TrustDomain)}
	}
	pub, err := requestedKey(csrPEM)
	if err != nil {
		return Issued{}, &RequestError{err}
	}
	creds := a.current.Load()
	leaf, err := a.issue(creds, &x509.Certificate{
		// No subject: crypto/x509 then makes the SAN critical, as RFC 5280 section
		// 4.2.1.6 and X509-SVID section 2 want it.
		URIs:        []*url.URL{id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, pub, ttl)
	if err != nil {
		return Issued{}, err
	}
	chain := [][]byte{encode(leaf)}
	for _, c := range creds.intermediates {
		chain = append(chain, encode(c))
	}
	chain = append(chain, encode(creds.roots...))
	return Issued{Chain: chain, Serial: fmt.Sprintf("%x", leaf.SerialNumber), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}, nil
}

// issue signs a leaf of the given names and usages.
func (a *Authority) issue(creds *credentials, template *x509.Certificate, pub crypto.PublicKey, ttl time.Duration) (*x509.Certificate, error) {
	now := time.Now()
	if !now.Before(creds.notAfter) {
		return nil, fmt.Errorf("%w at %s: put a new one into %s", ErrExpired, creds.notAfter.UTC().Format(time.RFC3339), a.cfg.Source)
	}
	if ttl <= 0 {
		ttl = a.cfg.TTL
	}
	template.NotBefore = latest(now.Add(-a.cfg.Backdate), creds.notBefore)
	template.NotAfter = earliest(now.Add(min(ttl, a.cfg.MaxTTL)), creds.notAfter)
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageDigitalSignature
	// Without a serial number CreateCertificate draws one at random, of 20 octets at most
	// (RFC 5280 section 4.1.2.2).
	der, err := x509.CreateCertificate(rand.Reader, template, creds.cert, pub, creds.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the signed certificate: %w", err)
	}
	return leaf, nil
}

func encode(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
