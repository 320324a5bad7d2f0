package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// unified is where the node sees version 2.
func (c Config) unified() string {
	for _, g := range c.Cgroups {
		if g.Controllers == "" {
			return filepath.Join("/sys/fs/cgroup", g.Mount)
		}
	}
	return ""
}

// settle moves this process out of the root of version 2, which must have none to give its
// children controllers. Where there is version 1 too, the controllers are there.
func (c Config) settle() error {
	leaf := filepath.Join(c.unified(), "init")
	if err := os.MkdirAll(leaf, 0o755); err != nil {
		return fmt.Errorf("make a cgroup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("join a cgroup: %w", err)
	}
	if len(c.Cgroups) > 1 {
		return nil
	}
	return Delegate(c.unified())
}

// Delegate gives the children of a cgroup of version 2 the controllers that it has.
func Delegate(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("delegate cgroup controllers: %w", err)
	}
	for _, controller := range strings.Fields(string(available)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
			return fmt.Errorf("delegate cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

// cgroup makes and opens a cgroup of version 2 for one process of the node: a kubelet is
// told from its neighbours by it.
func (c Config) cgroup(name string) (fd int, err error) {
	dir := filepath.Join(c.unified(), name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, fmt.Errorf("make a cgroup: %w", err)
	}
	fd, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open cgroup %s: %w", dir, err)
	}
	return fd, nil
}
