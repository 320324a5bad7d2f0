package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
)

// backend is what differs between a cluster of files and one behind an API server.
type backend struct {
	credentials   ca.Source
	authenticator istio.Authenticator
	authorizer    istio.Authorizer
	ready         func() error // why it cannot tell who may have what; nil when it can
	run           []func(context.Context) error
	publish       func(context.Context, *ca.Authority) error // of the roots; nil: nothing to do
	rootsAt       string                                     // where agents find the roots
	closers       []io.Closer
}

func (b *backend) close() error {
	errs := []error{b.credentials.Close()}
	for _, c := range b.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// run serves until ctx ends. Probes and metrics are there before there are credentials.
func run(ctx context.Context, cfg config, out io.Writer, log *slog.Logger) error {
	counts, err := newMetrics()
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	ready := &readiness{}
	if cfg.metricsAddress != "" {
		l, err := net.Listen("tcp", cfg.metricsAddress)
		if err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		group.Go(func() error { return serveHTTP(ctx, l, counts.handler(ready.check)) })
	}
	group.Go(func() error {
		err := serve(ctx, cfg, out, counts, ready, log)
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil // it was told to end before it began
		}
		return err
	})
	return group.Wait()
}

// serve answers certificate requests.
func serve(ctx context.Context, cfg config, out io.Writer, counts *metrics, ready *readiness, log *slog.Logger) (err error) {
	b, err := open(ctx, cfg, counts, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	authority, err := ca.New(ca.Config{Source: b.credentials, TrustDomain: cfg.trustDomain, TTL: cfg.ttl, MaxTTL: cfg.maxTTL, Log: log})
	if err != nil {
		return err
	}
	serving, err := authority.Serving(cfg.tlsNames)
	if err != nil {
		return err
	}
	if err := counts.watch(authority); err != nil {
		return err
	}
	server, err := istio.NewServer(istio.ServerConfig{
		Signer: authority, Authenticator: b.authenticator, Authorizer: b.authorizer,
		GetCertificate: serving.GetCertificate, OnResult: counts.count, Log: log,
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("certificate API: %w", err)
	}
	ready.set(func() error { return errors.Join(b.ready(), valid(authority)) })

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return authority.Run(ctx) })
	for _, f := range b.run {
		group.Go(func() error { return f(ctx) })
	}
	if b.publish != nil {
		group.Go(func() error { return b.publish(ctx, authority) })
	}
	group.Go(func() error { return server.Serve(ctx, listener) })
	if err := announce(out, listener.Addr(), b.rootsAt); err != nil {
		log.Warn("ready, but standard output is gone", "error", err)
	}
	return group.Wait()
}

func open(ctx context.Context, cfg config, counts *metrics, log *slog.Logger) (*backend, error) {
	if cfg.onKubernetes() {
		return kubeBackend(ctx, cfg, counts, log)
	}
	return filesBackend(cfg, log)
}

func valid(authority *ca.Authority) error {
	if expires := authority.Expires(); !time.Now().Before(expires) {
		return fmt.Errorf("%w at %s", ca.ErrExpired, expires.UTC().Format(time.RFC3339))
	}
	return nil
}

// readiness is what /readyz tells.
type readiness struct {
	current atomic.Pointer[func() error]
}

var errStarting = errors.New("the authority has no credentials yet: the log says why")

func (r *readiness) set(check func() error) { r.current.Store(&check) }

func (r *readiness) check() error {
	if check := r.current.Load(); check != nil {
		return (*check)()
	}
	return errStarting
}
