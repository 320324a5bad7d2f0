// Package demo is the story that `raceway demo` tells: the real agents and a real CA on a
// cluster of network namespaces (package lab), with real traffic all the while.
//
//	   node1                                      node2
//	┌──────────────┐      link, captured      ┌──────────────┐
//	│ web    batch │ ──────────────────────── │ db  (mariadb)│
//	└──────────────┘                          └──────────────┘
//
// Every application is a process of its own in its pod's namespace (Client, Server), and
// never knows what the mesh does. Each step shows something, proves it, and fails otherwise.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Config says how to tell it.
type Config struct {
	// Program is this program: the applications are its hidden commands, and raceway-agent
	// and raceway-ca are beside it. Required.
	Program string
	// IPv6 gives pods and services IPv6 addresses, and no others.
	IPv6 bool
	// Keep leaves everything running.
	Keep bool
	// MariaDB demands the real MariaDB; by default it is used where it is installed.
	MariaDB bool

	Out   io.Writer
	Color bool
	Width int // of the terminal; 0 if Out is none
}

// namePrefix tells demos from other labs.
const namePrefix = "demo-"

// MissingError is what this machine lacks.
type MissingError struct{ Lines []string }

func (e *MissingError) Error() string {
	return "the demo needs " + strings.Join(e.Lines, "\nthe demo needs ")
}

// StepError says which step failed, and why.
type StepError struct {
	Number int
	Title  string
	Err    error
}

// Error is one line. Of the end of a log, which the lab's errors have, it is the last one.
func (e *StepError) Error() string {
	reason, log, found := strings.Cut(e.Err.Error(), "; its log ends with:")
	if found {
		log = strings.TrimSpace(log)
		reason += "; its last words: " + strings.TrimSpace(log[strings.LastIndexByte(log, '\n')+1:])
	}
	return fmt.Sprintf("step %d (%s) failed: %s", e.Number, e.Title, strings.ReplaceAll(reason, "\n", "; "))
}

func (e *StepError) Unwrap() error { return e.Err }

// ErrInterrupted is the end of a demo by its context.
var ErrInterrupted = errors.New("interrupted")

// step is a part of the story.
type step struct {
	title string
	run   func(context.Context) error
}

func (s *story) steps() []step {
	steps := []step{
		{"Two nodes, an agent on each, and nothing in the mesh", s.plain},
		{"The namespace gets its label", s.label},
		{"Who talks to whom", s.identities},
		{udpTitle, s.udp},
		{"The server speaks first", s.serverFirst},
		{"A policy: a dry run first, then in force", s.policy},
		{"Why?", s.why},
		{"The label goes", s.unlabel},
	}
	if !s.withUDP {
		steps = slices.DeleteFunc(steps, func(st step) bool { return st.title == udpTitle })
	}
	return steps
}

// Run tells the story to its end. Whatever happens, and unless Keep says otherwise, nothing
// of it remains when it returns.
func Run(ctx context.Context, cfg Config) error {
	if lines := missing(filepath.Dir(cfg.Program)); len(lines) > 0 {
		return &MissingError{lines}
	}
	maria, err := findMariaDB(cfg.MariaDB)
	if err != nil {
		return err
	}
	s := &story{cfg: cfg, page: newPage(cfg.Out, cfg.Color, cfg.Width), mariaDB: maria, withUDP: kernel.CanCaptureUDP(), began: time.Now()}
	if err := s.removeDead(); err != nil {
		return err
	}
	if err = s.tell(ctx); err == nil && cfg.Keep {
		err = s.keep(ctx)
		if err == nil {
			return nil
		}
	}
	if err = s.finish(ctx, err); err == nil {
		err = s.page.err
	}
	return err
}

// finish ends what was begun, also when ctx has ended, and says how it all ended.
func (s *story) finish(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		err = ErrInterrupted
		s.page.heading("Interrupted: removing everything, which takes a few seconds")
	case err != nil && s.lab != nil:
		s.reportFailure(err)
	}
	if s.lab == nil {
		return err // nothing was begun, or it was taken back
	}
	if remains := s.clear(context.WithoutCancel(ctx)); remains != nil {
		return errors.Join(err, remains)
	}
	switch {
	case err == nil:
		s.page.gap()
		s.page.say("That was it, in %s.", seconds(time.Since(s.began)))
	case errors.Is(err, ErrInterrupted):
		err = fmt.Errorf("%w; everything was removed again", err)
	}
	return err
}

func (s *story) tell(ctx context.Context) error {
	ctx, s.fail = context.WithCancelCause(ctx)
	defer s.watchers.Wait()
	defer s.fail(nil)
	steps := s.steps()
	family := "IPv4"
	if s.cfg.IPv6 {
		family = "IPv6"
	}
	s.page.line(s.page.paint(styleBold, "Raceway on "+family+": "+fmt.Sprintf("%d steps, about a minute", len(steps))))
	for i, st := range steps {
		s.page.heading(fmt.Sprintf("%d/%d  %s", i+1, len(steps), st.title))
		err := st.run(ctx)
		if err == nil {
			err = s.stillWell(ctx)
		}
		if err == nil {
			err = s.page.err
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return &StepError{i + 1, st.title, err}
		}
	}
	return nil
}

// reportFailure shows the end of the logs beside the reason.
func (s *story) reportFailure(err error) {
	s.page.gap()
	s.page.bad("%v", err)
	logs, globErr := filepath.Glob(filepath.Join(s.lab.Dir(), "log", "*.log"))
	if globErr != nil {
		return // the pattern is ours and good
	}
	for _, path := range logs {
		if tail := logTail(path); tail != "" {
			s.page.note("the log %s ends with", filepath.Base(path))
			s.page.lines(tail)
		}
	}
}

// logTail is the last lines of a log, each cut where it gets long.
func logTail(path string) string {
	const lines, length = 6, 300
	content, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimSpace(string(content)), "\n")
	all = all[max(0, len(all)-lines):]
	for i, l := range all {
		if len(l) > length {
			all[i] = strings.ToValidUTF8(l[:length], "") + " …"
		}
	}
	return strings.Join(all, "\n")
}

// keep leaves everything running, with the label on, and says what to do with it.
func (s *story) keep(ctx context.Context) error {
	if err := s.lab.LabelNamespace(namespace, dataplane.ModeAmbient); err != nil {
		return err
	}
	if err := s.awaitCapture(ctx, dataplane.ProtocolHBONE, dataplane.CaptureInForce, s.lab.Pods()...); err != nil {
		return err
	}
	if err := os.WriteFile(keptFile(s.lab.Name()), nil, 0o644); err != nil {
		return fmt.Errorf("mark the lab as kept: %w", err)
	}
	p := s.page
	p.heading("It goes on running")
	p.say("The namespace has its label again, the policy is in force, and web and batch make their requests. In a shell of root:")
	p.gap()
	for _, l := range s.invitation() {
		line := l.command
		if l.what != "" {
			line = fmt.Sprintf("%-54s # %s", l.command, l.what)
		}
		p.line(strings.TrimRight("      "+line, " "))
	}
	p.say("And when you have seen enough:")
	p.line("")
	p.line("      raceway demo --remove")
	return p.err
}

// invitation is what to type, and what that does. It is not folded: lines are to be copied.
func (s *story) invitation() []struct{ command, what string } {
	var sockets []string
	for _, path := range s.sockets() {
		sockets = append(sockets, "$PWD/"+filepath.Base(path))
	}
	return []struct{ command, what string }{
		{"cd " + s.lab.Dir(), ""},
		{"export PATH=" + filepath.Dir(s.cfg.Program) + ":$PATH", ""},
		{"export RACEWAY_AGENT=" + strings.Join(sockets, ","), ""},
		{"", ""},
		{"raceway workloads -o wide", ""},
		{"raceway flows -f", "what opens, closes, is denied"},
		{"raceway why batch db:3306", ""},
		{"raceway check", "prove that capture is in force"},
		{"ip netns exec " + filepath.Base(s.lab.Fabric().NetNS()) + " tcpdump -nAi node1 tcp", "read along on the link"},
		{"rm cluster/" + policyFile, "the policy goes"},
		{"sed -i /dataplane-mode/d cluster/namespace-" + namespace + ".yaml", "the label goes"},
		{"tail -f log/*", ""},
		{"", ""},
	}
}

// keptFile tells a lab that was kept from one whose demo was killed.
func keptFile(name string) string { return filepath.Join(lab.DirOf(name), "kept") }

// deadDemos lists the demos whose process has gone; kept ones too if they are asked for.
func deadDemos(withKept bool) ([]string, error) {
	known, err := lab.Known()
	if err != nil {
		return nil, err
	}
	var dead []string
	for name, running := range known {
		if running || !strings.HasPrefix(name, namePrefix) {
			continue
		}
		if _, err := os.Stat(keptFile(name)); err == nil && !withKept {
			continue
		}
		dead = append(dead, name)
	}
	return dead, nil
}

// removeDead removes what demos left that were killed.
func (s *story) removeDead() error {
	dead, err := deadDemos(false)
	if err != nil {
		return err
	}
	for _, name := range dead {
		if _, err := lab.Remove(name); err != nil {
			if _, gone := os.Stat(lab.DirOf(name)); errors.Is(gone, os.ErrNotExist) {
				continue // somebody else was faster
			}
			return err
		}
		s.page.note("removed what an earlier demo, %s, left behind when it was killed", name)
	}
	return nil
}

// Remove removes every demo that was kept, or whose process was killed.
func Remove(out io.Writer) error {
	if os.Geteuid() != 0 {
		return &MissingError{missing("")}
	}
	dead, err := deadDemos(true)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range dead {
		found, err := lab.Remove(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		_, err = fmt.Fprintf(out, "removed %s: %d processes, namespaces, mounts and files\n", name, len(found))
		errs = append(errs, err)
	}
	if len(dead) == 0 {
		_, err := fmt.Fprintln(out, "there is no demo to remove")
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
