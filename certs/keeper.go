package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Config of a Keeper.
type Config struct {
	Signer Signer     // required
	Roots  RootSource // required; must hold roots of TrustDomain
	// Revocations may be nil: nothing is revoked.
	Revocations RevocationSource

	TrustDomain string   // the own one; required
	Aliases     []string // other names of the own trust domain, under the same roots unless Roots has some for them
	Federated   []string // other trust domains whose workloads may talk to ours; their roots come from Roots

	TTL         time.Duration // lifetime to ask for; 0: 24 h
	SignTimeout time.Duration // bound on one request to the Signer; 0: 10 s
	MinBackoff  time.Duration // first pause after a failure, then doubled; 0: 250 ms
	MaxBackoff  time.Duration // longest pause after a failure; 0: 30 s
	Concurrency int           // requests to the Signer at once; 0: 4

	Log *slog.Logger // nil: none
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	set(&c.TTL, 24*time.Hour)
	set(&c.SignTimeout, 10*time.Second)
	set(&c.MinBackoff, 250*time.Millisecond)
	set(&c.MaxBackoff, 30*time.Second)
	if c.Concurrency == 0 {
		c.Concurrency = 4
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate joins every complaint about c.
func (c Config) Validate() error {
	var errs []error
	complain := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf("certs: "+format, args...))
		}
	}
	complain(c.Signer == nil, "no signer")
	complain(c.TrustDomain == "", "no trust domain")
	complain(c.TTL < 0 || c.SignTimeout < 0 || c.MinBackoff < 0 || c.MaxBackoff < 0 || c.Concurrency < 0, "a duration or number is negative")
	if c.Roots == nil {
		complain(true, "no trust roots")
	} else if bundle, _ := c.Roots.Load(); len(bundle.Roots(c.TrustDomain)) == 0 {
		complain(true, "the trust roots have none of the own trust domain %q", c.TrustDomain)
	}
	return errors.Join(errs...)
}

// Keeper holds the certificates of a node's workloads. All its methods are safe for
// concurrent use.
type Keeper struct {
	cfg      Config
	verifier verifier
	log      *slog.Logger
	slots    chan struct{} // one per request to the Signer
	wake     chan struct{} // there are entries to start

	mu      sync.Mutex
	running bool
	entries map[spiffe.ID]*entry
	changed latest[struct{}]
}

// New makes a Keeper; Run makes it work.
func New(cfg Config) (*Keeper, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Keeper{
		cfg: cfg,
		verifier: verifier{
			trustDomain: cfg.TrustDomain, aliases: cfg.Aliases, federated: cfg.Federated,
			roots: cfg.Roots, revocations: cfg.Revocations,
		},
		log:     cfg.Log,
		slots:   make(chan struct{}, cfg.Concurrency),
		wake:    make(chan struct{}, 1),
		entries: map[spiffe.ID]*entry{},
	}, nil
}

// Run gets and refreshes certificates until ctx ends. It runs once.
func (k *Keeper) Run(ctx context.Context) error {
	k.mu.Lock()
	again := k.running
	k.running = true
	k.mu.Unlock()
	if again {
		return errors.New("certs: the keeper runs already")
	}
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { k.watchTrust(ctx) })
	for {
		for e, entryCtx := range k.unstarted(ctx) {
			group.Go(func() { k.keep(entryCtx, e) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-k.wake:
		}
	}
}

// unstarted gives every entry that no goroutine keeps yet the context of the one to come.
func (k *Keeper) unstarted(ctx context.Context) map[*entry]context.Context {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := map[*entry]context.Context{}
	for _, e := range k.entries {
		if e.stop == nil {
			found[e], e.stop = context.WithCancel(ctx)
		}
	}
	return found
}

// Want asks for a certificate for id and keeps it fresh until Forget. Wanting again changes
// nothing.
func (k *Keeper) Want(id spiffe.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.entries[id] != nil {
		return
	}
	k.entries[id] = newEntry(id)
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Forget drops id's key and certificate: new handshakes fail, connections that exist go on.
// Forgetting what is not wanted changes nothing.
func (k *Keeper) Forget(id spiffe.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[id]
	if e == nil {
		return
	}
	delete(k.entries, id)
	if e.stop != nil {
		e.stop()
	}
	e.tell()
}

// Ready waits until there is a valid certificate for id. It fails with a *NoCertificateError
// when ctx ends first or id is not wanted (any more).
func (k *Keeper) Ready(ctx context.Context, id spiffe.ID) error {
	for {
		k.mu.Lock()
		_, err := k.certificateLocked(id, time.Now())
		e := k.entries[id]
		var updated <-chan struct{}
		if e != nil {
			updated = e.updated
		}
		k.mu.Unlock()
		if err == nil || e == nil {
			return err
		}
		select {
		case <-updated:
		case <-ctx.Done():
			return fmt.Errorf("wait for a certificate: %w: %w", context.Cause(ctx), err)
		}
	}
}

// Changed returns a channel that is closed when trust roots or revocations have changed
// since the call, while Run runs. Take the channel first and look at Revoked then, so that no
// change falls in between.
func (k *Keeper) Changed() <-chan struct{} {
	_, changed := k.changed.load()
	return changed
}

// Distrusted returns why a connection that exists would be refused if it were made now, a
// *HandshakeError, or nil: its peer's root was removed, or a certificate has expired or was
// revoked. It should carry nothing new. Whom the peer was expected to be is not looked at again.
func (k *Keeper) Distrusted(state tls.ConnectionState) error { return k.verifier.live(state) }

// Revoked returns why a connection that exists must be cut, a *HandshakeError of
// CauseRevoked, or nil. Neither an expiry nor a root's removal is such a reason.
func (k *Keeper) Revoked(state tls.ConnectionState) error { return k.verifier.liveRevoked(state) }

// watchTrust follows the roots and revocations.
func (k *Keeper) watchTrust(ctx context.Context) {
	for {
		_, roots := k.cfg.Roots.Load()
		var revocations <-chan struct{}
		if k.cfg.Revocations != nil {
			_, revocations = k.cfg.Revocations.Load()
		}
		// After the channels are taken and before the wait, so that a change in between
		// is seen too.
		k.renewDistrusted()
		select {
		case <-ctx.Done():
			return
		case <-roots:
		case <-revocations:
		}
		k.changed.set(struct{}{})
	}
}

// certificate returns what to present as id.
func (k *Keeper) certificate(id spiffe.ID) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.certificateLocked(id, time.Now())
}

var errNotWanted = errors.New("no pod of this node that uses it is enrolled")

var errPending = errors.New("the CA has not been asked yet, or has not answered")

func (k *Keeper) certificateLocked(id spiffe.ID, now time.Time) (*tls.Certificate, error) {
	e := k.entries[id]
	if e == nil {
		return nil, &NoCertificateError{Identity: id, Since: now, Err: errNotWanted}
	}
	if e.valid(now) {
		return e.cert, nil
	}
	return nil, &NoCertificateError{Identity: id, Since: e.missingSince(now), Err: e.why(now)}
}
