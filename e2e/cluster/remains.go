package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/e2e/space"
)

// name is that of all that a cluster consists of on this machine. Another one makes another
// cluster beside it.
var name = cmp.Or(os.Getenv("RACEWAY_CLUSTER"), "raceway-cluster")

var (
	// stateDir holds everything of a cluster. It is on a real file system: images are unpacked there.
	stateDir = "/var/tmp/" + name
	lockFile = "/run/" + name + ".lock"
)

// lock is held by the process that has the cluster.
type lock struct{ file *os.File }

// acquire waits until no other process has a cluster.
func acquire(ctx context.Context) (*lock, error) {
	for {
		f, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock the cluster: %w", err)
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && current(f) {
			return &lock{f}, nil
		}
		if err := errors.Join(f.Close()); err != nil {
			return nil, fmt.Errorf("lock the cluster: %w", err)
		}
		if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the cluster: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the other cluster on this machine to end: %w", context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// current reports whether f is still the lock: its last holder may have removed it.
func current(f *os.File) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(lockFile)
	return err == nil && os.SameFile(held, there)
}

// release may be called again, and on nil.
func (l *lock) release() error {
	if l == nil || l.file == nil {
		return nil
	}
	err := errors.Join(os.Remove(lockFile), l.file.Close())
	l.file = nil
	return err
}

// Clean removes what a cluster has left whose process was killed, and returns what it found.
// It waits for a cluster that is in use.
func Clean(ctx context.Context) (_ []string, err error) {
	l, err := acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.release()) }()
	found := Leftovers()
	return found, clean()
}

// clean removes everything that bears the name.
func clean() error {
	errs := []error{removeCgroups("")}
	for _, s := range spaces() {
		errs = append(errs, space.Remove(s))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	if err := os.RemoveAll(stateDir); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

func spaces() []string {
	found, _ := filepath.Glob(filepath.Join(space.Dir, name+"-*")) // the pattern is good
	return found
}

// Leftovers names what is there of a cluster on this machine. After Close it is empty.
func Leftovers() []string {
	var found []string
	cgroups, err := cgroupsOf("")
	if err != nil {
		found = append(found, "(unknown: "+err.Error()+")")
	}
	for _, c := range cgroups {
		found = append(found, "cgroup "+c)
	}
	for _, s := range spaces() {
		found = append(found, "network namespace "+s)
	}
	if _, err := os.Lstat(stateDir); !errors.Is(err, fs.ErrNotExist) {
		found = append(found, "directory "+stateDir)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		found = append(found, "(unknown: "+err.Error()+")")
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], stateDir) {
			found = append(found, "mount "+fields[4])
		}
	}
	return found
}
