package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Name is that of an object in a namespace.
type Name struct{ Namespace, Name string }

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// ParseName reads namespace/name.
func ParseName(s string) (Name, error) {
	namespace, name, found := strings.Cut(s, "/")
	if !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return Name{}, fmt.Errorf("%q is not NAMESPACE/NAME", s)
	}
	return Name{namespace, name}, nil
}

// Config of a Cluster.
type Config struct {
	Client      kubernetes.Interface // required
	TrustDomain string               // of the identities; required
	Secret      Name                 // with the authority's key and certificates; required
	Generate    bool                 // whether to make the Secret, with a new root, where it is missing
	Root        ca.Root              // that is made then
	Bundle      Name                 // of the ConfigMap for the roots; required
	Audiences   []string             // of the tokens, any of them; required
	Agents      []Name               // service accounts that may ask for others' certificates; required
	OnReview    func(Review, time.Duration)
	OnBundle    func(error) // is told how each attempt to publish the roots went
	Log         *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.OnReview == nil {
		c.OnReview = func(Review, time.Duration) {}
	}
	if c.OnBundle == nil {
		c.OnBundle = func(error) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate joins every complaint about c.
func (c Config) Validate() error {
	var errs []error
	for _, required := range []struct {
		missing bool
		what    string
	}{
		{c.Client == nil, "client"},
		{c.TrustDomain == "", "trust domain"},
		{c.Secret == Name{}, "secret"},
		{c.Bundle == Name{}, "configmap for the roots"},
		{len(c.Audiences) == 0, "audience"},
		{len(c.Agents) == 0, "node agent's service account"},
	} {
		if required.missing {
			errs = append(errs, fmt.Errorf("kubernetes: no %s", required.what))
		}
	}
	return errors.Join(errs...)
}

// NewClient reads the kubeconfig or, where that is "", what a pod is given.
func NewClient(kubeconfig string) (kubernetes.Interface, error) {
	config, err := restConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	// Reviews are bounded by the Cluster, and shared out by the server's priority and fairness.
	config.QPS, config.Burst = 200, 400
	config.UserAgent = "raceway-ca"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	return client, nil
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("neither --cluster-dir nor --kubeconfig is set, and this is no pod of a cluster")
	}
	return config, err
}

// Cluster answers from an API server. It is an istio.Authenticator and an istio.Authorizer.
type Cluster struct {
	cfg     Config
	reviews *reviewer
	pods    *pods
	contact *contact
}

// New makes a Cluster, which asks nothing of the API server before Run and Credentials do.
func New(cfg Config) (*Cluster, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	c := &Cluster{cfg: cfg.withDefaults()}
	var err error
	if c.pods, err = newPods(c.cfg.Client, c.cfg.Log); err != nil {
		return nil, err
	}
	c.reviews = newReviewer(c.cfg, c.pods)
	c.contact = &contact{client: c.cfg.Client, log: c.cfg.Log}
	return c, nil
}

// Run follows the pods and keeps in contact with the API server, until ctx ends.
func (c *Cluster) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		c.pods.run(ctx)
		return nil
	})
	group.Go(func() error {
		c.contact.run(ctx)
		return nil
	})
	return group.Wait()
}

// Ready returns why a request would be answered with Unavailable now.
func (c *Cluster) Ready() error {
	return errors.Join(c.contact.check(time.Now()), c.pods.ready())
}

// Authenticate implements istio.Authenticator.
func (c *Cluster) Authenticate(ctx context.Context, token string) (istio.Caller, error) {
	return c.reviews.authenticate(ctx, token)
}

// Authorize implements istio.Authorizer: a node may have the identity of a service account of
// which a pod is bound to it that has not finished. A pod that has no address yet counts:
// its certificate is asked for while the pod is being set up.
func (c *Cluster) Authorize(ctx context.Context, caller istio.Caller, id spiffe.ID) error {
	if id.TrustDomain != c.cfg.TrustDomain {
		return &istio.DeniedError{Reason: "the trust domain is " + c.cfg.TrustDomain}
	}
	account := Name{id.Namespace, id.ServiceAccount}
	found, err := c.pods.has(ctx, caller.Node, account)
	if err != nil {
		return err
	}
	if !found {
		return &istio.DeniedError{Reason: fmt.Sprintf("no live pod of service account %s is on that node", account)}
	}
	return nil
}

// timeout of a single request to the API server.
const timeout = 5 * time.Second
