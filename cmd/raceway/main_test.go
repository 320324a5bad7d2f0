package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
)

var update = flag.Bool("update", false, "rewrite the golden files and the examples in docs/cli.md")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// now is when all the tests happen.
var now = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// terminal is a command line's surroundings.
type terminal struct {
	*cli
	stdout, stderr bytes.Buffer
}

func newTerminal(dir string) *terminal {
	term := &terminal{}
	term.cli = &cli{
		out: &term.stdout, errOut: &term.stderr,
		now: func() time.Time { return now }, zone: time.UTC, socketDir: dir,
		kubeConfigured: func() bool { return false },
	}
	return term
}

// raceway runs one command line with the agents of dir.
func raceway(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	term := newTerminal(dir)
	code = term.run(t.Context(), args)
	return code, term.stdout.String(), term.stderr.String()
}

// oneNode is the directory of a machine with the agent of n1.
func oneNode(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	admintest.Serve(t, dir, "n1", nodeOne())
	return dir
}

// twoNodes is the directory of a machine with two agents.
func twoNodes(t *testing.T) string {
	t.Helper()
	dir := oneNode(t)
	admintest.Serve(t, dir, "n2", nodeTwo())
	return dir
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%s\nwant (%s)\n%s", got, path, want)
	}
}
