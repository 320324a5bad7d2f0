package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processes are the children of the first process. It must reap whatever loses its parent,
// so it reaps its own children the same way and never waits for one by its id.
type processes struct {
	config Config
	env    []string

	mu    sync.Mutex // held from the start of a child until it is known
	known map[int]chan syscall.WaitStatus
}

func newProcesses(c Config) *processes {
	ps := &processes{config: c, env: Environment(), known: make(map[int]chan syscall.WaitStatus)}
	go ps.reap() // until the node is switched off
	return ps
}

func (ps *processes) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err != nil {
			time.Sleep(50 * time.Millisecond) // no child just now
			continue
		}
		ps.mu.Lock()
		ended := ps.known[pid]
		delete(ps.known, pid)
		ps.mu.Unlock()
		if ended != nil {
			ended <- status
		}
	}
}

func (ps *processes) fork(path string, args []string, files []uintptr, sys *syscall.SysProcAttr) (<-chan syscall.WaitStatus, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	argv := append([]string{path}, args...)
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{Env: ps.env, Files: files, Sys: sys})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	ended := make(chan syscall.WaitStatus, 1)
	ps.known[pid] = ended
	return ended, nil
}

// start starts a process of the node in a cgroup of its own. Its end is in its log.
func (ps *processes) start(name, path string, args ...string) (err error) {
	log, err := os.OpenFile(filepath.Join("/var/log", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	cgroup, err := ps.config.cgroup(name)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, errors.Join(err, log.Close()))
	}
	defer unix.Close(cgroup)
	ended, err := ps.fork(path, args, []uintptr{0, log.Fd(), log.Fd()},
		&syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroup, Setsid: true})
	if err != nil {
		return errors.Join(err, log.Close())
	}
	go func() {
		status := <-ended
		_, err := fmt.Fprintf(log, "%s ended: exit status %d, signal %d\n", name, status.ExitStatus(), status.Signal())
		if err := errors.Join(err, log.Close()); err != nil {
			fmt.Fprintln(os.Stderr, name, "ended:", err)
		}
	}()
	return nil
}

// run runs a command to its end.
func (ps *processes) run(path string, args ...string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	ended, err := ps.fork(path, args, []uintptr{0, w.Fd(), w.Fd()}, nil)
	if err := errors.Join(err, w.Close()); err != nil {
		return errors.Join(err, r.Close())
	}
	var output bytes.Buffer
	_, err = output.ReadFrom(r)
	status := <-ended
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	if status.ExitStatus() != 0 {
		return fmt.Errorf("%s %s: exit status %d: %s", filepath.Base(path), strings.Join(args, " "), status.ExitStatus(), output.Bytes())
	}
	return nil
}
