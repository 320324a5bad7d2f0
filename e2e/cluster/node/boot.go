package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The words that the first process is started with.
const (
	StageJoin = "join" // outside the cgroup namespace
	StageRun  = "run"
)

// Boot is the first process of a node. It is to be called with new namespaces for mounts,
// processes, IPC and the host name, and in the node's network namespace. It returns only
// when something is wrong: a node is switched off by killing it.
func Boot(ctx context.Context, stage, file string) error {
	c, err := read(file)
	if err != nil {
		return err
	}
	switch stage {
	case StageJoin:
		return c.join()
	case StageRun:
		if err := c.makeRoot(); err != nil {
			return err
		}
		return c.run(ctx)
	}
	return fmt.Errorf("boot: unknown stage %q", stage)
}

// join moves this process into the node's cgroups and then makes them the roots of a new
// cgroup namespace. A namespace belongs to a thread; starting anew makes it the process's.
func (c Config) join() error {
	for _, g := range c.Cgroups {
		if err := os.WriteFile(g.Dir+"/cgroup.procs", []byte("0"), 0); err != nil {
			return fmt.Errorf("join a cgroup: %w", err)
		}
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	err = unix.Exec(self, []string{self, StageRun, c.File()}, os.Environ()) //nolint:forbidigo // handed on
	return errors.Join(errors.New("start anew in the cgroup namespace"), err)
}
