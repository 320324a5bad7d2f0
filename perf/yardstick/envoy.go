package yardstick

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/raceway-mesh/raceway/hbone/interop/envoy"
)

// Envoy is a pair of Envoys that speak HBONE, as a sidecar and a waypoint do.
type Envoy struct{ binary string }

// FindEnvoy looks for the program; path may be empty.
func FindEnvoy(path string) (Envoy, error) {
	binary, err := find("envoy", path, "make peers, or set RACEWAY_ENVOY to $(hbone/interop/install-envoy.sh DIR)")
	return Envoy{binary}, err
}

// Version is the release, as 1.40.0.
func (e Envoy) Version() string { return versionOf(e.binary, "--version") }

// Command is part of Pair.
func (e Envoy) Command(dir string, side Side, path Path) (*exec.Cmd, error) {
	relay := envoy.Relay{
		Target: path.Application.String(),
		Cert:   certFile(dir, side), Key: keyFile(dir, side), Root: rootFile(dir),
	}
	relay.Listen, relay.Dial = path.hop(side)
	if side == ClientSide {
		relay.Peer = ServerSide.name()
	}
	config, err := relay.Config()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, string(side)+"-envoy.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, fmt.Errorf("write the configuration: %w", err)
	}
	return exec.Command(e.binary, "-c", file, "--disable-hot-restart", "--log-level", "error"), nil
}
