package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
)

// run wires the service and serves until ctx ends.
func run(ctx context.Context, cfg config, out io.Writer, log *slog.Logger) (err error) {
	var closers []io.Closer
	defer func() { err = errors.Join(err, closeAll(closers)) }()
	authority, err := ca.New(ca.Config{Dir: cfg.dataDir, TrustDomain: cfg.trustDomain, TTL: cfg.ttl, MaxTTL: cfg.maxTTL, Log: log})
	if err != nil {
		return err
	}
	closers = append(closers, authority)
	tokens, err := istio.NewNodeTokens(cfg.nodeTokens, log)
	if err != nil {
		return err
	}
	closers = append(closers, tokens)
	serving, err := authority.Serving(cfg.tlsNames)
	if err != nil {
		return err
	}
	source, err := file.New(file.Config{Dir: cfg.clusterDir, TrustDomain: cfg.trustDomain, RootNamespace: cfg.rootNamespace, Log: log})
	if err != nil {
		return err
	}
	counts, err := newMetrics(authority)
	if err != nil {
		return err
	}
	store := &dataplane.Store{}
	server, err := istio.NewServer(istio.ServerConfig{
		Signer: authority, Authenticator: tokens, Authorizer: nodeRule{store},
		GetCertificate: serving.GetCertificate, OnResult: counts.count, Log: log,
	})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("certificate API: %w", err)
	}
	closers = append(closers, listener)

	group, ctx := errgroup.WithContext(ctx)
	if cfg.metricsAddress != "" {
		metricsListener, err := net.Listen("tcp", cfg.metricsAddress)
		if err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		group.Go(func() error { return serveHTTP(ctx, metricsListener, counts.handler(authority, store)) })
	}
	group.Go(func() error { return authority.Run(ctx) })
	group.Go(func() error { return tokens.Run(ctx) })
	group.Go(func() error { return source.Run(ctx, store) })
	group.Go(func() error { return server.Serve(ctx, listener) })
	if err := announce(out, cfg, listener.Addr()); err != nil {
		log.Warn("ready, but standard output is gone", "error", err)
	}
	return group.Wait()
}

// closeAll closes what is left open; the listener is not, once it was served.
func closeAll(closers []io.Closer) error {
	var errs []error
	for _, c := range closers {
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
