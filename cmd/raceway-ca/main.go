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
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/certs/ca"
	"github.com/raceway-mesh/raceway/cmd/internal/daemon"
	"github.com/raceway-mesh/raceway/cmd/internal/flagenv"
	"github.com/raceway-mesh/raceway/cmd/internal/version"
)

func main() { daemon.Main(command()) }

// config is what flags and environment say.
type config struct {
	listen         string
	dataDir        string
	clusterDir     string
	nodeTokens     string
	trustDomain    string
	rootNamespace  string
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

The authority's key and certificates are in --data-dir, in the layout of Istio's cacerts
(ca-key.pem, ca-cert.pem, cert-chain.pem, root-cert.pem); an empty directory gets a new root.
Agents need root-cert.pem, and a token of their own from the file --node-tokens.

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
	f.StringVar(&cfg.dataDir, "data-dir", "/var/lib/raceway-ca", "directory of the authority's key and certificates")
	f.StringVar(&cfg.clusterDir, "cluster-dir", "", "directory of Kubernetes YAML that says which pods run on which node (required)")
	f.StringVar(&cfg.nodeTokens, "node-tokens", "", "YAML `file` of lines \"node: token\", mode 0600 (required)")
	f.StringVar(&cfg.trustDomain, "trust-domain", "cluster.local", "trust domain of the identities")
	f.StringVar(&cfg.rootNamespace, "root-namespace", "istio-system", "namespace of mesh-wide policies")
	f.StringSliceVar(&cfg.tlsNames, "tls-name", nil, "DNS name or IP address by which agents reach the API (repeatable; default: the host of --listen)")
	f.DurationVar(&cfg.ttl, "ttl", 24*time.Hour, "lifetime of a certificate for which none is asked")
	f.DurationVar(&cfg.maxTTL, "max-ttl", 0, "longest lifetime of a certificate (default: that of --ttl)")
	f.StringVar(&cfg.metricsAddress, "metrics-address", "127.0.0.1:15014", "address of /metrics and /healthz, empty for none")
	f.TextVar(&cfg.logLevel, "log-level", slog.LevelInfo, "`level` of the log: debug, info, warn or error")
	return cmd
}

// complete fills in what depends on other settings and joins every complaint.
func (c *config) complete() error {
	var errs []error
	if c.clusterDir == "" {
		errs = append(errs, errors.New("--cluster-dir is not set"))
	}
	if c.nodeTokens == "" {
		errs = append(errs, errors.New("--node-tokens is not set"))
	}
	host, _, err := net.SplitHostPort(c.listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("--listen: %w", err))
	}
	if len(c.tlsNames) == 0 {
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			errs = append(errs, errors.New("--tls-name is not set, and --listen names no host that agents could reach"))
		}
		c.tlsNames = []string{host}
	}
	return errors.Join(errs...)
}

// announce tells, on out, what agents need.
func announce(out io.Writer, cfg config, address net.Addr) error {
	_, err := fmt.Fprintf(out, "ready: certificate API on %s, root certificate in %s\n", address, filepath.Join(cfg.dataDir, ca.RootFile))
	return err
}
