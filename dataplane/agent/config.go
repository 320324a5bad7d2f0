// Package agent is the node agent: it composes discovery, certificates, capture, enrolment,
// proxy, telemetry and the admin API, and holds no logic that belongs to one of them.
//
//	discovery ──► Store ──► enroll ──► pods (kernel.Pod + proxy.ServePod) ──► publish
//	                 └────► proxy: route, authorize          admin ◄── all of them
package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
)

// Config says who the agent is and where it finds what it needs.
type Config struct {
	Node string // the Kubernetes node that it serves; required

	ClusterDir    string // directory of Kubernetes YAML; required
	StatusDir     string // where agents publish captured pods; default ClusterDir/.raceway
	TrustDomain   string // default cluster.local
	RootNamespace string // default istio-system
	ClusterID     string // default Kubernetes

	CAAddress   string // host:port of the certificate authority; required
	CARootFile  string // PEM roots that it is verified against, and peers too; required
	CATokenFile string // bearer token of this node; required
	CAName      string // name in the CA's certificate; default the host of CAAddress
	CRLFile     string // certificate revocation list; "" for none
	CertTTL     time.Duration

	Socket         string // admin socket; default /run/raceway/<node>.sock
	BPFDir         string // directory on a bpffs for pins; default /sys/fs/bpf/raceway/<node>
	StateDir       string // what releasing a pod after a restart needs to know; default /run/raceway/<node>
	CgroupRoot     string // cgroup v2 root; "" finds it
	MetricsAddress string // "" serves none
	Inbound        kernel.InboundMode
	TC             kernel.TCMode
	// DisableGuard leaves the host's end of the pods' interfaces unguarded. It exists to
	// prove that the guard is what holds.
	DisableGuard bool

	Settle       time.Duration // how long peers get to see a published change; 0 means enroll's default
	Grace        time.Duration // how long a released pod still takes tunnels; 0 means enroll's default
	DrainTimeout time.Duration // how long live connections may go on after SIGTERM; default 10 s
	FlowInterval time.Duration // how often live connections report; default 10 s
	Limits       proxy.Limits

	AccessLog io.Writer // nil writes none
	Log       *slog.Logger
	Level     *slog.LevelVar // what `raceway log-level` sets; nil makes one that nothing reads
	Version   string
}

// Validate reports everything that is missing or wrong.
func (c Config) Validate() error {
	var errs []error
	for _, required := range []struct{ name, value string }{
		{"node", c.Node},
		{"cluster directory", c.ClusterDir},
		{"CA address", c.CAAddress},
		{"CA root file", c.CARootFile},
		{"CA token file", c.CATokenFile},
	} {
		if required.value == "" {
			errs = append(errs, fmt.Errorf("%s is not set", required.name))
		}
	}
	if filepath.Base(c.Node) != c.Node && c.Node != "" {
		errs = append(errs, fmt.Errorf("node %q is not a name", c.Node))
	}
	if c.TrustDomain != "" {
		// The other parts of an identity are not known here.
		if err := (spiffe.ID{TrustDomain: c.TrustDomain, Namespace: "any", ServiceAccount: "any"}).Validate(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"settle", c.Settle},
		{"grace", c.Grace},
		{"drain timeout", c.DrainTimeout},
		{"flow interval", c.FlowInterval},
		{"certificate lifetime", c.CertTTL},
	} {
		if d.value < 0 {
			errs = append(errs, fmt.Errorf("%s of %v is negative", d.name, d.value))
		}
	}
	for _, bound := range []struct {
		name  string
		value int
	}{
		{"pod's connections", c.Limits.PodConnections},
		{"node's connections", c.Limits.NodeConnections},
	} {
		if bound.value < 0 {
			errs = append(errs, fmt.Errorf("bound of %d on a %s is negative", bound.value, bound.name))
		}
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	defaults := []struct {
		value    *string
		fallback string
	}{
		{&c.StatusDir, filepath.Join(c.ClusterDir, ".raceway")},
		{&c.TrustDomain, "cluster.local"},
		{&c.RootNamespace, "istio-system"},
		{&c.ClusterID, "Kubernetes"},
		{&c.Socket, filepath.Join("/run/raceway", c.Node+".sock")},
		{&c.StateDir, filepath.Join("/run/raceway", c.Node)},
		{&c.BPFDir, filepath.Join("/sys/fs/bpf/raceway", c.Node)},
	}
	for _, d := range defaults {
		if *d.value == "" {
			*d.value = d.fallback
		}
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = 10 * time.Second
	}
	if c.CertTTL == 0 {
		c.CertTTL = 24 * time.Hour
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Level == nil {
		c.Level = new(slog.LevelVar)
	}
	return c
}
