package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster/node"
)

const cgroupRoot = "/sys/fs/cgroup"

// hierarchy is one mount of cgroups on this machine.
type hierarchy struct {
	mount       string // the mount point
	controllers string // mount option of version 1, "" is version 2
	own         string // below mount, where this process is and so the cluster belongs
}

// hierarchies lists the mounts below cgroupRoot. The one of version 2 is last and has no own
// cgroup: a cgroup with processes cannot hand its controllers down.
func hierarchies() ([]hierarchy, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	own, err := ownCgroups()
	if err != nil {
		return nil, err
	}
	var found []hierarchy
	for line := range strings.Lines(string(mounts)) {
		// 36 35 98:0 /root /mount/point rw,noatime shared:1 - type source options
		place, kind, ok := strings.Cut(line, " - ")
		at, what := strings.Fields(place), strings.Fields(kind)
		if !ok || len(at) < 5 || len(what) < 3 || !strings.HasPrefix(at[4], cgroupRoot) {
			continue
		}
		switch what[0] {
		case "cgroup2":
			found = append(found, hierarchy{mount: at[4]})
		case "cgroup":
			controllers := controllersOf(what[2])
			relative, err := filepath.Rel(at[3], own[controllers])
			if err != nil || strings.HasPrefix(relative, "..") {
				relative = "." // this process is above what is mounted here
			}
			found = append(found, hierarchy{mount: at[4], controllers: controllers, own: relative})
		}
	}
	slices.SortStableFunc(found, func(a, b hierarchy) int {
		switch {
		case a.controllers != "" && b.controllers == "":
			return -1
		case a.controllers == "" && b.controllers != "":
			return 1
		}
		return 0
	})
	if len(found) == 0 || found[len(found)-1].controllers != "" {
		return nil, fmt.Errorf("find cgroups: no cgroup2 is mounted below %s", cgroupRoot)
	}
	return found, nil
}

// controllersOf picks a hierarchy's controllers out of its mount's options.
func controllersOf(options string) string {
	var controllers []string
	for _, o := range strings.Split(options, ",") {
		switch o {
		case "rw", "ro", "xattr", "none", "clone_children", "release_agent":
		default:
			controllers = append(controllers, o)
		}
	}
	return strings.Join(controllers, ",")
}

// ownCgroups maps controllers to this process's cgroup of version 1.
func ownCgroups() (map[string]string, error) {
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	own := make(map[string]string)
	for line := range strings.Lines(strings.TrimSpace(string(content))) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 {
			own[fields[1]] = fields[2]
		}
	}
	return own, nil
}

// makeCgroups makes the cgroup of one part of the cluster in each hierarchy.
func makeCgroups(part string) ([]node.Cgroup, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var made []node.Cgroup
	for _, h := range all {
		parent := filepath.Join(h.mount, h.own, name)
		dir := filepath.Join(parent, part)
		for _, d := range []string{parent, dir} {
			if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("make a cgroup: %w", err)
			}
			if err := h.ready(d); err != nil {
				return nil, err
			}
		}
		relative, err := filepath.Rel(cgroupRoot, h.mount)
		if err != nil {
			return nil, err
		}
		if relative == "." {
			relative = ""
		}
		options := h.controllers
		if strings.HasPrefix(options, "name=") {
			options = "none," + options
		}
		made = append(made, node.Cgroup{Dir: dir, Mount: relative, Controllers: options})
	}
	return made, nil
}

// ready gives a new cgroup what its parent has: with version 1 a cpuset begins empty, and
// with version 2 alone controllers must be handed down.
func (h hierarchy) ready(dir string) error {
	switch {
	case slices.Contains(strings.Split(h.controllers, ","), "cpuset"):
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			content, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), content, 0)
			}
			if err != nil {
				return fmt.Errorf("prepare a cgroup: %w", err)
			}
		}
		return os.WriteFile(filepath.Join(dir, "cgroup.clone_children"), []byte("1"), 0)
	case h.controllers == "" && h.mount == cgroupRoot:
		return node.Delegate(filepath.Dir(dir))
	}
	return nil
}

// unifiedDir is a part's cgroup of version 2.
func unifiedDir(cgroups []node.Cgroup) string { return cgroups[len(cgroups)-1].Dir }

// killTimeout is for what was killed to be gone.
const killTimeout = 20 * time.Second

// removeCgroups kills what is in the cgroups of a part, or of the whole cluster when part is
// "", and removes them.
func removeCgroups(part string) error {
	dirs, err := cgroupsOf(part)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(killTimeout)
	for _, dir := range slices.Backward(dirs) { // version 2 first: it is what all are in
		for {
			err := removeTree(dir)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", dir, err)
			}
			if err := killIn(dir); err != nil {
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

// cgroupsOf finds the cgroups, also those of a process that was elsewhere in a hierarchy.
func cgroupsOf(part string) ([]string, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, h := range all {
		err := filepath.WalkDir(h.mount, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV):
				return err
			case err != nil || !d.IsDir() || d.Name() != name:
				return nil
			}
			if _, err := os.Stat(filepath.Join(path, part)); err == nil {
				found = append(found, filepath.Join(path, part))
			}
			return fs.SkipDir
		})
		if err != nil {
			return nil, fmt.Errorf("find cgroups: %w", err)
		}
	}
	return found, nil
}

// removeTree removes a cgroup and those below, which fails while processes are in one.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := removeTree(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return syscall.Rmdir(dir)
}

// killIn kills all processes in a cgroup and those below.
func killIn(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil //nolint:nilerr // it has just gone, or it will be tried again
		}
		pids, err := os.ReadFile(path)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		for _, field := range strings.Fields(string(pids)) {
			// 0 is a process that this one cannot see.
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
					return fmt.Errorf("kill process %d: %w", pid, err)
				}
			}
		}
		return nil
	})
}
