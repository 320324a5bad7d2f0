// Package file makes Snapshots from a directory of ordinary Kubernetes YAML or JSON, as
// `kubectl get -o yaml` prints it, and watches it. Agents tell each other which pods take
// tunnels by status files in a second directory.
//
//	Dir/*.yaml ────► parse ──► object.Set ──┐
//	                                        ├──► dataplane.Snapshot ──► Store
//	StatusDir/<node>.json ──► captured UIDs ┘
//
// A file that does not parse is reported and its last good content stays in force. Where
// there is none, at the first start, nothing is published: the file may hold a policy.
package file

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// Config says where the cluster is described.
type Config struct {
	// Dir holds files *.yaml, *.yml and *.json, also in its subdirectories. Required.
	Dir string
	// StatusDir holds the nodes' status files; it is made if it is not there. "" if no pod
	// can be captured. It may lie within Dir.
	StatusDir string

	TrustDomain   string // "" is cluster.local
	RootNamespace string // "" is istio-system
	ClusterDomain string // of service host names; "" is cluster.local
	Cluster       string // the name of this cluster; "" when it has none

	// Debounce is how long the files must be quiet after a change before they are read; a
	// directory that is never quiet is read anyway after five times as long. 0 is 30 ms.
	Debounce time.Duration
	// Settle is how long a file must stay empty before its objects go. 0 is 500 ms.
	Settle time.Duration
	// Resync is how often everything is read without a notice of a change. 0 is 10 s.
	Resync time.Duration
	// MaxFileSize is in bytes. 0 is 16 MiB.
	MaxFileSize int64

	// OnProblems, if set, is called from Run whenever the list of problems has changed. It
	// must return soon and must not change the list.
	OnProblems func([]discovery.Problem)
	// Log is required.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	c.TrustDomain = cmp.Or(c.TrustDomain, "cluster.local")
	c.RootNamespace = cmp.Or(c.RootNamespace, "istio-system")
	c.ClusterDomain = cmp.Or(c.ClusterDomain, "cluster.local")
	c.Debounce = cmp.Or(c.Debounce, 30*time.Millisecond)
	c.Settle = cmp.Or(c.Settle, 500*time.Millisecond)
	c.Resync = cmp.Or(c.Resync, 10*time.Second)
	c.MaxFileSize = cmp.Or(c.MaxFileSize, 16<<20)
	if c.Dir != "" {
		c.Dir = filepath.Clean(c.Dir)
	}
	if c.StatusDir != "" {
		c.StatusDir = filepath.Clean(c.StatusDir)
	}
	return c
}

// Validate joins every complaint.
func (c Config) Validate() error {
	var complaints []error
	if c.Dir == "" {
		complaints = append(complaints, errors.New("the cluster directory is not set"))
	}
	if c.Dir != "" && c.StatusDir != "" && filepath.Clean(c.Dir) == filepath.Clean(c.StatusDir) {
		complaints = append(complaints, fmt.Errorf("the cluster directory and the status directory are both %s", c.Dir))
	}
	if c.Debounce < 0 || c.Settle < 0 || c.Resync < 0 || c.MaxFileSize < 0 {
		complaints = append(complaints, errors.New("a duration or size is negative"))
	}
	if c.Log == nil {
		complaints = append(complaints, errors.New("there is no logger"))
	}
	return errors.Join(complaints...)
}

func (c Config) mesh() object.Mesh {
	return object.Mesh{
		TrustDomain:   c.TrustDomain,
		RootNamespace: c.RootNamespace,
		ClusterDomain: c.ClusterDomain,
		Cluster:       c.Cluster,
	}
}

// prepare makes sure that both directories are there.
func (c Config) prepare() error {
	info, err := os.Stat(c.Dir)
	switch {
	case err != nil:
		return fmt.Errorf("open the cluster directory: %w", err)
	case !info.IsDir():
		return fmt.Errorf("open the cluster directory: %s is not a directory", c.Dir)
	}
	if c.StatusDir != "" {
		if err := os.MkdirAll(c.StatusDir, 0o755); err != nil {
			return fmt.Errorf("make the status directory: %w", err)
		}
	}
	return nil
}
