package file

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// live runs a source that only a notice of a change can wake in time.
type live struct {
	*Source
	t     *testing.T
	dir   string
	store *dataplane.Store
}

func run(t *testing.T, change func(*Config)) *live {
	t.Helper()
	l := &live{t: t, dir: filepath.Join(t.TempDir(), "cluster"), store: new(dataplane.Store)}
	if err := os.Mkdir(l.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := Config{
		Dir: l.dir, StatusDir: filepath.Join(l.dir, "../status"), Resync: time.Hour,
		Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&config)
	}
	var err error
	if l.Source, err = New(config); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx, l.store) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return l
}

// until waits for a snapshot of which ok is true.
func (l *live) until(what string, ok func(*dataplane.Snapshot) bool) {
	l.t.Helper()
	late := time.After(20 * time.Second)
	for {
		snapshot, changed := l.store.Load()
		if snapshot != nil && ok(snapshot) {
			return
		}
		select {
		case <-changed:
		case <-late:
			l.t.Fatalf("no snapshot %s; problems: %v", what, l.Problems())
		}
	}
}

func (l *live) hasNamespaces(names ...string) {
	l.t.Helper()
	l.until(fmt.Sprintf("with namespaces %v", names), func(s *dataplane.Snapshot) bool {
		var got []string
		for _, ns := range s.Namespaces() {
			got = append(got, ns.Name)
		}
		return strings.Join(got, " ") == strings.Join(names, " ")
	})
}

func TestChangesAreSeenAsTheyHappen(t *testing.T) {
	l := run(t, nil)
	at := func(name string) string { return filepath.Join(l.dir, name) }
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(at(from), at(to)); err != nil {
			t.Fatal(err)
		}
	}
	l.hasNamespaces()
	write(t, at("a.yaml"), namespace("a"))
	l.hasNamespaces("a")
	// Rewritten in place.
	write(t, at("a.yaml"), namespace("b"))
	l.hasNamespaces("b")
	// Replaced atomically.
	write(t, at(".a.yaml.tmp"), namespace("c"))
	rename(".a.yaml.tmp", "a.yaml")
	l.hasNamespaces("c")
	// As vim writes: a probe, the old file out of the way, the new one, the old one away.
	write(t, at("4913"), "")
	if err := os.Remove(at("4913")); err != nil {
		t.Fatal(err)
	}
	rename("a.yaml", "a.yaml~")
	write(t, at("a.yaml"), namespace("d"))
	if err := os.Remove(at("a.yaml~")); err != nil {
		t.Fatal(err)
	}
	l.hasNamespaces("d")
	// A new directory, also where its file is there before it can be watched.
	write(t, at("sub/e.yaml"), namespace("e"))
	l.hasNamespaces("d", "e")
	write(t, at("sub/f.yaml"), namespace("f"))
	l.hasNamespaces("d", "e", "f")
	if err := os.RemoveAll(at("sub")); err != nil {
		t.Fatal(err)
	}
	l.hasNamespaces("d")
	if err := os.Remove(at("a.yaml")); err != nil {
		t.Fatal(err)
	}
	l.hasNamespaces()
}

// No namespace is ever missing while its file is replaced, however its editor does that.
func TestReplacingAFileNeverTakesItsObjectsAway(t *testing.T) {
	l := run(t, func(c *Config) { c.Debounce = 100 * time.Millisecond })
	path := filepath.Join(l.dir, "a.yaml")
	write(t, path, namespace("a"))
	l.hasNamespaces("a")
	missing := make(chan struct{})
	stop, watcher := context.WithCancel(t.Context())
	go func() {
		defer close(missing)
		for {
			snapshot, changed := l.store.Load()
			if snapshot.Namespace("a") == nil {
				t.Error("the namespace was missing")
				return
			}
			select {
			case <-changed:
			case <-stop.Done():
				return
			}
		}
	}()
	for i := range 20 {
		text := namespace("a") + fmt.Sprintf("  labels: {i: '%d'}\n", i)
		if i%2 == 0 {
			write(t, path, text) // truncates first
		} else {
			if err := os.Rename(path, path+"~"); err != nil {
				t.Fatal(err)
			}
			write(t, path, text)
		}
	}
	l.until("with the last label", func(s *dataplane.Snapshot) bool { return s.Namespace("a").Labels["i"] == "19" })
	watcher()
	<-missing
}

func TestEmptiedFileGoesAfterAWhile(t *testing.T) {
	l := run(t, func(c *Config) { c.Settle = 50 * time.Millisecond })
	path := filepath.Join(l.dir, "a.yaml")
	write(t, path, namespace("a"))
	l.hasNamespaces("a")
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	l.hasNamespaces()
}

func TestResyncFindsWhatNobodyTold(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "a.yaml")
	write(t, outside, namespace("a"))
	l := run(t, func(c *Config) { c.Resync = 20 * time.Millisecond })
	l.hasNamespaces()
	if err := os.Symlink(outside, filepath.Join(l.dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	l.hasNamespaces("a")
	write(t, outside, namespace("b")) // outside of what is watched
	l.hasNamespaces("b")
	// A directory that is taken away and made anew is watched anew.
	if err := os.RemoveAll(l.dir); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(l.dir, "c.yaml"), namespace("c"))
	l.hasNamespaces("c")
}

// The way from one agent's publication to another agent's snapshot.
func TestPublicationReachesOtherAgents(t *testing.T) {
	l := run(t, nil)
	write(t, filepath.Join(l.dir, "a.yaml"),
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, uid: u}\nspec: {nodeName: n1}\nstatus: {phase: Running, podIP: 10.0.0.1}\n")
	p, err := NewPublisher(filepath.Join(l.dir, "../status"), "n1")
	if err != nil {
		t.Fatal(err)
	}
	for _, published := range []struct{ captured, udp bool }{{true, false}, {true, true}, {true, false}, {false, true}, {true, true}} {
		var uids, udp []string
		if published.captured {
			uids = []string{"u"}
		}
		if published.udp {
			udp = []string{"u"}
		}
		if err := p.PublishCaptured(t.Context(), uids, udp); err != nil {
			t.Fatal(err)
		}
		l.until(fmt.Sprintf("with %+v", published), func(s *dataplane.Snapshot) bool {
			w := s.Workload("u")
			return w != nil && w.Captured == published.captured && w.UDP == (published.captured && published.udp)
		})
	}
}

func TestDirectoryThatIsNeverQuietIsReadAnyway(t *testing.T) {
	l := run(t, nil)
	l.hasNamespaces()
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				if err := os.WriteFile(filepath.Join(l.dir, ".busy"), []byte("x"), 0o644); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	write(t, filepath.Join(l.dir, "a.yaml"), namespace("a"))
	l.hasNamespaces("a")
	close(stop)
	<-stopped
}
