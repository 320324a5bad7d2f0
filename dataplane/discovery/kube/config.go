package kube

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// Bounds on what one agent asks of the API server, watches aside: a node full of pods is
// annotated at once.
const (
	requestsPerSecond = 20
	requestsBurst     = 120
)

// Config says where the API server is and on whose behalf it is asked.
type Config struct {
	// Kubeconfig is a path; "" takes the pod's own service account.
	Kubeconfig string
	// Client and Dynamic stand in for what Kubeconfig leads to; both or neither.
	Client  Client
	Dynamic dynamic.Interface

	Node          string // the agent's own; required
	TrustDomain   string // "" is cluster.local
	RootNamespace string // "" is istio-system
	ClusterDomain string // of service host names; "" is cluster.local
	Cluster       string // the name of this cluster; "" when it has none
	EnrollLabels  []string

	// SnapshotFile keeps the last good snapshot over a restart; "" keeps none. Its directory
	// must be there.
	SnapshotFile string
	// MeshConfig is the ConfigMap that says when every pod is to be released. The zero Name
	// is none.
	MeshConfig dataplane.Name
	// Pod is the agent's own. The zero Name leaves MarkReleased and Report without effect.
	Pod dataplane.Name
	// StartupTaint is the key of the taint that RemoveTaint removes; "" is none.
	StartupTaint string
	// Issues tells of every policy what of it cannot be enforced as written. nil leaves
	// Report without effect.
	Issues func(*dataplane.Snapshot) []Policy

	// Log is required.
	Log *slog.Logger
}

// Policy is a policy and what of it is not enforced as written.
type Policy struct {
	Kind   object.Kind
	Name   dataplane.Name
	Issues []string // none: it is enforced to the letter
}

// Validate joins every complaint.
func (c Config) Validate() error {
	var complaints []error
	if c.Node == "" {
		complaints = append(complaints, errors.New("the node is not set"))
	}
	if (c.Client == nil) != (c.Dynamic == nil) {
		complaints = append(complaints, errors.New("one of the two clients is not set"))
	}
	for _, n := range []dataplane.Name{c.MeshConfig, c.Pod} {
		if (n.Namespace == "") != (n.Name == "") {
			complaints = append(complaints, fmt.Errorf("%q is not a namespace and a name", n))
		}
	}
	if c.Log == nil {
		complaints = append(complaints, errors.New("there is no logger"))
	}
	return errors.Join(complaints...)
}

func (c Config) withDefaults() Config {
	c.TrustDomain = cmp.Or(c.TrustDomain, "cluster.local")
	c.RootNamespace = cmp.Or(c.RootNamespace, "istio-system")
	c.ClusterDomain = cmp.Or(c.ClusterDomain, "cluster.local")
	return c
}

func (c Config) mesh() object.Mesh {
	return object.Mesh{
		TrustDomain:   c.TrustDomain,
		RootNamespace: c.RootNamespace,
		ClusterDomain: c.ClusterDomain,
		Cluster:       c.Cluster,
	}
}

// connect makes the clients that are not given. It does not talk to the API server, which
// may be away.
func (c *Config) connect() error {
	if c.Client != nil {
		return nil
	}
	config, err := c.restConfig()
	if err != nil {
		return err
	}
	config.QPS, config.Burst = requestsPerSecond, requestsBurst
	config.UserAgent = "raceway-agent"
	if c.Dynamic, err = dynamic.NewForConfig(config); err != nil {
		return fmt.Errorf("client for policies: %w", err)
	}
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	client, err := newServer(config)
	if err != nil {
		return err
	}
	c.Client = client
	return nil
}

func (c *Config) restConfig() (*rest.Config, error) {
	if c.Kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("service account of the pod: %w", err)
		}
		return config, nil
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: c.Kubeconfig}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", c.Kubeconfig, err)
	}
	return config, nil
}
