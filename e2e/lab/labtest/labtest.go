// Package labtest makes labs for tests: gated by root, closed with the test, and with proof
// that nothing of them remains.
package labtest

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// New makes a lab without processes. Without root it skips the test, or fails it where
// RACEWAY_REQUIRE_ROOT=1. The lab's own log goes to the test's unless opts has another; a
// failed test shows the end of its processes' logs.
//
// An interrupt ends the lab before it ends the tests.
func New(t testing.TB, opts lab.Options) *lab.Lab {
	t.Helper()
	netnstest.Require(t)
	if opts.Log == nil {
		opts.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	l, err := lab.New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	stop := closeOnInterrupt(l)
	t.Cleanup(func() {
		defer stop()
		if t.Failed() {
			showLogs(t, l)
		}
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
		for _, left := range l.Leftovers() {
			t.Errorf("the lab left behind: %s", left)
		}
	})
	return l
}

// closeOnInterrupt closes the lab when the tests are interrupted, and then lets the signal
// do what it would have done. The caller calls stop.
func closeOnInterrupt(l *lab.Lab) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ctx.Done():
			signal.Stop(signals)
		case s := <-signals:
			if err := l.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close the lab after a signal:", err)
			}
			signal.Stop(signals)
			signal.Reset(s)
			if number, ok := s.(syscall.Signal); ok {
				if err := syscall.Kill(os.Getpid(), number); err != nil {
					fmt.Fprintln(os.Stderr, "signal ourselves:", err)
				}
			}
		}
	}()
	return func() { cancel(); <-done }
}

// Build builds commands of this module into a directory of the test, with the race detector
// when the test has it, and returns the directory for lab.Options.BinDir.
func Build(t testing.TB, commands ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := lab.Build(t.Context(), lab.BuildOptions{Dir: dir, Race: raceEnabled}, commands...); err != nil {
		t.Fatal(err)
	}
	return dir
}

// showLogs shows the last lines of what the lab's processes wrote.
func showLogs(t testing.TB, l *lab.Lab) {
	const last = 60
	logs, err := filepath.Glob(filepath.Join(l.Dir(), "log", "*"))
	if err != nil {
		t.Errorf("find the lab's logs: %v", err)
	}
	for _, path := range logs {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Errorf("read the lab's logs: %v", err)
			continue
		}
		lines := strings.Split(string(bytes.TrimSpace(content)), "\n")
		t.Logf("%s:\n%s", filepath.Base(path), strings.Join(lines[max(0, len(lines)-last):], "\n"))
	}
}
