package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// entry is one identity's certificate. Its Keeper's mutex guards all but id and kick.
//
//	pending ──► valid ──► (refresh due) ──► valid …
//	   │          │ CA away: stays valid, lastErr kept
//	   ▼          ▼
//	failed     expired ──► valid again when the CA answers
type entry struct {
	id       spiffe.ID
	wanted   time.Time
	stop     context.CancelFunc  // ends its goroutine; nil before that is started
	kick     chan struct{}       // refresh now
	updated  chan struct{}       // closed when anything below changes
	cert     *tls.Certificate    // nil before the first
	chain    []*x509.Certificate // what the CA replied with cert, leaf first
	obtained time.Time           // when cert was
	next     time.Time           // when the CA is asked again
	lastErr  error               // of the last request, nil when it succeeded
	failures int                 // in a row
}

func newEntry(id spiffe.ID) *entry {
	return &entry{id: id, wanted: time.Now(), kick: make(chan struct{}, 1), updated: make(chan struct{})}
}

func (e *entry) tell() {
	close(e.updated)
	e.updated = make(chan struct{})
}

func (e *entry) valid(now time.Time) bool {
	return e.cert != nil && !now.Before(e.cert.Leaf.NotBefore) && !now.After(e.cert.Leaf.NotAfter)
}

func (e *entry) missingSince(now time.Time) time.Time {
	if e.cert != nil && now.After(e.cert.Leaf.NotAfter) {
		return e.cert.Leaf.NotAfter
	}
	return e.wanted
}

func (e *entry) why(now time.Time) error {
	switch {
	case e.lastErr != nil:
		return e.lastErr
	case e.cert != nil && now.Before(e.cert.Leaf.NotBefore):
		return fmt.Errorf("not valid before %s: this node's clock was set back", e.cert.Leaf.NotBefore.UTC().Format(time.RFC3339))
	case e.cert != nil:
		return errors.New("expired while the CA was being asked for another")
	default:
		return errPending
	}
}

// keep gets a certificate for e and refreshes it until ctx ends.
func (k *Keeper) keep(ctx context.Context, e *entry) {
	due := time.NewTimer(0)
	defer due.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-due.C:
		case <-e.kick:
		}
		due.Reset(k.refresh(ctx, e))
	}
}

// refresh asks once and returns how long to wait before asking again.
func (k *Keeper) refresh(ctx context.Context, e *entry) time.Duration {
	select {
	case k.slots <- struct{}{}:
	case <-ctx.Done():
		return 0
	}
	cert, chain, err := k.obtain(ctx, e.id)
	<-k.slots
	if ctx.Err() != nil {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var wait time.Duration
	if e.lastErr = err; err != nil {
		wait = k.backoff(e.failures)
		e.failures++
		k.log.Warn("certificate not obtained", "identity", e.id.String(), "valid", e.valid(time.Now()), "failures", e.failures, "retryIn", wait, "error", err)
	} else {
		wait = refreshIn(time.Until(cert.Leaf.NotAfter))
		e.cert, e.chain, e.obtained, e.failures = cert, chain, time.Now(), 0
		k.log.Info("certificate obtained", "identity", e.id.String(), "serial", serial(cert.Leaf), "notAfter", cert.Leaf.NotAfter, "refreshIn", wait)
	}
	e.next = time.Now().Add(wait)
	e.tell()
	return wait
}

// refreshIn is half of what is left of a lifetime, a tenth more or less: a node's identities
// are wanted at once and should not all come back at once. The floor keeps the halves of an
// expiring CA's certificates from becoming a storm.
func refreshIn(left time.Duration) time.Duration {
	half := float64(left) / 2
	return max(time.Duration(half*(0.9+0.2*rand.Float64())), time.Second)
}

// backoff doubles with each failure up to its bound; the jitter takes off up to a half.
func (k *Keeper) backoff(failures int) time.Duration {
	pause := k.cfg.MaxBackoff
	if failures < 32 {
		pause = min(k.cfg.MinBackoff<<failures, k.cfg.MaxBackoff)
	}
	return time.Duration(float64(pause) * (1 - rand.Float64()/2))
}

// obtain makes a key, has it certified, and checks that what came back is what was asked for
// and what peers will accept.
func (k *Keeper) obtain(ctx context.Context, id spiffe.ID) (*tls.Certificate, []*x509.Certificate, error) {
	if err := id.Validate(); err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	// Our CA and istiod ignore the SAN of a request; istio-csr compares it.
	csr, err := x509.CreateCertificateRequest(cryptorand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, k.cfg.SignTimeout)
	defer cancel()
	reply, err := k.cfg.Signer.Sign(ctx, id, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), k.cfg.TTL)
	if err != nil {
		return nil, nil, err
	}
	chain, err := ParseCertificates(bytes.Join(reply, []byte("\n")))
	if err != nil {
		return nil, nil, fmt.Errorf("the CA's reply: %w", err)
	}
	if err := k.check(id, key, chain); err != nil {
		return nil, nil, fmt.Errorf("the CA's reply: %w", err)
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for i, c := range chain {
		// A peer has its roots already (RFC 8446 section 4.4.2). A new root that the old
		// one signed has another issuer than subject, and goes along.
		if i == 0 || !bytes.Equal(c.RawIssuer, c.RawSubject) {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
	}
	return cert, chain, nil
}

func (k *Keeper) check(id spiffe.ID, key *ecdsa.PrivateKey, chain []*x509.Certificate) error {
	leaf := chain[0]
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) {
		return errors.New("the certificate is for another key")
	}
	got, err := spiffe.FromCertificate(leaf)
	if err != nil {
		return err
	}
	if got != id {
		return fmt.Errorf("the certificate is for %s", got)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := k.verifier.chain(id, chain, usage); err != nil {
			return fmt.Errorf("our own roots do not accept it: %w", err)
		}
	}
	return nil
}

// renewDistrusted asks for another certificate wherever a peer with our roots and revocations
// would no longer accept the present one. That stays in use meanwhile: the peer may lag behind.
func (k *Keeper) renewDistrusted() {
	k.mu.Lock()
	chains := make(map[*entry][]*x509.Certificate, len(k.entries))
	for _, e := range k.entries {
		if e.valid(time.Now()) { // any other is being asked for already
			chains[e] = e.chain
		}
	}
	k.mu.Unlock()
	for e, chain := range chains {
		err := k.verifier.chain(e.id, chain, x509.ExtKeyUsageServerAuth)
		if err == nil {
			continue
		}
		k.mu.Lock()
		if e.chain[0] == chain[0] { // not replaced meanwhile
			e.lastErr = err
			e.tell()
			select {
			case e.kick <- struct{}{}:
			default:
			}
		}
		k.mu.Unlock()
	}
}

// State is what `raceway certificates` calls the condition of an identity's certificate.
type State string

// States of an identity's certificate.
const (
	StatePending State = "pending" // the CA has not answered yet
	StateValid   State = "valid"
	StateExpired State = "expired"
	StateFailed  State = "failed" // none yet, and the last request failed
)

// Status describes one identity's certificate; all but Identity, State and Since may be zero.
type Status struct {
	Identity  spiffe.ID
	State     State
	Since     time.Time // when the present certificate came, or since when there is none
	Serial    string    // in hex
	NotBefore time.Time
	NotAfter  time.Time
	RefreshAt time.Time // when the CA is asked next
	LastError error     // of the last request; a certificate may be valid beside it
	Failures  int       // requests that failed in a row
}

// Status lists every wanted identity, by name.
func (k *Keeper) Status() []Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	list := make([]Status, 0, len(k.entries))
	for _, e := range k.entries {
		list = append(list, e.status(now))
	}
	slices.SortFunc(list, func(a, b Status) int { return strings.Compare(a.Identity.String(), b.Identity.String()) })
	return list
}

func (e *entry) status(now time.Time) Status {
	s := Status{Identity: e.id, State: StatePending, Since: e.missingSince(now), RefreshAt: e.next, LastError: e.lastErr, Failures: e.failures}
	if e.cert != nil {
		s.Serial, s.NotBefore, s.NotAfter = serial(e.cert.Leaf), e.cert.Leaf.NotBefore, e.cert.Leaf.NotAfter
	}
	switch {
	case e.valid(now):
		s.State, s.Since = StateValid, e.obtained
	case e.cert != nil && now.After(s.NotAfter):
		s.State = StateExpired
	case e.lastErr != nil:
		s.State = StateFailed
	}
	return s
}

func serial(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }
