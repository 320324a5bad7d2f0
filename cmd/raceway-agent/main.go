// Command raceway-agent is the node agent: it captures the TCP connections and UDP of the node's
// enrolled pods and carries them through mutually authenticated tunnels.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/raceway-mesh/raceway/cmd/internal/daemon"
	"github.com/raceway-mesh/raceway/cmd/internal/flagenv"
	"github.com/raceway-mesh/raceway/cmd/internal/version"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/agent"
)

func main() { daemon.Main(command()) }

// envPrefix and a flag's name in capitals make the variable that sets it.
const envPrefix = "RACEWAY_"

func command() *cobra.Command {
	cfg := agent.Config{
		Level: new(slog.LevelVar), Version: version.String(),
		MeshConfig: dataplane.Name{Namespace: "raceway-system", Name: "raceway"},
	}
	var accessLog string
	cmd := &cobra.Command{
		Use:   "raceway-agent",
		Short: "Serve one node of the mesh",
		Long: `Serve one node of the mesh: capture the TCP connections and the UDP of its enrolled pods, carry
them through HBONE tunnels, and authorize what arrives.

An agent that ends leaves its pods captured: their new connections are refused until an agent
serves the node again. ` + "`raceway`" + ` talks to it through --socket.

What the cluster is comes from its API server, or from --cluster-dir.

Every flag can also be set by a variable: --node by ` + envPrefix + `NODE.`,
		Args:          cobra.NoArgs,
		Version:       cfg.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		PreRunE:       func(cmd *cobra.Command, _ []string) error { return flagenv.Set(cmd.Flags(), envPrefix, os.LookupEnv) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := errors.Join(required(cmd.Flags(), "node", "ca-address", "ca-root", "ca-token-file"), settleSource(cmd.Flags())); err != nil {
				return err
			}
			if cfg.CNI.TokenFile != "" {
				cfg.CNI.APIServer = cmp.Or(cfg.CNI.APIServer, apiServer(os.LookupEnv))
			}
			// What the operator says of Go's memory stays.
			cfg.PaceCollector, cfg.BoundMemory = os.Getenv("GOGC") == "", os.Getenv("GOMEMLIMIT") == ""
			cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: cfg.Level}))
			return run(cmd.Context(), cfg, accessLog, cmd.OutOrStdout())
		},
	}
	flags(cmd.Flags(), &cfg)
	cmd.Flags().StringVar(&accessLog, "access-log", "-", "file of the access log, - for standard output, empty for none")
	return cmd
}

func flags(f *pflag.FlagSet, cfg *agent.Config) {
	f.StringVar(&cfg.Node, "node", "", "name of the node to serve (required)")
	f.StringVar(&cfg.ClusterDir, "cluster-dir", "", "directory of Kubernetes YAML that describes the cluster (default: it is the API server's)")
	f.StringVar(&cfg.StatusDir, "status-dir", "", "directory where agents publish captured pods (default: .raceway in --cluster-dir)")
	f.StringVar(&cfg.Kubeconfig, "kubeconfig", "", "file that says how to reach the API server (default: as pods do)")
	f.StringVar(&cfg.SnapshotFile, "snapshot-file", "/var/lib/raceway/snapshot.json.gz", "last state of the cluster, for a start without API server, empty for none")
	f.StringSliceVar(&cfg.EnrollLabels, "enroll-label", nil, "further label that enrols namespaces and pods, as "+dataplane.ModeLabel+" does (repeatable)")
	f.Var((*nameValue)(&cfg.MeshConfig), "mesh-config", "`namespace/name` of the ConfigMap that says when the mesh is taken off the cluster")
	f.StringVar(&cfg.Pod.Name, "pod-name", "", "name of the agent's own pod")
	f.StringVar(&cfg.Pod.Namespace, "pod-namespace", "", "namespace of the agent's own pod")
	f.StringVar(&cfg.StartupTaint, "startup-taint", "raceway.dev/not-ready", "taint that the agent takes from its node once it is ready, empty for none")
	f.StringVar(&cfg.TrustDomain, "trust-domain", "cluster.local", "trust domain of the identities")
	f.StringVar(&cfg.RootNamespace, "root-namespace", "istio-system", "namespace of mesh-wide policies")
	f.StringVar(&cfg.ClusterID, "cluster-id", "Kubernetes", "name of the cluster, as the CA and the metrics know it")
	f.StringVar(&cfg.CAAddress, "ca-address", "", "host:port of the certificate API (required)")
	f.StringVar(&cfg.CAName, "ca-name", "", "name in the CA's certificate (default: the host of --ca-address)")
	f.StringVar(&cfg.CARootFile, "ca-root", "", "PEM file of root certificates, or directory with root-cert.pem and <trust domain>.pem (required)")
	f.StringVar(&cfg.CATokenFile, "ca-token-file", "", "file with this node's bearer token (required)")
	f.StringVar(&cfg.CRLFile, "crl-file", "", "file of certificate revocation lists, reloaded when it changes")
	f.DurationVar(&cfg.CertTTL, "cert-ttl", 0, "lifetime to ask for certificates (default 24h)")
	f.BoolVar(&cfg.Takeover, "takeover", true, "take the node over from an agent that serves it; that one goes on with its connections, and takes the node back if this one ends first")
	f.StringVar(&cfg.Socket, "socket", "", "admin socket (default /run/raceway/<node>.sock)")
	f.StringVar(&cfg.BPFDir, "bpf-dir", "", "directory of pins on a BPF file system (default /sys/fs/bpf/raceway/<node>)")
	f.StringVar(&cfg.StateDir, "state-dir", "", "directory of what a restarted agent needs to release pods (default /run/raceway/<node>)")
	f.StringVar(&cfg.CgroupRoot, "cgroup-root", "", "root of the cgroup v2 hierarchy (default: found)")
	f.StringVar(&cfg.HostProc, "host-proc", "/proc", "proc file system of the host")
	f.StringVar(&cfg.HostNetNS, "host-netns", "", "network namespace of the host (default: the agent's own with --cluster-dir, else <host-proc>/1/ns/net)")
	f.StringVar(&cfg.KubeletCgroup, "kubelet-cgroup", "", "cgroup directory of the node's kubelet, whose probes are let through, auto or none (default: auto, with --cluster-dir none)")
	f.StringVar(&cfg.CNI.ConfDir, "cni-conf-dir", "", "the host's network configuration, as the agent sees it, empty for no CNI plugin")
	f.StringVar(&cfg.CNI.BinDir, "cni-bin-dir", "", "the host's CNI plugins, as the agent sees them, empty for no CNI plugin")
	f.StringVar(&cfg.CNI.HostConfDir, "cni-conf-dir-host", "/etc/cni/net.d", "the same as --cni-conf-dir, as the host sees it")
	f.StringVar(&cfg.CNI.StateDir, "cni-state-dir", "/var/lib/raceway/cni", "what the CNI plugin decides by while the agent is away, on the host at the same path")
	f.StringVar(&cfg.CNI.Binary, "cni-plugin-binary", "/usr/local/bin/raceway-cni", "the CNI plugin, to copy to the host")
	f.StringVar(&cfg.CNI.Socket, "cni-socket", "/run/raceway/cni.sock", "socket where the CNI plugin finds the agent")
	f.StringVar(&cfg.CNI.TokenFile, "cni-token-file", "", "token with which the CNI plugin asks the API server while the agent is away, empty for none")
	f.StringVar(&cfg.CNI.APIServer, "cni-api-server", "", "URL of the API server for the CNI plugin (default: where pods find it)")
	f.StringVar(&cfg.CNI.APICAFile, "cni-api-ca", "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", "PEM file of the API server's roots, for the CNI plugin")
	f.StringSliceVar(&cfg.CNI.Exempt, "cni-exempt-namespace", []string{"kube-system", "raceway-system"}, "namespace whose pods start although nobody can say whether they are to be enrolled (repeatable)")
	f.StringVar(&cfg.MetricsAddress, "metrics-address", "127.0.0.1:15020", "address of /metrics and /readyz, empty for none")
	f.StringVar((*string)(&cfg.Inbound), "inbound", "auto", "how inbound connections are captured: auto, sk_lookup or tc")
	f.StringVar((*string)(&cfg.TC), "tc", "auto", "how TC programs are attached: auto, tcx or clsact")
	f.StringVar((*string)(&cfg.SameNode), "same-node", "", "how pods of the node talk to each other: kernel (unencrypted, at the kernel's speed) or tunnel; namespaces can differ by the label "+dataplane.SameNodeLabel+" (default kernel, but tunnel to what PeerAuthentication makes STRICT)")
	f.BoolVar(&cfg.UDP, "udp", true, "tunnel the UDP of pods to pods whose agents take it in tunnels; docs/udp.md says what is protected when. With false the UDP of all pods is left alone")
	f.BoolVar(&cfg.CountQUICDrops, "count-quic-drops", false, "count the datagrams that quic-go drops because they come faster than the agent takes them (raceway_udp_dropped_datagrams_total, cause received); it takes up to a sixth of UDP's time again")
	f.DurationVar(&cfg.Settle, "settle", 0, "time for peers to see a change of a pod's capture (default 250ms)")
	f.DurationVar(&cfg.Grace, "grace", 0, "time that a released pod still takes tunnels (default 2s)")
	f.DurationVar(&cfg.DrainTimeout, "drain-timeout", 0, "time for live connections to end after SIGTERM (default 10s)")
	f.DurationVar(&cfg.FlowInterval, "flow-interval", 0, "how often live connections report (default 10s)")
	f.IntVar(&cfg.Limits.PodConnections, "pod-connections", 0, "bound on one pod's connections (default 10000, or fewer where the limit of open files is low)")
	f.IntVar(&cfg.Limits.PairTunnels, "pair-tunnels", 0, "bound on a pod's tunnel connections to one peer while they are busy (default as many as there are CPUs, from 2 to 8)")
	f.IntVar(&cfg.Limits.NodeConnections, "node-connections", 0, "bound on all pods' connections (default 50000, or fewer where the limit of open files is low)")
	f.TextVar(cfg.Level, "log-level", new(slog.LevelVar), "`level` of the log: debug, info, warn or error; raceway log-level changes it later")
	f.BoolVar(&cfg.DisableGuard, "disable-guard", false, "leave pods' interfaces unguarded")
	if err := f.MarkHidden("disable-guard"); err != nil {
		panic(err) // the flag is defined one line above
	}
}

// settleSource refuses flags of the other source of the cluster's state than the one that is
// used, and empties those that have a default.
func settleSource(f *pflag.FlagSet) error {
	ofTheOther, because := []string{"status-dir"}, "without --cluster-dir"
	if f.Lookup("cluster-dir").Value.String() != "" {
		ofTheOther, because = []string{
			"kubeconfig", "snapshot-file", "enroll-label", "mesh-config", "startup-taint", "cni-conf-dir", "cni-bin-dir",
		}, "with --cluster-dir: there is no API server then"
	}
	var errs []error
	for _, name := range ofTheOther {
		switch flag := f.Lookup(name); {
		case flag.Changed:
			errs = append(errs, fmt.Errorf("--%s means nothing %s", name, because))
		case flag.DefValue != "[]":
			errs = append(errs, flag.Value.Set(""))
		}
	}
	return errors.Join(errs...)
}

// nameValue is a flag for the name of an object.
type nameValue dataplane.Name

func (n *nameValue) String() string {
	if *n == (nameValue{}) {
		return ""
	}
	return dataplane.Name(*n).String()
}

func (n *nameValue) Set(text string) error {
	if text == "" {
		*n = nameValue{}
		return nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("%q is no namespace/name", text)
	}
	*n = nameValue{Namespace: namespace, Name: name}
	return nil
}

func (n *nameValue) Type() string { return "namespace/name" }

// apiServer is where pods find the API server, "" outside of a cluster.
func apiServer(lookup func(string) (string, bool)) string {
	host, _ := lookup("KUBERNETES_SERVICE_HOST")
	port, _ := lookup("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return ""
	}
	return "https://" + net.JoinHostPort(host, port)
}

// required complains, in the words of the command line, of every flag that is empty.
func required(f *pflag.FlagSet, names ...string) error {
	var errs []error
	for _, name := range names {
		if f.Lookup(name).Value.String() == "" {
			errs = append(errs, fmt.Errorf("--%s is not set", name))
		}
	}
	return errors.Join(errs...)
}

// run serves until ctx ends.
func run(ctx context.Context, cfg agent.Config, accessLog string, stdout io.Writer) (err error) {
	switch accessLog {
	case "":
	case "-":
		cfg.AccessLog = stdout
	default:
		f, err := os.OpenFile(accessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return fmt.Errorf("access log: %w", err)
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		cfg.AccessLog = f
	}
	var files syscall.Rlimit // which Go has raised to the hard limit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	cfg.Limits = cfg.Limits.Within(files.Cur)
	err = agent.Serve(ctx, cfg)
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return fmt.Errorf("%w: the agent has to run as root", err)
	}
	return err
}
