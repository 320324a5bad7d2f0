package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processKind is the order in which Close ends processes.
type processKind int

const (
	applicationProcess processKind = iota
	agentProcess
	caProcess
)

// Process is a child of this process, in the network namespace of a Host and in a process
// group of its own.
type Process struct {
	Host *Host
	Log  string // where its outputs go, unless its command names others

	kind    processKind
	command string
	pid     int
	started uint64        // in clock ticks since boot: what tells it from a later owner of the pid
	done    chan struct{} // closed when it has been waited for
	err     error         // what Wait returned; read it after done
}

// start starts cmd from a thread in the namespace: a child inherits the namespace of the
// thread that forks it, so that nothing is mounted over /sys as `ip netns exec` does.
func (h *Host) start(cmd *exec.Cmd, kind processKind, log string) (*Process, error) {
	if log == "" {
		log = h.Name + "-" + filepath.Base(cmd.Path) + ".log"
	}
	p := &Process{
		Host: h, kind: kind, command: filepath.Base(cmd.Path),
		Log: filepath.Join(h.lab.logDir(), log), done: make(chan struct{}),
	}
	if cmd.Stdout == nil || cmd.Stderr == nil {
		out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open the log of %s: %w", p.command, err)
		}
		defer out.Close() //nolint:errcheck // the child has a descriptor of its own
		if cmd.Stdout == nil {
			cmd.Stdout = out
		}
		if cmd.Stderr == nil {
			cmd.Stderr = out
		}
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	// Ctrl-C on the terminal is for us: we end the children in order.
	cmd.SysProcAttr.Setpgid = true
	if !h.lab.opts.Keep {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if err := p.launch(cmd); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", p.command, h.Name, err)
	}
	if err := h.lab.track(func() { h.lab.processes = append(h.lab.processes, p) }); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	if err := h.lab.writeOwner(); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return p, nil
}

// launch starts cmd and waits for it on one thread in the namespace. The parent-death signal
// is sent when the thread that forked ends (prctl(2)), so this thread must outlive the child.
func (p *Process) launch(cmd *exec.Cmd) error {
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		err := p.Host.Do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			p.pid = cmd.Process.Pid
			p.started, _, _ = startTime(p.pid) // 0 when it has ended already
			started <- nil
			p.err = cmd.Wait()
			return nil
		})
		if err != nil {
			started <- err // the buffer takes what comes after a start, when nobody reads it
		}
	}()
	return <-started
}

// Pid is the process's id, also after its end.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the process, or of ctx, and tells how it ended (*exec.ExitError).
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for %s (pid %d): %w", p.command, p.pid, context.Cause(ctx))
	}
}

// Signal signals the process alone; one that has ended is no error.
func (p *Process) Signal(sig syscall.Signal) error {
	return p.signal(p.pid, sig)
}

// Kill kills the process and its group at once and waits for it.
func (p *Process) Kill() error {
	if err := p.signal(-p.pid, syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// Stop asks the process to end with SIGTERM and waits for it until ctx ends.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop %s (pid %d): it goes on after SIGTERM: %w", p.command, p.pid, context.Cause(ctx))
	}
}

// signal sends to a process, or to a group when pid is negative. Before done is closed the
// pid cannot belong to anybody else.
func (p *Process) signal(pid int, sig syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send %s to %s (pid %d): %w", unix.SignalName(sig), p.command, p.pid, err)
	}
	return nil
}

// end is Stop, and Kill when that does not help; it also ends what the process left in its group.
func (p *Process) end(ctx context.Context) error {
	if p.kind == applicationProcess {
		return p.Kill() // nothing depends on how a test's application ends
	}
	err := p.Stop(ctx)
	if err == nil {
		return nil
	}
	return errors.Join(err, p.Kill())
}

// Usage is what a process has used so far.
type Usage struct {
	RSS     uint64        // resident bytes now
	PeakRSS uint64        // most resident bytes ever
	User    time.Duration // CPU time
	System  time.Duration
	FDs     int // open file descriptors
	Threads int
	// Wakeups is how often a thread slept and went on, those that have ended aside.
	Wakeups uint64
}

// Usage reads the process's use of memory, CPU and descriptors from /proc.
func (p *Process) Usage() (Usage, error) {
	dir := filepath.Join("/proc", strconv.Itoa(p.pid))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return Usage{}, fmt.Errorf("read the use of %s: %w", p.command, err)
	}
	var u Usage
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		number, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			continue // not a number, and so none of these
		}
		switch key {
		case "VmRSS":
			u.RSS = number << 10
		case "VmHWM":
			u.PeakRSS = number << 10
		case "Threads":
			u.Threads = int(number)
		}
	}
	if u.Wakeups, err = wakeups(dir); err != nil {
		return Usage{}, fmt.Errorf("read the use of %s: %w", p.command, err)
	}
	fields, err := statFields(p.pid)
	if err != nil {
		return Usage{}, err
	}
	if u.User, err = ticks(fields, 14); err != nil {
		return Usage{}, err
	}
	if u.System, err = ticks(fields, 15); err != nil {
		return Usage{}, err
	}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return Usage{}, fmt.Errorf("count the descriptors of %s: %w", p.command, err)
	}
	u.FDs = len(fds)
	return u, nil
}

func wakeups(dir string) (sum uint64, err error) {
	threads, err := filepath.Glob(filepath.Join(dir, "task", "*", "status"))
	if err != nil {
		return 0, err
	}
	for _, thread := range threads {
		status, err := os.ReadFile(thread)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(status)) {
			if value, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				if err != nil {
					return 0, fmt.Errorf("read %s: %w", thread, err)
				}
				sum += n
			}
		}
	}
	return sum, nil
}

// tick is the unit of times in /proc/<pid>/stat: USER_HZ is 100 on every Linux that Go runs on.
const tick = 10 * time.Millisecond

// statFields are the fields of /proc/<pid>/stat from the third on: the second, the command,
// may contain anything.
func statFields(pid int) ([]string, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return nil, fmt.Errorf("read the state of process %d: %w", pid, err)
	}
	return strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])), nil
}

// ticks reads the field that proc(5) gives that number.
func ticks(fields []string, number int) (time.Duration, error) {
	if len(fields) < number-2 {
		return 0, fmt.Errorf("read /proc/<pid>/stat: %d fields, want %d", len(fields)+2, number)
	}
	n, err := strconv.ParseInt(fields[number-3], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read /proc/<pid>/stat: %w", err)
	}
	return time.Duration(n) * tick, nil
}

// Running reports whether a process goes on. One that nobody has reaped does not.
func Running(pid int) (bool, error) {
	_, running, err := startTime(pid)
	return running, err
}

// startTime tells when a process started, in ticks since boot, and whether it still runs.
func startTime(pid int) (started uint64, running bool, err error) {
	fields, err := statFields(pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	if len(fields) < 20 {
		return 0, false, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	started, err = strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return started, fields[0] != "Z" && fields[0] != "X", nil
}
