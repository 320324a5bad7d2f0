package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	runDir       = "/run/raceway"
	bpffsDefault = "/sys/fs/bpf"
	bpffsOwn     = runDir + "/bpffs"
)

// pinRoot is where the pins are. Pins must outlive the agent, so they belong in a mount
// that the outermost mount namespace has; an agent under `ip netns exec` runs in a private
// one, which ends with it, and where /sys is a new mount without BPF file system.
type pinRoot struct {
	dir  string
	own  string   // the same as a path below bpffsOwn, which we unmount when it is empty; or ""
	held *os.File // what dir starts from when it is not visible here; nil otherwise
}

func (r *pinRoot) close() error {
	if r.held == nil {
		return nil
	}
	return r.held.Close()
}

// openPinRoot finds the directory in a BPF file system that dir stands for, mounts one if
// there is none, and makes the directory.
func openPinRoot(dir string, log *slog.Logger) (r *pinRoot, err error) {
	// From the look at the mount until our directory is in it, nobody must unmount it.
	err = lockedRunDir(func() error {
		if r, err = findPinRoot(dir, log); err != nil {
			return err
		}
		return os.MkdirAll(r.dir, 0o700)
	})
	return r, err
}

func findPinRoot(dir string, log *slog.Logger) (*pinRoot, error) {
	out := outermost(log)
	rel, err := filepath.Rel(bpffsDefault, dir)
	movable := err == nil && filepath.IsLocal(rel)
	if movable {
		// Where pins already are comes first: someone may have mounted /sys/fs/bpf since.
		if r, err := out.find(filepath.Join(bpffsOwn, rel), isPresentOnBPFFS); r != nil || err != nil {
			return r, err
		}
	}
	if r, err := out.find(dir, onBPFFS); r != nil || err != nil {
		return r, err
	}
	if !movable {
		return nil, fmt.Errorf("%s is not in a BPF file system and not below %s: mount one (mount -t bpf bpf %s)", dir, bpffsDefault, filepath.Dir(dir))
	}
	if err := out.mountOwnBPFFS(); err != nil {
		return nil, fmt.Errorf("mount a BPF file system at %s: %w", bpffsOwn, err)
	}
	r, err := out.find(filepath.Join(bpffsOwn, rel), onBPFFS)
	if r == nil && err == nil {
		err = fmt.Errorf("mounted a BPF file system at %s, but it cannot be seen", bpffsOwn)
	}
	return r, err
}

// mounts is a process whose view of the file system counts.
type mounts struct{ proc string }

// outermost is the first process, or our parent where that one is out of reach, or we.
func outermost(log *slog.Logger) mounts {
	for _, proc := range []string{"/proc/1", fmt.Sprintf("/proc/%d", os.Getppid())} {
		if _, err := os.Readlink(proc + "/ns/mnt"); err == nil {
			return mounts{proc}
		}
	}
	log.Warn("cannot look at the mounts of the first process or the parent; pins may end with this mount namespace")
	return mounts{"/proc/self"}
}

// find looks for path here, and then in the outer view. nil means that it is in neither.
func (m mounts) find(path string, good func(string) bool) (*pinRoot, error) {
	own := ""
	if strings.HasPrefix(path, bpffsOwn+"/") {
		own = path
	}
	if good(path) {
		return &pinRoot{dir: path, own: own}, nil
	}
	if !good(m.proc + "/root" + path) {
		return nil, nil
	}
	// The process may end before we do, and its /proc/<pid>/root with it.
	base := filepath.Dir(path)
	for !isPresentOnBPFFS(m.proc + "/root" + base) {
		base = filepath.Dir(base)
		if base == "/" {
			return nil, nil
		}
	}
	held, err := os.Open(m.proc + "/root" + base)
	if err != nil {
		return nil, err
	}
	dir := fmt.Sprintf("/proc/self/fd/%d%s", held.Fd(), strings.TrimPrefix(path, base))
	return &pinRoot{dir: dir, own: own, held: held}, nil
}

func isPresentOnBPFFS(path string) bool {
	_, err := os.Stat(path)
	return err == nil && onBPFFS(path)
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

func (m mounts) mountOwnBPFFS() error {
	return m.do(func() error {
		if err := os.MkdirAll(bpffsOwn, 0o700); err != nil {
			return err
		}
		if onBPFFS(bpffsOwn) {
			return nil
		}
		return unix.Mount("bpf", bpffsOwn, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	})
}

// removePinRoot removes what is empty above the directory of an agent that is gone, and
// the mount of ours with the last agent.
func (m mounts) removePinRoot(own string) error {
	return lockedRunDir(func() error {
		return m.do(func() error {
			for dir := filepath.Dir(own); dir != bpffsOwn; dir = filepath.Dir(dir) {
				if err := os.Remove(dir); errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) {
					break
				} else if err != nil {
					return err
				}
			}
			return unmountEmpty()
		})
	})
}

func unmountEmpty() error {
	if !onBPFFS(bpffsOwn) {
		return nil
	}
	entries, err := os.ReadDir(bpffsOwn)
	if err != nil || slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !isPreloaded(e.Name()) }) {
		return err
	}
	if err := ignoreBusy(unix.Unmount(bpffsOwn, 0)); err != nil {
		return fmt.Errorf("unmount %s: %w", bpffsOwn, err)
	}
	if err := os.Remove(bpffsOwn); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return ignoreBusy(err)
	}
	return nil
}

// isPreloaded tells the two iterators that the kernel itself puts into every BPF file
// system (CONFIG_BPF_PRELOAD); names with dots are its own.
func isPreloaded(name string) bool { return strings.HasSuffix(name, ".debug") }

func ignoreBusy(err error) error {
	if errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}

// lockedRunDir keeps agents of one machine from mounting or unmounting at the same time.
func lockedRunDir(fn func() error) (err error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(runDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }() // unlocks
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", runDir, err)
	}
	return fn()
}

// do runs fn in the outer mount namespace, on a thread that is not used again: its file
// system context is no longer the process's.
func (m mounts) do(fn func() error) error {
	same, err := sameNamespace("/proc/self/ns/mnt", m.proc+"/ns/mnt")
	if err != nil {
		return err
	}
	if same {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- m.enter(fn)
	}()
	return <-done
}

func (m mounts) enter(fn func() error) (err error) {
	ns, err := os.Open(m.proc + "/ns/mnt")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter %s: %w", ns.Name(), err)
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

// CgroupRoot returns a path of the root of the cgroup v2 hierarchy, valid until release.
func CgroupRoot(configured string) (path string, release func() error, err error) {
	keep := func() error { return nil }
	if configured != "" {
		// Where controllers of version 1 are in use, systemd has version 2 beside them.
		if unified := filepath.Join(configured, "unified"); !isCgroup2(configured) && isCgroup2(unified) {
			return unified, keep, nil
		}
		return configured, keep, nil
	}
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = file.Close() }() // it is only read
	if path, err := findCgroup2(bufio.NewScanner(file), isCgroup2); path != "" || err != nil {
		return path, keep, err
	}
	fd, err := detachedCgroup2()
	if err != nil {
		return "", nil, fmt.Errorf("no cgroup2 in /proc/self/mountinfo, and mounting it: %w", err)
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() error { return unix.Close(fd) }, nil
}

// findCgroup2 reads mountinfo (proc_pid_mountinfo(5)) and returns the mount point of a
// cgroup2 that shows the hierarchy's root, or "". One may be hidden under a later mount,
// which only present can tell.
func findCgroup2(lines *bufio.Scanner, present func(path string) bool) (string, error) {
	for lines.Scan() {
		mount, super, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(mount)
		if !ok || len(fields) < 5 || !strings.HasPrefix(super, "cgroup2 ") || fields[3] != "/" {
			continue
		}
		if path := unescapeMount(fields[4]); present(path) {
			return path, nil
		}
	}
	return "", lines.Err()
}

func isCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// unescapeMount undoes mountinfo's octal escapes.
func unescapeMount(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

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
