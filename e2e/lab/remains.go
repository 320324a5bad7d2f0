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
	"time"

	"github.com/raceway-mesh/raceway/e2e/space"
)

// owner is the content of a lab's owner.json: what another process needs to end the lab.
type owner struct {
	Pid       int          `json:"pid"`
	Started   uint64       `json:"started"`
	Keep      bool         `json:"keep,omitempty"`
	Processes []ownProcess `json:"processes,omitempty"` // in the order of their start

	// changing is a lab that is being made or closed at this moment: it has no file.
	changing bool
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
	processes, spaces := slices.Clone(l.processes), slices.Clone(l.spaces)
	closed := l.closed
	l.mu.Unlock()
	found := leftovers(l.opts.Name)
	for _, p := range processes {
		if (ownProcess{Pid: p.pid, Started: p.started}).running() {
			found = append(found, fmt.Sprintf("process %d (%s)", p.pid, p.command))
		}
	}
	if !closed { // then the namespaces are held, and no others can have their inodes
		for _, stray := range straysIn(inodesOf(spaces)) {
			found = append(found, fmt.Sprintf("process %d (%s)", stray.Pid, stray.Command))
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

func inodesOf(spaces []*space.Space) map[uint64]bool {
	inodes := make(map[uint64]bool, len(spaces))
	for _, s := range spaces {
		inodes[s.Inode] = true
	}
	return inodes
}

// leftovers looks for everything that bears the lab's name.
func leftovers(name string) []string {
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
	for _, mount := range mountsUnder(dir, filepath.Join(space.Dir, name+"-")) {
		found = append(found, "mount "+mount)
	}
	for _, pin := range pinsIn(filepath.Join(dir, "bpf")) {
		found = append(found, "pinned object "+pin)
	}
	for _, state := range agentStateOf(name) {
		found = append(found, "directory "+state)
	}
	if _, err := os.Lstat(dir); err == nil {
		found = append(found, "directory "+dir)
	}
	return found
}

// spacesOf lists the named namespaces of a lab.
func spacesOf(name string) []string { return entriesOf(space.Dir, name) }

// agentStateOf lists the directories that agents of a lab keep outside of it.
func agentStateOf(name string) []string {
	found := entriesOf(agentRunDir, name)
	for i := range found {
		found[i] = filepath.Join(agentRunDir, found[i])
	}
	return found
}

// entriesOf lists what is named after a lab in a directory of all labs.
func entriesOf(dir, name string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // no directory, no entries
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

// pinsIn lists the objects pinned below a bpffs, but for the two iterators that a kernel
// with BPF_PRELOAD puts into every new one.
func pinsIn(dir string) []string {
	preloaded := []string{filepath.Join(dir, "maps.debug"), filepath.Join(dir, "progs.debug")}
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !slices.Contains(preloaded, path) {
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

// straysIn finds processes by the inode of their network namespace: descendants of what the
// lab started that left their group. The namespaces must be held open, inodes are reused.
func straysIn(inodes map[uint64]bool) []ownProcess {
	entries, err := os.ReadDir("/proc")
	if err != nil || len(inodes) == 0 {
		return nil
	}
	var found []ownProcess
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue // not a process, or our main thread on a visit
		}
		info, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net"))
		if err != nil {
			continue // it ended
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || !inodes[st.Ino] {
			continue
		}
		started, running, err := startTime(pid)
		if err != nil || !running {
			continue
		}
		command, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		if err != nil {
			continue
		}
		found = append(found, ownProcess{Pid: pid, Started: started, Command: strings.TrimSpace(string(command))})
	}
	return found
}

// killTimeout is for killed processes to be gone.
const killTimeout = 5 * time.Second

// killStrays kills what is left in the namespaces and waits until it is gone.
func killStrays(inodes map[uint64]bool) error {
	deadline := time.Now().Add(killTimeout)
	for {
		strays := straysIn(inodes)
		if len(strays) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end what runs in the lab: %d processes go on after SIGKILL, among them %d (%s)",
				len(strays), strays[0].Pid, strays[0].Command)
		}
		for _, s := range strays {
			if err := syscall.Kill(s.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end %s (pid %d): %w", s.Command, s.Pid, err)
			}
		}
		time.Sleep(pollInterval)
	}
}

// DirOf is what Dir says of the lab of that name, also when there is none.
func DirOf(name string) string { return filepath.Join(runDir, name) }

// ownerless is how long a directory without owner belongs to a process that is just making
// or removing it.
const ownerless = 5 * time.Second

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
		if o.Pid == 0 {
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				delete(known, e.Name()) // it was being removed
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list the labs: %w", err)
			}
			known[e.Name()] = time.Since(info.ModTime()) < ownerless
		}
	}
	return known, nil
}

func readOwner(dir string) (owner, error) {
	var o owner
	content, err := os.ReadFile(ownerFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		info, statErr := os.Stat(dir)
		o.changing = statErr != nil || time.Since(info.ModTime()) < changeTime
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(content, &o)
	}
	if err != nil {
		return o, fmt.Errorf("read what lab %s is: %w", filepath.Base(dir), err)
	}
	return o, nil
}

// changeTime is longer than it takes to make or to close a lab.
const changeTime = time.Minute

func (o owner) running() bool {
	return o.changing || ownProcess{Pid: o.Pid, Started: o.Started}.running()
}

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
	found := leftovers(name)
	var errs []error
	for _, p := range slices.Backward(o.Processes) {
		if p.running() {
			found = append(found, fmt.Sprintf("process %d (%s)", p.Pid, p.Command))
			errs = append(errs, syscall.Kill(-p.Pid, syscall.SIGKILL))
		}
	}
	inodes := make(map[uint64]bool)
	for _, s := range spacesOf(name) {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(space.Dir, s), &st); err == nil {
			inodes[st.Ino] = true
		}
	}
	errs = append(errs, killStrays(inodes))
	for _, s := range spacesOf(name) {
		errs = append(errs, space.Remove(filepath.Join(space.Dir, s)))
	}
	return found, errors.Join(append(errs, removeDir(dir))...)
}
