package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// owner is the content of a lab's owner.json: what another process needs to end the lab.
type owner struct {
	Pid       int          `json:"pid"`
	Started   uint64       `json:"started"`
	Keep      bool         `json:"keep,omitempty"`
	Processes []ownProcess `json:"processes,omitempty"` // in the order of their start
}

type ownProcess struct {
	Pid     int    `json:"pid"`
	Started uint64 `json:"started"`
	Command string `json:"command"`
}

func ownerFile(dir string) string { return filepath.Join(dir, "owner.json") }

func (l *Lab) writeOwner() error {
	started, _, err := startTime(os.Getpid())
	if err != nil {
		return err
	}
	o := owner{Pid: os.Getpid(), Started: started, Keep: l.opts.Keep}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.processes {
		if p.Running() {
			o.Processes = append(o.Processes, ownProcess{Pid: p.pid, Started: p.started, Command: p.command})
		}
	}
	content, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("describe the lab: %w", err)
	}
	return l.writeAtomically(ownerFile(l.dir), content, 0o644)
}

// Leftovers names what is still there of the lab: processes, network namespaces, links,
// mounts, pins and files. After Close it is empty.
func (l *Lab) Leftovers() []string {
	l.mu.Lock()
	processes := slices.Clone(l.processes)
	l.mu.Unlock()
	var found []string
	for _, p := range processes {
		if started, running, err := startTime(p.pid); err == nil && running && started == p.started {
			found = append(found, fmt.Sprintf("process %d (%s)", p.pid, p.command))
		}
	}
	return append(found, leftovers(l.opts.Name, l.spaceInodes())...)
}

func (l *Lab) spaceInodes() map[uint64]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	inodes := make(map[uint64]string, len(l.spaces))
	for _, s := range l.spaces {
		inodes[s.inode] = s.name
	}
	return inodes
}

// leftovers looks for everything that bears the lab's name, and for processes in its
// namespaces, which may be nobody's children by now.
func leftovers(name string, inodes map[uint64]string) []string {
	var found []string
	dir := filepath.Join(runDir, name)
	for _, s := range spacesOf(name) {
		found = append(found, "network namespace "+s)
	}
	if links, err := net.Interfaces(); err == nil {
		for _, link := range links {
			if strings.HasPrefix(link.Name, name) {
				found = append(found, "link "+link.Name)
			}
		}
	}
	for _, mount := range mountsUnder(dir, filepath.Join(netnsDir, name+"-")) {
		found = append(found, "mount "+mount)
	}
	for _, pin := range pinsIn(filepath.Join(dir, "bpf")) {
		found = append(found, "pinned object "+pin)
	}
	if _, err := os.Lstat(dir); err == nil {
		found = append(found, "directory "+dir)
	}
	for pid, s := range processesIn(inodes) {
		found = append(found, fmt.Sprintf("process %d in %s", pid, s))
	}
	slices.Sort(found)
	return found
}

// spacesOf lists the named namespaces of a lab.
func spacesOf(name string) []string {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return nil // no directory, no names
	}
	var found []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+"-") {
			found = append(found, e.Name())
		}
	}
	return found
}

// mountsUnder lists mount points whose path begins with one of the prefixes.
func mountsUnder(prefixes ...string) []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{"(unknown: " + err.Error() + ")"}
	}
	var found []string
	for line := range strings.Lines(string(info)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(fields[4], p) }) {
			found = append(found, fields[4])
		}
	}
	return found
}

// pinsIn lists the objects pinned below a directory of a bpffs.
func pinsIn(dir string) []string {
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		found = append(found, "(unknown: "+err.Error()+")")
	}
	return found
}

// Pins lists what agents have pinned, by path below their directories. Pins outlive an
// agent, and go with the lab.
func (l *Lab) Pins() []string { return pinsIn(l.bpfDir()) }

// processesIn finds processes by the inode of their network namespace.
func processesIn(inodes map[uint64]string) map[int]string {
	found := make(map[int]string)
	entries, err := os.ReadDir("/proc")
	if err != nil || len(inodes) == 0 {
		return found
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue // not a process
		}
		info, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net"))
		if err != nil {
			continue // it ended
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && inodes[st.Ino] != "" {
			found[pid] = inodes[st.Ino]
		}
	}
	return found
}

// Known lists the labs on this machine by name, and says of each whether the process that
// made it still runs.
func Known() (map[string]bool, error) {
	entries, err := os.ReadDir(runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the labs: %w", err)
	}
	known := make(map[string]bool, len(entries))
	for _, e := range entries {
		o, err := readOwner(filepath.Join(runDir, e.Name()))
		if err != nil {
			return nil, err
		}
		known[e.Name()] = o.running()
	}
	return known, nil
}

func readOwner(dir string) (owner, error) {
	var o owner
	content, err := os.ReadFile(ownerFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil // it was being made, or removed
	}
	if err == nil {
		err = json.Unmarshal(content, &o)
	}
	if err != nil {
		return o, fmt.Errorf("read what lab %s is: %w", filepath.Base(dir), err)
	}
	return o, nil
}

func (o owner) running() bool { return ownProcess{Pid: o.Pid, Started: o.Started}.running() }

func (p ownProcess) running() bool {
	if p.Pid == 0 {
		return false
	}
	started, running, err := startTime(p.Pid)
	return err == nil && running && started == p.Started
}

// Remove ends a lab whose process has gone: one that was kept, or whose maker was killed.
// A lab whose maker runs is refused. What was left of it is returned, as Leftovers says it.
func Remove(name string) ([]string, error) {
	dir := filepath.Join(runDir, name)
	if name == "" || filepath.Base(name) != name {
		return nil, fmt.Errorf("remove lab %q: not a name", name)
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("remove lab %s: there is none: %w", name, err)
	}
	o, err := readOwner(dir)
	if err != nil {
		return nil, err
	}
	if o.running() {
		return nil, fmt.Errorf("remove lab %s: the process that made it still runs (pid %d): end that", name, o.Pid)
	}
	found := leftovers(name, nil)
	var errs []error
	for _, p := range slices.Backward(o.Processes) {
		if p.running() {
			found = append(found, fmt.Sprintf("process %d (%s)", p.Pid, p.Command))
			errs = append(errs, syscall.Kill(-p.Pid, syscall.SIGKILL))
		}
	}
	for _, s := range spacesOf(name) {
		errs = append(errs, removeNamed(filepath.Join(netnsDir, s)))
	}
	return found, errors.Join(append(errs, removeDir(dir))...)
}
