package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
)

// fileConfig is for a cluster that is a directory of YAML.
type fileConfig struct {
	clusterDir    string
	dataDir       string
	nodeTokens    string
	rootNamespace string
}

func (c *fileConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&c.clusterDir, "cluster-dir", "", "directory of Kubernetes YAML that says which pods run on which node, in place of an API server")
	f.StringVar(&c.dataDir, "data-dir", "/var/lib/raceway-ca", "with --cluster-dir: directory of the authority's key and certificates")
	f.StringVar(&c.nodeTokens, "node-tokens", "", "with --cluster-dir: YAML `file` of lines \"node: token\", mode 0600")
	f.StringVar(&c.rootNamespace, "root-namespace", "istio-system", "with --cluster-dir: namespace of mesh-wide policies")
}

func (c *fileConfig) validate() error {
	if c.nodeTokens == "" {
		return errors.New("--node-tokens is not set")
	}
	return nil
}

// filesBackend knows the cluster from files.
func filesBackend(cfg config, log *slog.Logger) (*backend, error) {
	b := &backend{rootsAt: filepath.Join(cfg.files.dataDir, ca.RootFile)}
	dir, err := ca.NewDir(cfg.files.dataDir, ca.Root{TrustDomain: cfg.trustDomain})
	if err != nil {
		return nil, err
	}
	b.credentials = dir
	tokens, err := istio.NewNodeTokens(cfg.files.nodeTokens, log)
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	b.closers = append(b.closers, tokens)
	source, err := file.New(file.Config{Dir: cfg.files.clusterDir, TrustDomain: cfg.trustDomain, RootNamespace: cfg.files.rootNamespace, Log: log})
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	store := &dataplane.Store{}
	b.authenticator, b.authorizer = tokens, nodeRule{store}
	b.ready = func() error {
		if snapshot, _ := store.Load(); snapshot == nil {
			return errNoSnapshot
		}
		return nil
	}
	b.run = []func(context.Context) error{tokens.Run, func(ctx context.Context) error { return source.Run(ctx, store) }}
	return b, nil
}
