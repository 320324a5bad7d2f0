package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	runDir       = "/run/raceway"
	bpffsDefault = "/sys/fs/bpf"
	bpffsOwn     = runDir + "/bpffs"
	// outside is the file system as the first process of the PID namespace sees it: what
	// is mounted there outlives a private mount namespace such as `ip netns exec` makes.
	outside = "/proc/1/root"
)

// pinDir finds the directory in a BPF file system that dir stands for, and mounts one if
// there is none. Pins must outlive the agent, so a mount of our own is never made in a
// mount namespace that ends with it.
func pinDir(dir string) (string, error) {
	rel, err := filepath.Rel(bpffsDefault, dir)
	movable := err == nil && filepath.IsLocal(rel)
	candidates := []string{dir, outside + dir}
	if movable {
		// Where pins already are comes first: someone may have mounted /sys/fs/bpf since.
		for _, c := range []string{filepath.Join(bpffsOwn, rel), outside + filepath.Join(bpffsOwn, rel)} {
			if _, err := os.Stat(c); err == nil && onBPFFS(c) {
				return c, nil
			}
		}
	}
	for _, c := range candidates {
		if onBPFFS(c) {
			return c, nil
		}
	}
	if !movable {
		return "", fmt.Errorf("%s is not in a BPF file system and not below %s: mount one (mount -t bpf bpf %s)", dir, bpffsDefault, filepath.Dir(dir))
	}
	root, err := mountOwnBPFFS()
	if err != nil {
		return "", fmt.Errorf("mount a BPF file system at %s: %w", bpffsOwn, err)
	}
	return filepath.Join(root, rel), nil
}

// onBPFFS looks at path, or at its nearest ancestor that exists.
func onBPFFS(path string) bool {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if err == nil {
			return st.Type == unix.BPF_FS_MAGIC
		}
		if parent := filepath.Dir(path); errors.Is(err, fs.ErrNotExist) && parent != path {
			path = parent
			continue
		}
		return false
	}
}

func mountOwnBPFFS() (root string, err error) {
	err = inOutsideMounts(func() error {
		return lockedRunDir(func() error {
			if err := os.MkdirAll(bpffsOwn, 0o700); err != nil {
				return err
			}
			if onBPFFS(bpffsOwn) {
				return nil
			}
			return unix.Mount("bpf", bpffsOwn, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
		})
	})
	if err != nil {
		return "", err
	}
	for _, c := range []string{bpffsOwn, outside + bpffsOwn} {
		if onBPFFS(c) {
			return c, nil
		}
	}
	return "", errors.New("mounted it, but it is not visible here")
}

// unmountOwnBPFFS takes the mount away again once the last agent's pins are gone.
func unmountOwnBPFFS(dir string) error {
	if !strings.HasPrefix(strings.TrimPrefix(dir, outside), bpffsOwn+"/") {
		return nil
	}
	return inOutsideMounts(func() error {
		return lockedRunDir(func() error {
			if !onBPFFS(bpffsOwn) {
				return nil
			}
			if err := removeEmptyDirs(bpffsOwn); err != nil {
				return err
			}
			entries, err := os.ReadDir(bpffsOwn)
			if err != nil || len(entries) > 0 {
				return err
			}
			if err := unix.Unmount(bpffsOwn, 0); err != nil && !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("unmount %s: %w", bpffsOwn, err)
			}
			if err := os.Remove(bpffsOwn); err != nil && !errors.Is(err, unix.EBUSY) {
				return err
			}
			return nil
		})
	})
}

// removeEmptyDirs removes the directories below root that hold no pin.
func removeEmptyDirs(root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		path := filepath.Join(root, e.Name())
		if err := removeEmptyDirs(path); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// lockedRunDir keeps agents of one machine from mounting or unmounting at the same time.
func lockedRunDir(fn func() error) error {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(runDir)
	if err != nil {
		return err
	}
	defer dir.Close() // unlocks
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", runDir, err)
	}
	return fn()
}

// inOutsideMounts runs fn in the mount namespace of the first process, on a thread that
// is not used again: its file system context is no longer the process's.
func inOutsideMounts(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- enterOutsideMounts(fn)
	}()
	return <-done
}

func enterOutsideMounts(fn func() error) error {
	const theirs = "/proc/1/ns/mnt"
	same, err := sameNamespace("/proc/self/ns/mnt", theirs)
	if err != nil {
		return err
	}
	if same {
		return fn()
	}
	ns, err := os.Open(theirs)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter %s: %w", theirs, err)
	}
	return fn()
}

func sameNamespace(a, b string) (bool, error) {
	x, err := os.Readlink(a)
	if err != nil {
		return false, err
	}
	y, err := os.Readlink(b)
	return x == y, err
}

// cgroupRoot returns a path of the root of the cgroup v2 hierarchy, valid until release.
func cgroupRoot(configured string) (path string, release func() error, err error) {
	keep := func() error { return nil }
	if configured != "" {
		return configured, keep, nil
	}
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", nil, err
	}
	defer file.Close()
	if path, err := findCgroup2(bufio.NewScanner(file)); path != "" || err != nil {
		return path, keep, err
	}
	fd, err := detachedCgroup2()
	if err != nil {
		return "", nil, fmt.Errorf("no cgroup2 in /proc/self/mountinfo, and mounting it: %w", err)
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() error { return unix.Close(fd) }, nil
}

// findCgroup2 reads mountinfo (proc_pid_mountinfo(5)) and returns the mount point of a
// cgroup2 that shows the hierarchy's root, or "".
func findCgroup2(lines *bufio.Scanner) (string, error) {
	for lines.Scan() {
		mount, super, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(mount)
		if !ok || len(fields) < 5 || !strings.HasPrefix(super, "cgroup2 ") || fields[3] != "/" {
			continue
		}
		return unescapeMount.Replace(fields[4]), nil
	}
	return "", lines.Err()
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// detachedCgroup2 mounts cgroup2 without a mount point; closing the descriptor ends it.
func detachedCgroup2() (int, error) {
	fsfd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen cgroup2", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	return fd, os.NewSyscallError("fsmount", err)
}
