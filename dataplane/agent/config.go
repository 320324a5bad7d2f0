// Package agent is the node agent: it composes discovery, certificates, capture, enrolment,
// proxy, telemetry and the admin API, and holds no logic that belongs to one of them.
//
//	discovery ──► Store ──► enroll ──► pods (kernel.Pod + proxy.ServePod) ──► publish
//	    ▲            └────► proxy: route, authorize          admin ◄── all of them
//	    └── CNI plugin: a pod is being set up
package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
)

// Config says who the agent is and where it finds what it needs.
type Config struct {
	Node string // the Kubernetes node that it serves; required

	// The cluster is a directory of Kubernetes YAML, or what an API server says.
	ClusterDir string // "" for an API server
	StatusDir  string // where agents publish captured pods; default ClusterDir/.raceway

	Kubeconfig   string         // how to reach the API server; "" as its pod does
	SnapshotFile string         // the last state of the cluster, for a start without API server; "" for none
	MeshConfig   dataplane.Name // the ConfigMap that says when the mesh is taken off the cluster
	Pod          dataplane.Name // the agent's own
	StartupTaint string         // what is taken from the node once the agent is ready; "" for none
	EnrollLabels []string       // labels that enrol beside raceway.dev/dataplane-mode

	TrustDomain   string // default cluster.local
	RootNamespace string // default istio-system
	ClusterID     string // default Kubernetes

	CAAddress   string // host:port of the certificate authority; required
	CARootFile  string // PEM roots that it is verified against, and peers too; required
	CATokenFile string // bearer token of this node; required
	CAName      string // name in the CA's certificate; default the host of CAAddress
	CRLFile     string // certificate revocation list; "" for none
	CertTTL     time.Duration

	// Takeover has a node that another agent serves taken over from it. Otherwise New fails.
	Takeover bool

	Socket         string // admin socket; default /run/raceway/<node>.sock
	BPFDir         string // directory on a bpffs for pins; default /sys/fs/bpf/raceway/<node>
	StateDir       string // what releasing a pod after a restart needs to know; default /run/raceway/<node>
	CgroupRoot     string // cgroup v2 root; "" finds it
	HostProc       string // the host's /proc; default /proc
	KubeletCgroup  string // where the node's kubelet stands: a directory, auto or none; default auto with an API server, else none
	HostNetNS      string // the host's network namespace; default the agent's own with ClusterDir, else that of HostProc/1
	MetricsAddress string // "" serves none
	Inbound        kernel.InboundMode
	TC             kernel.TCMode
	// UDP has the UDP of pods captured and tunnelled between agents that do.
	UDP bool
	// CountQUICDrops has those of their datagrams counted that quic-go drops, which costs up to a
	// sixth of what UDP takes.
	CountQUICDrops bool
	SameNode       dataplane.SameNodeMode // how pods of the node talk to each other; "" is the kernel's way, except where STRICT
	// DisableGuard leaves the host's end of the pods' interfaces unguarded. It exists to
	// prove that the guard is what holds.
	DisableGuard bool
	CNI          CNIConfig

	Settle       time.Duration // how long peers get to see a published change; 0 means enroll's default
	Grace        time.Duration // how long a released pod still takes tunnels; 0 means enroll's default
	DrainTimeout time.Duration // how long live connections may go on after SIGTERM; default 10 s
	FlowInterval time.Duration // how often live connections report; default 10 s
	Limits       proxy.Limits

	// PaceCollector and BoundMemory let the agent set the process's GOGC by how busy it is, and
	// its GOMEMLIMIT by its cgroup's bound.
	PaceCollector, BoundMemory bool

	AccessLog io.Writer // nil writes none
	Log       *slog.Logger
	Level     *slog.LevelVar // what `raceway log-level` sets; nil makes one that nothing reads
	Version   string
}

// Values of Config.KubeletCgroup beside a directory.
const (
	KubeletAuto = "auto"
	KubeletNone = "none"
)

// Validate reports everything that is missing or wrong.
func (c Config) Validate() error {
	var errs []error
	for _, required := range []struct{ name, value string }{
		{"node", c.Node},
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
	errs = append(errs, c.validateSource(), c.CNI.validate(), c.SameNode.Validate())
	if k := c.KubeletCgroup; k != "" && k != KubeletAuto && k != KubeletNone && !filepath.IsAbs(k) {
		errs = append(errs, fmt.Errorf("kubelet's cgroup %q is none of %s, %s and a directory", k, KubeletAuto, KubeletNone))
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
		{"peer's tunnel connections", c.Limits.PairTunnels},
	} {
		if bound.value < 0 {
			errs = append(errs, fmt.Errorf("bound of %d on a %s is negative", bound.value, bound.name))
		}
	}
	return errors.Join(errs...)
}

// validateSource tells apart what goes with a directory and what with an API server.
func (c Config) validateSource() error {
	var errs []error
	for _, f := range []struct {
		name      string
		set       bool
		directory bool // it goes with a directory
	}{
		{"status directory", c.StatusDir != "", true},
		{"kubeconfig", c.Kubeconfig != "", false},
		{"snapshot file", c.SnapshotFile != "", false},
		{"startup taint", c.StartupTaint != "", false},
		{"CNI plugin", c.CNI.enabled(), false},
		{"enrolment label", len(c.EnrollLabels) > 0, false},
	} {
		switch {
		case f.set && f.directory && c.ClusterDir == "":
			errs = append(errs, fmt.Errorf("%s goes with a cluster directory, and there is none", f.name))
		case f.set && !f.directory && c.ClusterDir != "":
			errs = append(errs, fmt.Errorf("%s goes with an API server, and the cluster is directory %s", f.name, c.ClusterDir))
		}
	}
	return errors.Join(errs...)
}

// kernel is the configuration of the kernel's side.
func (c Config) kernel() kernel.Config {
	return kernel.Config{
		Dir: c.BPFDir, StateDir: c.StateDir, CgroupRoot: c.CgroupRoot, HostNetNS: c.HostNetNS,
		Inbound: c.Inbound, TC: c.TC, DisableGuard: c.DisableGuard, Log: c.Log.With("part", "kernel"),
	}
}

func (c Config) withDefaults() Config {
	if c.ClusterDir != "" && c.StatusDir == "" {
		c.StatusDir = filepath.Join(c.ClusterDir, ".raceway")
	}
	c.HostProc = cmp.Or(c.HostProc, "/proc")
	if c.KubeletCgroup == "" {
		c.KubeletCgroup = KubeletAuto
		if c.ClusterDir != "" {
			c.KubeletCgroup = KubeletNone
		}
	}
	if c.ClusterDir == "" && c.HostNetNS == "" {
		c.HostNetNS = filepath.Join(c.HostProc, "1/ns/net")
	}
	defaults := []struct {
		value    *string
		fallback string
	}{
		{&c.TrustDomain, "cluster.local"},
		{&c.RootNamespace, "istio-system"},
		{&c.ClusterID, "Kubernetes"},
		{&c.Socket, filepath.Join("/run/raceway", c.Node+".sock")},
		{&c.StateDir, filepath.Join("/run/raceway", c.Node)},
		{&c.BPFDir, filepath.Join("/sys/fs/bpf/raceway", c.Node)},
		{&c.CNI.HostConfDir, "/etc/cni/net.d"},
		{&c.CNI.StateDir, "/var/lib/raceway/cni"},
		{&c.CNI.Binary, "/usr/local/bin/raceway-cni"},
		{&c.CNI.Socket, "/run/raceway/cni.sock"},
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
