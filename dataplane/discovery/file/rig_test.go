package file

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/raceway-mesh/raceway/dataplane"
)

// rig is a source whose passes the test makes itself, so that nothing depends on time.
type rig struct {
	*Source
	t       *testing.T
	dir     string
	status  string
	watcher *fsnotify.Watcher
	store   *dataplane.Store
	last    *dataplane.Snapshot
}

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	root := t.TempDir()
	r := &rig{t: t, dir: filepath.Join(root, "cluster"), status: filepath.Join(root, "status"), store: new(dataplane.Store)}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := Config{Dir: r.dir, StatusDir: r.status, Settle: time.Hour, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&config)
	}
	var err error
	if r.Source, err = New(config); err != nil {
		t.Fatal(err)
	}
	r.cluster.linger, r.nodes.linger = 0, 0
	if r.watcher, err = fsnotify.NewWatcher(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.watcher.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// scan makes a pass and reports whether it published.
func (r *rig) scan() (published bool) {
	r.pass(r.watcher, r.store)
	snapshot, _ := r.store.Load()
	published = snapshot != r.last
	r.last = snapshot
	return published
}

// publishes expects a pass to publish.
func (r *rig) publishes() {
	r.t.Helper()
	if !r.scan() {
		r.t.Fatalf("nothing was published; problems: %v", r.Problems())
	}
}

// rests expects a pass to leave the snapshot alone.
func (r *rig) rests() {
	r.t.Helper()
	if r.scan() {
		r.t.Fatal("a snapshot was published")
	}
}

func (r *rig) write(name, text string) { write(r.t, filepath.Join(r.dir, name), text) }

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) remove(name string) {
	r.t.Helper()
	if err := os.RemoveAll(filepath.Join(r.dir, name)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) rename(from, to string) {
	r.t.Helper()
	if err := os.Rename(filepath.Join(r.dir, from), filepath.Join(r.dir, to)); err != nil {
		r.t.Fatal(err)
	}
}

// problem expects exactly one problem: of this file (relative to the cluster directory),
// line and cause.
func (r *rig) problem(file string, line int, cause string) {
	r.t.Helper()
	got := r.Problems()
	where := problem{file: filepath.Join(r.dir, file), line: line}.where()
	if len(got) != 1 || got[0].Where != where || !strings.Contains(got[0].Cause, cause) {
		r.t.Errorf("problems = %v, want %s:%d: %s", got, file, line, cause)
	}
}

func (r *rig) noProblem() {
	r.t.Helper()
	if got := r.Problems(); len(got) > 0 {
		r.t.Errorf("problems = %v", got)
	}
}

// namespaces expects the snapshot's namespaces.
func (r *rig) namespaces(want ...string) {
	r.t.Helper()
	var got []string
	for _, ns := range r.last.Namespaces() {
		got = append(got, ns.Name)
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		r.t.Errorf("namespaces = %q, want %q", got, want)
	}
}

func namespace(name string) string {
	return "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: " + name + "\n"
}

const denyAll = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\nspec: {}\n"
