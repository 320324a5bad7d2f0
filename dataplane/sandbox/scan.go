package sandbox

import (
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
	"time"

	"golang.org/x/sys/unix"
)

// scan is one look at all processes.
type scan struct {
	at     time.Time
	pods   map[string][]candidate // by UID, the likeliest first
	denied error                  // why a pod's process could not be looked at, nil when all could
}

// candidate is a network namespace that a process of a pod is in.
type candidate struct {
	inode   inode
	name    string // where the runtime has it, "" when nowhere
	proc    string // of the pod's oldest process in it
	started uint64 // when that one started, in ticks since boot
}

type inode struct{ dev, ino uint64 }

// path prefers the name: it stays while the pod does.
func (c candidate) path() string {
	if c.name != "" {
		return c.name
	}
	return c.proc + "/ns/net"
}

// look takes processes as they come: what ends meanwhile is left out.
func look(ctx context.Context, cfg Config) (*scan, error) {
	processes, err := os.ReadDir(cfg.Proc)
	if err != nil {
		return nil, err
	}
	names, err := named(cfg.Run)
	if err != nil {
		return nil, err
	}
	s := &scan{pods: make(map[string][]candidate)}
	for _, p := range processes {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if _, err := strconv.ParseUint(p.Name(), 10, 32); err == nil {
			s.add(filepath.Join(cfg.Proc, p.Name()), names)
		}
	}
	for _, candidates := range s.pods {
		slices.SortFunc(candidates, func(a, b candidate) int {
			return cmp.Or(rank(a)-rank(b), cmp.Compare(a.started, b.started))
		})
	}
	return s, nil
}

// rank puts what the runtime named first.
func rank(c candidate) int {
	if c.name != "" {
		return 0
	}
	return 1
}

// add takes in the process of dir.
func (s *scan) add(dir string, names map[inode]string) {
	uid, err := podOf(dir)
	if err != nil || uid == "" {
		return
	}
	at, err := inodeOf(dir + "/ns/net")
	if errors.Is(err, fs.ErrPermission) {
		s.denied = err
	}
	if err != nil {
		return
	}
	started, err := startOf(dir)
	if err != nil {
		return
	}
	candidates := s.pods[uid]
	for i := range candidates {
		if c := &candidates[i]; c.inode == at {
			if started < c.started {
				c.proc, c.started = dir, started
			}
			return
		}
	}
	s.pods[uid] = append(candidates, candidate{inode: at, name: names[at], proc: dir, started: started})
}

// blind tells an operator why nothing may have been seen.
func (s *scan) blind() string {
	if s.denied == nil {
		return ""
	}
	return fmt.Sprintf(" (%v: the agent needs hostPID and CAP_SYS_PTRACE)", s.denied)
}

// named returns the names that network namespaces have in dir, which need not be there.
func named(dir string) (map[inode]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make(map[inode]string, len(entries))
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if at, err := inodeOf(path); err == nil {
			names[at] = path
		}
	}
	return names, nil
}

func inodeOf(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return inode{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return inode{dev: st.Dev, ino: st.Ino}, nil
}

// startOf reads when a process started, field 22 of proc_pid_stat(5). The second is its
// name, which may hold anything.
func startOf(dir string) (uint64, error) {
	data, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	const starttime = 22 - 3
	if len(fields) <= starttime {
		return 0, fmt.Errorf("%s/stat is cut short", dir)
	}
	return strconv.ParseUint(fields[starttime], 10, 64)
}
