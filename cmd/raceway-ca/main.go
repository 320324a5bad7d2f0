// Command raceway-ca is the mesh's certificate authority: it certifies, over Istio's
// CreateCertificate API, the identities of the workloads that run on the node that asks.
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/cmd/internal/daemon"
	"github.com/raceway-mesh/raceway/cmd/internal/flagenv"
	"github.com/raceway-mesh/raceway/cmd/internal/version"
)

func main() { daemon.Main(command()) }

// config is what flags and environment say.
type config struct {
	listen         string
	files          fileConfig
	kube           kubeConfig
	trustDomain    string
	tlsNames       []string
	ttl, maxTTL    time.Duration
	metricsAddress string
	logLevel       slog.Level
}

// envPrefix and a flag's name in capitals make the variable that sets it.
const envPrefix = "RACEWAY_CA_"

func command() *cobra.Command {
	var cfg config
	cmd := &cobra.Command{
		Use:   "raceway-ca",
		Short: "Sign the certificates of the mesh's workloads",
		Long: `Sign the certificates of the mesh's workloads.

On Kubernetes the authority's key and certificates are in the Secret --secret, in the layout of
Istio's cacerts (ca-key.pem, ca-cert.pem, cert-chain.pem, root-cert.pem) or of cert-manager
(tls.key, tls.crt, ca.crt); where it is missing it is made, with a new root. The roots are
published in --bundle-configmap. Agents show projected tokens of the service accounts --node-agent.

With --cluster-dir no API server is asked: pods are read from YAML files, the authority is in
--data-dir, an empty one gets a new root, and each node has a token in the file --node-tokens.

Every flag can also be set by a variable: --data-dir by ` + envPrefix + `DATA_DIR.`,
		Args:          cobra.NoArgs,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PreRunE:       func(cmd *cobra.Command, _ []string) error { return flagenv.Set(cmd.Flags(), envPrefix, os.LookupEnv) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cfg.complete(); err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: cfg.logLevel}))
			return run(cmd.Context(), cfg, cmd.OutOrStdout(), log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.listen, "listen", ":15012", "address of the certificate API")
	cfg.kube.flags(f)
	cfg.files.flags(f)
	f.StringVar(&cfg.trustDomain, "trust-domain", "cluster.local", "trust domain of the identities")
	f.StringSliceVar(&cfg.tlsNames, "tls-name", nil, "DNS name or IP address by which agents reach the API (repeatable; default: the host of --listen or, on Kubernetes, raceway-ca.<namespace of --secret>.svc)")
	f.DurationVar(&cfg.ttl, "ttl", 0, "lifetime of a certificate for which none is asked (default 24h, or --max-ttl if that is shorter)")
	f.DurationVar(&cfg.maxTTL, "max-ttl", 0, "longest lifetime of a certificate (default: that of --ttl)")
	f.StringVar(&cfg.metricsAddress, "metrics-address", "127.0.0.1:15014", "address of /metrics, /healthz and /readyz, empty for none")
	f.TextVar(&cfg.logLevel, "log-level", slog.LevelInfo, "`level` of the log: debug, info, warn or error")
	return cmd
}

// onKubernetes says that the cluster is behind an API server and not in a directory.
func (c *config) onKubernetes() bool { return c.files.clusterDir == "" }

// complete fills in what depends on other settings and joins every complaint.
func (c *config) complete() error {
	var errs []error
	if c.onKubernetes() {
		errs = append(errs, c.kube.validate())
	} else {
		errs = append(errs, c.files.validate())
		if c.kube.kubeconfig != "" {
			errs = append(errs, errors.New("--cluster-dir and --kubeconfig are both set: the cluster is in one place"))
		}
	}
	host, _, err := net.SplitHostPort(c.listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("--listen: %w", err))
	}
	if len(c.tlsNames) == 0 {
		ip := net.ParseIP(host)
		switch open := host == "" || ip != nil && ip.IsUnspecified(); {
		case c.onKubernetes():
			c.tlsNames = []string{"raceway-ca." + c.kube.secret.Namespace + ".svc"}
		case open:
			errs = append(errs, errors.New("--tls-name is not set, and --listen names no host that agents could reach"))
		default:
			c.tlsNames = []string{host}
		}
	}
	return errors.Join(errs...)
}

// announce tells, on out, what agents need.
func announce(out io.Writer, address net.Addr, rootsAt string) error {
	_, err := fmt.Fprintf(out, "ready: certificate API on %s, root certificate in %s\n", address, rootsAt)
	return err
}
