package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/e2e/space"
)

// process is a child of this one in a network namespace of the cluster. The kernel kills it
// when this process ends.
type process struct {
	name string
	log  string
	pid  int
	done chan struct{}
	err  error // of Wait; read it after done
}

// launch says what to start, and how.
type launch struct {
	name   string
	space  *space.Space
	cgroup string  // of version 2; "" is this process's
	flags  uintptr // namespaces to make
	log    string
}

// start starts a command that goes on until kill.
func (l launch) start(command string, args ...string) (*process, error) {
	out, err := os.OpenFile(l.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", l.name, err)
	}
	defer out.Close() //nolint:errcheck // the child has a descriptor of its own
	cmd := exec.Command(command, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: l.flags}
	if l.cgroup != "" {
		fd, err := unix.Open(l.cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("start %s: open %s: %w", l.name, l.cgroup, err)
		}
		defer unix.Close(fd)
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, fd
	}
	p := &process{name: l.name, log: l.log, done: make(chan struct{})}
	started := make(chan error, 1)
	// The thread that forks must outlive the child: its end is when the signal is sent.
	go func() {
		defer close(p.done)
		err := l.space.NS.Do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			p.pid = cmd.Process.Pid
			started <- nil
			p.err = cmd.Wait()
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", l.name, err)
	}
	return p, nil
}

// running reports whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process at once and waits for it. It may be called again, and on nil.
func (p *process) kill() error {
	if p == nil || !p.running() {
		return nil
	}
	if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(killTimeout):
		return fmt.Errorf("kill %s: it goes on", p.name)
	}
}

// tail is the end of the process's log.
func (p *process) tail() string { return tail(p.log) }

// tail returns the last lines of a file.
func tail(file string) string {
	const most = 4 << 10
	content, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return filepath.Base(file) + ":\n" + string(content[max(0, len(content)-most):])
}

// run runs a command in a namespace to its end and returns what it wrote to its output. Its
// errors hold what it said.
func run(s *space.Space, cmd *exec.Cmd) ([]byte, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out []byte
	err := s.NS.Do(func() (err error) {
		out, err = cmd.Output()
		return err
	})
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}
