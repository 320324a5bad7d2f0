// Package kubelet finds the kubelet of a node among its processes, by its name and by where
// it stands: in the host's network namespace, and in no pod's cgroup.
package kubelet

import (
	"bytes"
	"cmp"
	"context"
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
)

// Config says where to look.
type Config struct {
	Proc       string // the host's proc file system; default /proc
	HostNetNS  string // path of the host's network namespace; default Proc/1/ns/net
	CgroupRoot string // root of the cgroup v2 hierarchy; required without Cgroup
	// Cgroup is the directory of the cgroup whose processes are the kubelet, all of them; ""
	// looks for the process.
	Cgroup string
}

// names are those of the programs that the kubelet is, or is part of (comm in proc(5)).
func names() []string { return []string{"kubelet", "kubelite", "k3s-server", "k3s-agent"} }

// initialPIDs is the initial PID namespace, whose numbers BPF programs see (PROC_PID_INIT_INO).
const initialPIDs = "pid:[4026531836]"

// Place is where the kubelet stands.
type Place struct {
	Cgroup uint64 // id of its cgroup v2, which is the inode of the directory
	Path   string // of the cgroup, below the root where that is known
	// PID is its process in the initial PID namespace, or 0 where its number there cannot be
	// told, as in a node that is a container itself.
	PID int
	// Others counts the other processes of the same cgroup, and WithPods says that some of
	// them are a pod's.
	Others   int
	WithPods bool

	dir     string
	process process
}

// process names one for good: numbers are used again.
type process struct {
	pid   int // as Proc has it
	start string
}

// Find returns where the kubelet stands now.
func (c Config) Find() (Place, error) {
	place, err := c.withDefaults().find()
	if err != nil {
		return Place{}, fmt.Errorf("find the kubelet: %w", err)
	}
	return place, nil
}

func (c Config) withDefaults() Config {
	c.Proc = cmp.Or(c.Proc, "/proc")
	c.CgroupRoot = filepath.Clean(c.CgroupRoot)
	c.HostNetNS = cmp.Or(c.HostNetNS, filepath.Join(c.Proc, "1/ns/net"))
	return c
}

func (c Config) find() (Place, error) {
	if c.Cgroup != "" {
		return c.place(filepath.Clean(c.Cgroup), process{})
	}
	p, err := c.process()
	if err != nil {
		return Place{}, err
	}
	dir, err := c.cgroupOf(p.pid)
	if err != nil {
		return Place{}, err
	}
	if inPod(dir[len(c.CgroupRoot):]) {
		return Place{}, fmt.Errorf("process %d is in the cgroup of a pod, %s", p.pid, dir)
	}
	place, err := c.place(dir, p)
	if err != nil {
		return Place{}, err
	}
	if pids, err := os.Readlink(c.file(p.pid, "ns/pid")); err == nil && pids == initialPIDs {
		place.PID = p.pid
	}
	return place, nil
}

// process finds the one process that can be the kubelet.
func (c Config) process() (process, error) {
	host, err := os.Stat(c.HostNetNS)
	if err != nil {
		return process{}, err
	}
	pids, err := c.pids()
	if err != nil {
		return process{}, err
	}
	var found []process
	for _, pid := range pids {
		if !c.isKubelet(pid, host) {
			continue
		}
		start, err := c.start(pid)
		if err != nil {
			continue // it ended
		}
		found = append(found, process{pid, start})
	}
	switch len(found) {
	case 0:
		return process{}, fmt.Errorf("no process of the host is called %s: name its cgroup if it is called otherwise", strings.Join(names(), ", "))
	case 1:
		return found[0], nil
	}
	return process{}, fmt.Errorf("%d processes are called like it, %d and %d among them: name its cgroup", len(found), found[0].pid, found[1].pid)
}

// isKubelet goes by what no container decides: whose it is, its namespaces and its cgroups.
func (c Config) isKubelet(pid int, host fs.FileInfo) bool {
	comm, err := os.ReadFile(c.file(pid, "comm"))
	if err != nil || !slices.Contains(names(), strings.TrimSpace(string(comm))) {
		return false
	}
	owner, err := os.Stat(c.file(pid, ""))
	if err != nil || owner.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
		return false
	}
	net, err := os.Stat(c.file(pid, "ns/net"))
	return err == nil && os.SameFile(net, host) && !c.ofPod(pid)
}

// ofPod reports whether a process is a pod's: in a container, or in a cgroup of any
// hierarchy that the kubelet makes for pods. Unsure means yes.
func (c Config) ofPod(pid int) bool {
	status, err := os.ReadFile(c.file(pid, "status"))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		// One number for each PID namespace, from that of the proc file system inwards.
		if numbers, ok := strings.CutPrefix(line, "NSpid:"); ok && len(strings.Fields(numbers)) != 1 {
			return true
		}
	}
	cgroups, err := os.ReadFile(c.file(pid, "cgroup"))
	return err != nil || inPod(string(cgroups))
}

// inPod knows kubepods, kubepods.slice and kubelet-kubepods.slice.
func inPod(cgroup string) bool { return strings.Contains(cgroup, "kubepods") }

// cgroupOf finds the cgroup that has the process. Its path in proc would be relative to our own
// cgroup namespace, whose place in the hierarchy cannot be told from inside.
func (c Config) cgroupOf(pid int) (dir string, err error) {
	if guess, ok := c.guess(pid); ok && contains(guess, pid) {
		return guess, nil
	}
	// With a slash, as it may be a link to follow.
	err = filepath.WalkDir(c.CgroupRoot+"/", func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // cgroups come and go
			return nil
		case err != nil:
			return err
		case !e.IsDir():
			return nil
		case inPod(e.Name()):
			return fs.SkipDir
		case contains(path, pid):
			dir = filepath.Clean(path)
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && dir == "" {
		err = fmt.Errorf("process %d is in no cgroup below %s", pid, c.CgroupRoot)
	}
	return dir, err
}

// guess is right where we are in the host's cgroup namespace.
func (c Config) guess(pid int) (dir string, ok bool) {
	data, err := os.ReadFile(c.file(pid, "cgroup"))
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(c.CgroupRoot, path), true
		}
	}
	return "", false
}

func contains(dir string, pid int) bool {
	members, err := members(dir)
	return err == nil && slices.Contains(members, pid)
}

func members(dir string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// place describes a cgroup, with the kubelet in it or, when every process counts, with none.
func (c Config) place(dir string, kubelet process) (Place, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return Place{}, err
	}
	pids, err := members(dir)
	if err != nil {
		return Place{}, err
	}
	path := cmp.Or(strings.TrimPrefix(dir, c.CgroupRoot), "/")
	p := Place{Cgroup: info.Sys().(*syscall.Stat_t).Ino, Path: path, dir: dir, process: kubelet}
	for _, pid := range pids {
		if pid == kubelet.pid {
			continue
		}
		if _, err := os.Stat(c.file(pid, "")); err != nil {
			continue // it ended, or it is a thread of another namespace's (0)
		}
		p.Others++
		p.WithPods = p.WithPods || c.ofPod(pid)
	}
	return p, nil
}

func (c Config) pids() ([]int, error) {
	dir, err := os.Open(c.Proc)
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	if err := errors.Join(err, dir.Close()); err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// start is when a process began, in ticks since boot: field 22 of proc_pid_stat(5).
func (c Config) start(pid int) (string, error) {
	data, err := os.ReadFile(c.file(pid, "stat"))
	if err != nil {
		return "", err
	}
	// The name, in parentheses, may have any character in it.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return "", fmt.Errorf("process %d: stat has %d fields after the name", pid, len(fields))
	}
	return string(fields[19]), nil
}

func (c Config) file(pid int, name string) string {
	return filepath.Join(c.Proc, strconv.Itoa(pid), name)
}

// How often Watch makes sure of the process, and how often it looks at all others. One that
// has just gone will be back soon.
const (
	glance = time.Second
	survey = 10 * time.Second
	soon   = time.Minute
)

// Watch tells where the kubelet stands, and again whenever that changes or it is not found,
// until ctx ends. A kubelet that was restarted is told of within about a second.
func (c Config) Watch(ctx context.Context, tell func(Place, error)) {
	c = c.withDefaults()
	ticker := time.NewTicker(glance)
	defer ticker.Stop()
	var told Place
	var trouble string
	var surveyed, seen time.Time
	for {
		here := trouble == "" && c.stillThere(told)
		if here {
			seen = time.Now()
		}
		if time.Since(surveyed) >= survey || !here && time.Since(seen) < soon {
			place, err := c.Find()
			surveyed = time.Now()
			place.Others = min(place.Others, 1) // how many does not matter here
			switch {
			case err != nil && err.Error() != trouble:
				tell(Place{}, err)
				told, trouble = Place{}, err.Error()
			case err == nil && (place != told || trouble != ""):
				tell(place, nil)
				told, trouble = place, ""
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// stillThere is a cheap look; a kubelet that moves to another cgroup is seen by a survey.
func (c Config) stillThere(p Place) bool {
	if p.process.pid == 0 {
		info, err := os.Stat(p.dir)
		return err == nil && info.Sys().(*syscall.Stat_t).Ino == p.Cgroup
	}
	start, err := c.start(p.process.pid)
	return err == nil && start == p.process.start
}
