// Package kube reaches the agents of a cluster through its API server, with the rights of a
// kubeconfig: it finds their pods and runs a command inside them. No port of theirs is opened.
package kube

import (
	"errors"
	"fmt"
	"os"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/raceway-mesh/raceway/cmd/internal/version"
)

// DefaultNamespace is where Raceway is installed unless told otherwise.
const DefaultNamespace = "raceway-system"

// Options choose a cluster. The zero value means what kubectl would use.
type Options struct {
	Kubeconfig string // path; "" is $KUBECONFIG, ~/.kube/config, or the pod's service account
	Context    string // "" is the current one
	Namespace  string // of Raceway; "" is DefaultNamespace
}

// Cluster is one cluster and the namespace of Raceway in it.
type Cluster struct {
	Namespace string

	config  *rest.Config
	client  kubernetes.Interface
	dynamic dynamic.Interface
}

// ErrNoConfig is a machine that names no cluster.
var ErrNoConfig = errors.New("no kubeconfig names a cluster")

// Open reads the configuration. Nothing is asked of the cluster yet.
func Open(o Options) (*Cluster, error) {
	if o.Namespace == "" {
		o.Namespace = DefaultNamespace
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.Kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: o.Context}).ClientConfig()
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, ErrNoConfig
	case err != nil:
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	config.UserAgent = "raceway/" + version.String()
	// The default of 5 requests a second is for controllers; here somebody waits.
	config.QPS, config.Burst = 50, 100
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	return &Cluster{Namespace: o.Namespace, config: config, client: client, dynamic: objects}, nil
}

// Configured reports whether this machine names a cluster, so that one need not be told.
func Configured() bool {
	for _, path := range clientcmd.NewDefaultClientConfigLoadingRules().GetLoadingPrecedence() {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	_, err := rest.InClusterConfig()
	return err == nil
}
