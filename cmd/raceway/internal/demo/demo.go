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
	"strings"
	"time"

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
	return "this machine lacks " + strings.Join(e.Lines, "\nthis machine lacks ")
}

// StepError says which step failed, and why.
type StepError struct {
	Number int
	Title  string
	Err    error
}

func (e *StepError) Error() string {
	return fmt.Sprintf("step %d (%s): %v", e.Number, e.Title, e.Err)
}

func (e *StepError) Unwrap() error { return e.Err }

// ErrInterrupted is the end of a demo by its context.
var ErrInterrupted = errors.New("interrupted; everything was removed again")

// step is a part of the story.
type step struct {
	title string
	run   func(context.Context) error
}

func (s *story) steps() []step {
	return []step{
		{"Two nodes, an agent on each, and nothing in the mesh", s.plain},
		{"The namespace gets its label", s.label},
		{"Who talks to whom", s.identities},
		{"The server speaks first", s.serverFirst},
		{"A policy: a dry run first, then in force", s.policy},
		{"Why?", s.why},
		{"The label goes", s.unlabel},
	}
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
	s := &story{cfg: cfg, page: newPage(cfg.Out, cfg.Color, cfg.Width), mariaDB: maria, began: time.Now()}
	if err := s.removeDead(); err != nil {
		return err
	}
	err = s.tell(ctx)
	if err == nil && cfg.Keep {
		return s.keep()
	}
	if s.lab == nil {
		return err
	}
	interrupted := ctx.Err() != nil
	if interrupted {
		err = ErrInterrupted
		s.page.heading("Interrupted: removing everything, which takes a few seconds")
	} else if err != nil {
		s.reportFailure(err)
	}
	// What was begun is ended, also when the context has ended.
	if remains := s.clear(context.WithoutCancel(ctx)); remains != nil {
		return errors.Join(err, remains)
	}
	if err == nil {
		s.page.line("")
		s.page.say("That was it, in %s.", s.page.paint(styleBold, seconds(time.Since(s.began))))
	}
	return errors.Join(err, s.page.err)
}

func (s *story) tell(ctx context.Context) error {
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
		if err != nil {
			return &StepError{i + 1, st.title, err}
		}
	}
	return nil
}

// reportFailure shows the end of the logs beside the reason.
func (s *story) reportFailure(err error) {
	s.page.line("")
	s.page.bad("%v", err)
	for _, path := range s.logs() {
		tail := logTail(path)
		if tail == "" {
			continue
		}
		s.page.line("")
		s.page.note("the log %s ends with", filepath.Base(path))
		s.page.block(tail)
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
			all[i] = l[:length] + " …"
		}
	}
	return strings.Join(all, "\n")
}

// logs are those of whatever runs or ran.
func (s *story) logs() []string {
	found, err := filepath.Glob(filepath.Join(s.lab.Dir(), "log", "*.log"))
	if err != nil {
		return nil // the pattern is ours and good
	}
	return found
}

// keep leaves everything running and says what to do with it.
func (s *story) keep() error {
	if err := s.markKept(); err != nil {
		return err
	}
	p := s.page
	p.heading("It goes on running")
	p.say("Two nodes, their agents, the CA and the applications are left as they are now: without the label, the policy there. Try, as root:")
	p.line("")
	for _, l := range []string{
		"export PATH=" + filepath.Dir(s.cfg.Program) + ":$PATH",
		"export RACEWAY_AGENT=" + strings.Join(s.sockets(), ","),
		"cd " + s.lab.Dir(),
		"",
		"raceway workloads",
		"sed -i 's,^  labels:,&\\n    raceway.dev/dataplane-mode: ambient,' cluster/namespace-shop.yaml",
		"raceway flows -f",
		"raceway why batch db:3306",
		"raceway check",
		"cat cluster/" + policyFile,
		"ip netns exec " + filepath.Base(s.lab.Fabric().NetNS()) + " tcpdump -nAi node1 tcp",
		"tail -f log/*",
	} {
		p.line(strings.TrimRight("      "+l, " "))
	}
	p.line("")
	p.say("And when you have seen enough:")
	p.line("")
	p.line("      " + s.cfg.Program + " demo --remove")
	p.line("")
	return p.err
}

// The lab is told from one whose demo was killed by this file.
func keptFile(dir string) string { return filepath.Join(dir, "kept") }

func (s *story) markKept() error {
	if err := os.WriteFile(keptFile(s.lab.Dir()), nil, 0o644); err != nil {
		return fmt.Errorf("mark the lab as kept: %w", err)
	}
	return nil
}

// labDir is where a lab of that name would be: its siblings share the parent.
func labDir(name string) string { return filepath.Join("/run/raceway-lab", name) }

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
		if _, err := os.Stat(keptFile(labDir(name))); err == nil && !withKept {
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
