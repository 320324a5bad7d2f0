package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// ReleaseConfig says where an agent that is not there any more left its traces. The paths are
// the host's own.
type ReleaseConfig struct {
	Kernel       kernel.Config // Dir and StateDir are required
	CNI          CNIConfig     // directories and state; without them nothing is looked for
	SnapshotFile string        // "" for none
	// Files are others to remove, as sockets.
	Files []string
	Log   *slog.Logger // default: none
}

// ReleaseNode takes the mesh off this node without its agent and without an API server: every
// pod speaks in clear afterwards and nothing is left. It says what it removed, also beside an
// error, and may be called again. While an agent runs it refuses.
func ReleaseNode(ctx context.Context, cfg ReleaseConfig) (removed []string, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Kernel.Log == nil {
		cfg.Kernel.Log = cfg.Log
	}
	if err := cfg.CNI.validate(); err != nil {
		return nil, err
	}
	// The kernel's side first: its locks tell whether an agent runs, before anything is undone.
	removed, err = kernel.Remove(cfg.Kernel)
	if err := errors.Join(err, context.Cause(ctx)); err != nil {
		return removed, err
	}
	before := cfg.traces()
	var errs []error
	if cfg.CNI.enabled() {
		errs = append(errs, install.Remove(cfg.CNI.installation("", cfg.Log)))
	}
	for _, path := range append(cfg.Files, cfg.SnapshotFile) {
		errs = append(errs, removeFile(path))
	}
	after := cfg.traces()
	for _, trace := range before {
		if !slices.Contains(after, trace) {
			removed = append(removed, trace)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return removed, fmt.Errorf("release the node: %w", err)
	}
	return removed, nil
}

// traces names what there is of the agent outside the kernel.
func (c ReleaseConfig) traces() []string {
	var found []string
	paths := append(slices.Clone(c.Files), c.SnapshotFile)
	if c.CNI.enabled() {
		paths = append(paths, filepath.Join(c.CNI.BinDir, conf.PluginType), c.CNI.StateDir)
		entries, err := os.ReadDir(c.CNI.ConfDir)
		if err != nil {
			c.Log.Debug("read the network configuration", "error", err) // there is none
		}
		for _, e := range entries {
			path := filepath.Join(c.CNI.ConfDir, e.Name())
			if text, err := os.ReadFile(path); err == nil && conf.Has(text, conf.PluginType) {
				found = append(found, "CNI plugin in "+path)
			}
		}
	}
	for _, path := range paths {
		if _, err := os.Lstat(path); path != "" && err == nil {
			found = append(found, path)
		}
	}
	return found
}
