package demo_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

// TestDemo runs the real program. `make ci` runs it to its end as well; here it is what
// happens when somebody, or something, comes between.
func TestDemo(t *testing.T) {
	netnstest.Require(t)
	bin := labtest.Build(t, "raceway", "raceway-agent", "raceway-ca")
	t.Run("InterruptedAnywhereNothingRemains", func(t *testing.T) {
		for i, test := range []struct {
			signal syscall.Signal
			args   []string
		}{{syscall.SIGINT, nil}, {syscall.SIGTERM, []string{"--ipv6"}}, {syscall.SIGHUP, []string{"--keep"}}} {
			t.Run(fmt.Sprint(i), func(t *testing.T) { interrupt(t, bin, test.signal, test.args) })
		}
	})
	t.Run("AStepThatFailsIsNamedWithItsReason", func(t *testing.T) { failStep(t, bin) })
	t.Run("AnAgentThatDoesNotStartIsShownWithItsLog", func(t *testing.T) { failStart(t, bin) })
	t.Run("AKilledDemoIsRemovedByTheNext", func(t *testing.T) { killed(t, bin) })
	t.Run("KeptItGoesOnUntilItIsRemoved", func(t *testing.T) { kept(t, bin) })
	t.Run("WithoutRootItSaysSo", func(t *testing.T) { unprivileged(t, bin) })
	t.Run("AnUnknownFlagMakesNothing", func(t *testing.T) { wrongLine(t, bin) })
}

// running is a demo on its way.
type running struct {
	t      *testing.T
	cmd    *exec.Cmd
	stderr bytes.Buffer
	lines  chan string // of its output; closed at its end
	output strings.Builder
}

func start(t *testing.T, bin string, args ...string) *running {
	t.Helper()
	r := &running{t: t, cmd: exec.Command(filepath.Join(bin, "raceway"), append([]string{"demo"}, args...)...), lines: make(chan string, 10000)}
	out, feed := io.Pipe()
	r.cmd.Stdout, r.cmd.Stderr = feed, &r.stderr
	// As `make` does not, but a terminal does: the signals of a test go to it alone.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(r.lines)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			r.lines <- lines.Text()
		}
	}()
	t.Cleanup(func() {
		if r.cmd.ProcessState == nil { // the test gave up
			_ = r.cmd.Process.Signal(syscall.SIGTERM)
			_ = r.cmd.Wait()
		}
		_ = feed.Close()
		<-read
		if t.Failed() {
			t.Logf("it said\n%s\n%s", r.output.String(), r.stderr.String())
		}
	})
	return r
}

// until reads the output until a line has text, and fails the test if none does.
func (r *running) until(text string) {
	r.t.Helper()
	timeout := time.After(3 * time.Minute)
	for {
		select {
		case line, ok := <-r.lines:
			r.output.WriteString(line + "\n")
			if strings.Contains(line, text) {
				return
			}
			if !ok {
				r.t.Fatalf("it ended without saying %q", text)
			}
		case <-timeout:
			r.t.Fatalf("it does not say %q", text)
		}
	}
}

// end waits for the end and returns the exit code and everything that it said.
func (r *running) end() (code int, stdout, stderr string) {
	r.t.Helper()
	timer := time.AfterFunc(3*time.Minute, func() { _ = r.cmd.Process.Signal(syscall.SIGQUIT) })
	defer timer.Stop()
	err := r.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	for len(r.lines) > 0 {
		r.output.WriteString(<-r.lines + "\n")
	}
	return r.cmd.ProcessState.ExitCode(), r.output.String(), r.stderr.String()
}

func (r *running) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// labOf finds the lab of a demo that runs, by the process that owns it.
func labOf(t *testing.T, pid int) string {
	t.Helper()
	owners, err := filepath.Glob(lab.DirOf("demo-*") + "/owner.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range owners {
		content, err := os.ReadFile(path)
		if err == nil && bytes.Contains(content, []byte(`"pid":`+strconv.Itoa(pid)+`,`)) {
			return filepath.Base(filepath.Dir(path))
		}
	}
	t.Fatalf("process %d has no lab", pid)
	return ""
}

// nothingOf fails the test if anything that bears the lab's name is left.
func nothingOf(t *testing.T, name string) {
	t.Helper()
	for _, pattern := range []string{lab.DirOf(name), "/run/netns/" + name + "-*", "/sys/fs/bpf/raceway/" + name + "*"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) > 0 {
			t.Errorf("left behind: %v, %v", found, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(name)) {
		t.Error("left behind: a mount")
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		if command, err := os.ReadFile(path); err == nil && bytes.Contains(command, []byte(name)) {
			t.Errorf("left behind: process %s", bytes.ReplaceAll(command, []byte{0}, []byte{' '}))
		}
	}
}

// lastStep is the number of the demo's steps: the one of UDP is left out where there is none.
func lastStep() int {
	if kernel.CanCaptureUDP() {
		return 8
	}
	return 7
}

// heading is how that of a step begins, which a test may wait for.
func heading(step int) string { return fmt.Sprintf("─ %d/%d  ", step, lastStep()) }

func interrupt(t *testing.T, bin string, signal syscall.Signal, args []string) {
	step, delay := 1+rand.IntN(lastStep()), time.Duration(rand.IntN(2000))*time.Millisecond
	t.Logf("%v in step %d after %v", signal, step, delay)
	r := start(t, bin, args...)
	r.until(heading(step))
	time.Sleep(delay)
	name := labOf(t, r.cmd.Process.Pid)
	r.signal(signal)
	time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
	_ = r.cmd.Process.Signal(signal) // once more, of an impatient user; it may have ended
	code, stdout, stderr := r.end()
	if code != 1 || !strings.Contains(stdout, "nothing remains") || stderr != "raceway: interrupted; everything was removed again\n" {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	nothingOf(t, name)
}

// failStep kills an agent in the middle.
func failStep(t *testing.T, bin string) {
	r := start(t, bin)
	r.until(heading(3))
	name := labOf(t, r.cmd.Process.Pid)
	if err := syscall.Kill(agentOf(t, name, "node2"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := r.end()
	if code != 1 || !regexp.MustCompile(`^raceway: step [345] \(.*\) failed: .+\n$`).MatchString(stderr) {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	if !strings.Contains(stdout, "the log raceway-agent-node2.log ends with") {
		t.Error("the log of the agent is not shown")
	}
	nothingOf(t, name)
}

// agentOf finds the process of a node's agent.
func agentOf(t *testing.T, name, node string) int {
	t.Helper()
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range commands {
		command, err := os.ReadFile(path)
		if err == nil && bytes.Contains(command, []byte("\x00--node\x00"+node+"\x00")) && bytes.Contains(command, []byte(lab.DirOf(name)+"/")) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("%s has no agent on %s", name, node)
	return 0
}

func failStart(t *testing.T, bin string) {
	broken := t.TempDir()
	for _, program := range []string{"raceway", "raceway-ca"} {
		if err := os.Link(filepath.Join(bin, program), filepath.Join(broken, program)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(broken, "raceway-agent"), []byte("#!/bin/sh\necho out of paper >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := start(t, broken).end()
	if code != 1 || !strings.HasPrefix(stderr, "raceway: step 1 (") || !strings.HasSuffix(stderr, "its last words: out of paper\n") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	if !strings.Contains(stdout, "nothing remains") {
		t.Error("it does not say what became of the rest")
	}
}

func killed(t *testing.T, bin string) {
	for _, keep := range []bool{false, true} { // then agents and applications outlive it
		args := []string{}
		if keep {
			args = []string{"--keep"}
		}
		r := start(t, bin, args...)
		r.until(heading(2))
		name := labOf(t, r.cmd.Process.Pid)
		r.signal(syscall.SIGKILL)
		r.end()
		next := start(t, bin)
		next.until(name)
		next.until(heading(1))
		next.signal(syscall.SIGTERM)
		next.end()
		nothingOf(t, name)
	}
}

func kept(t *testing.T, bin string) {
	r := start(t, bin, "--keep")
	r.until("And when you have seen enough")
	code, stdout, stderr := r.end()
	if code != 0 || stderr != "" {
		t.Fatalf("exit code %d, %q", code, stderr)
	}
	name := regexp.MustCompile(`cd ` + lab.DirOf("demo-") + `(\w+)`).FindStringSubmatch(stdout)
	if name == nil {
		t.Fatal("it does not say where it is")
	}
	kept := "demo-" + name[1]
	// The next demo leaves it alone, and the command line can ask it.
	next := start(t, bin)
	next.until(heading(1))
	next.signal(syscall.SIGTERM)
	next.end()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	why := exec.CommandContext(ctx, filepath.Join(bin, "raceway"), "why", "batch", "db:3306")
	why.Env = append(os.Environ(), "RACEWAY_AGENT="+lab.DirOf(kept)+"/node1.sock")
	if output, err := why.CombinedOutput(); err != nil || !bytes.Contains(output, []byte("denied")) {
		t.Errorf("%v: %s", err, output)
	}
	code, stdout, stderr = start(t, bin, "--remove").end()
	if code != 0 || !strings.Contains(stdout, "removed "+kept) {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
	nothingOf(t, kept)
}

func unprivileged(t *testing.T, bin string) {
	for _, dir := range []string{bin, filepath.Dir(bin)} { // of the test, and so root's alone
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(filepath.Join(bin, "raceway"), "demo")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	output, _ := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || string(output) != "raceway: the demo needs root, for network namespaces and BPF: run it with sudo\n" {
		t.Errorf("exit code %d, %q", cmd.ProcessState.ExitCode(), output)
	}
}

func wrongLine(t *testing.T, bin string) {
	for _, args := range [][]string{{"--ipv4"}, {"now"}, {"--remove", "--keep"}} {
		code, stdout, stderr := start(t, bin, args...).end()
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: exit code %d, %q, %q", args, code, stdout, stderr)
		}
	}
}
