package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/cmd/raceway-ca/internal/kube"
)

// kubeConfig is for a cluster behind an API server.
type kubeConfig struct {
	kubeconfig string
	secret     kube.Name
	generate   bool
	bundle     kube.Name
	audiences  []string
	agents     []string
}

func (c *kubeConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "`file` that says where the API server is (default: what a pod is given)")
	c.secret = kube.Name{Namespace: "raceway-system", Name: "raceway-ca"}
	f.Var((*nameValue)(&c.secret), "secret", "`NAMESPACE/NAME` of the Secret with the authority's key and certificates")
	f.BoolVar(&c.generate, "generate-root", true, "make the Secret, with a new root, where it is missing")
	c.bundle = kube.Name{Namespace: "raceway-system", Name: "raceway-ca-root"}
	f.Var((*nameValue)(&c.bundle), "bundle-configmap", "`NAMESPACE/NAME` of the ConfigMap in which the roots are published")
	f.StringSliceVar(&c.audiences, "audience", []string{"raceway-ca"}, "audience of the agents' tokens (repeatable: any of them)")
	f.StringSliceVar(&c.agents, "node-agent", []string{"raceway-system/raceway-agent"}, "`NAMESPACE/NAME` of a service account whose pods may have the certificates of their nodes (repeatable)")
}

func (c *kubeConfig) validate() error {
	_, err := c.nodeAgents()
	if len(c.audiences) == 0 {
		err = errors.Join(err, errors.New("--audience is empty: tokens for any audience would do"))
	}
	return err
}

func (c *kubeConfig) nodeAgents() ([]kube.Name, error) {
	var names []kube.Name
	var errs []error
	for _, s := range c.agents {
		name, err := kube.ParseName(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("--node-agent: %w", err))
		}
		names = append(names, name)
	}
	return names, errors.Join(errs...)
}

// nameValue makes a flag of a name.
type nameValue kube.Name

func (v *nameValue) String() string { return kube.Name(*v).String() }

func (v *nameValue) Set(s string) error {
	name, err := kube.ParseName(s)
	if err == nil {
		*v = nameValue(name)
	}
	return err
}

func (v *nameValue) Type() string { return "NAMESPACE/NAME" }

// kubeBackend knows the cluster from its API server. It waits until there are credentials.
func kubeBackend(ctx context.Context, cfg config, counts *metrics, log *slog.Logger) (*backend, error) {
	agents, err := cfg.kube.nodeAgents()
	if err != nil {
		return nil, err
	}
	client, err := kube.NewClient(cfg.kube.kubeconfig)
	if err != nil {
		return nil, err
	}
	cluster, err := kube.New(kube.Config{
		Client: client, TrustDomain: cfg.trustDomain, Secret: cfg.kube.secret, Generate: cfg.kube.generate,
		Root: ca.Root{TrustDomain: cfg.trustDomain}, Bundle: cfg.kube.bundle, Audiences: cfg.kube.audiences, Agents: agents,
		OnReview: counts.review, OnBundle: counts.bundle, Log: log,
	})
	if err != nil {
		return nil, err
	}
	credentials, err := cluster.Credentials(ctx)
	if err != nil {
		return nil, err
	}
	return &backend{
		credentials: credentials, authenticator: cluster, authorizer: cluster, ready: cluster.Ready,
		run:     []func(context.Context) error{cluster.Run},
		publish: func(ctx context.Context, a *ca.Authority) error { return cluster.Publish(ctx, a) },
		rootsAt: "configmap " + cfg.kube.bundle.String(),
	}, nil
}
