package kernel_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// editRecord changes the text of the one record.
func (f *fixture) editRecord(t *testing.T, edit func(string) string) {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(f.cfg.StateDir, "pods", "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records: %v, %v", records, err)
	}
	data, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(records[0], []byte(edit(string(data))), 0o600); err != nil {
		t.Fatal(err)
	}
}

// An agent that is gone for good left its capture in force, in one state or another.
func TestRemoveOfAnAgentThatIsGone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*testing.T, *fixture)
		says  string
	}{
		{"as it was left", func(*testing.T, *fixture) {}, "capture of pod web, in /run/netns/"},
		{"with maps of another layout", pretendOlderLayout, "layout-0"},
		{"the records are lost", func(t *testing.T, f *fixture) {
			if err := os.RemoveAll(f.cfg.StateDir); err != nil {
				t.Fatal(err)
			}
		}, "capture of pod unknown"},
		{"a record is broken", func(t *testing.T, f *fixture) {
			f.editRecord(t, func(string) string { return "{" })
		}, "capture of pod unknown"},
		{"the process that showed the namespace has ended", func(t *testing.T, f *fixture) {
			f.editRecord(t, func(text string) string { return strings.Replace(text, f.web.Path(), "/proc/0/ns/net", 1) })
		}, "capture of pod web, in /run/netns/"},
		{"the pins are lost", func(t *testing.T, f *fixture) {
			if err := os.RemoveAll(filepath.Join(pinDir(f), "pods")); err != nil {
				t.Fatal(err)
			}
		}, "capture of pod web"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inAllModes(t, func(t *testing.T, m mode) {
				f := newFixture(t, m)
				before := leftovers(t, f)
				f.enrol(t)
				if err := f.dp.Close(); err != nil {
					t.Fatal(err)
				}
				tt.spoil(t, f)
				removed, err := kernel.Remove(f.cfg)
				if err != nil || !strings.Contains(strings.Join(removed, "\n"), tt.says) {
					t.Errorf("removed %q, %v, want %q", removed, err, tt.says)
				}
				if after := leftovers(t, f); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
				for _, dir := range []string{pinDir(f), f.cfg.StateDir} {
					if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("%s is left: %v", dir, err)
					}
				}
				if removed, err := kernel.Remove(f.cfg); err != nil || len(removed) > 0 {
					t.Errorf("again: removed %q, %v", removed, err)
				}
				f.open(t) // for the fixture to close
			})
		})
	}
}

func TestRemoveForgetsPodsWhoseNamespaceIsGone(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	f.enrol(t)
	if err := f.dp.Close(); err != nil {
		t.Fatal(err)
	}
	ghost := `{"uid":"ghost","netns":"/run/netns/none","cookie":18446744073709551615,"addrs":["10.1.1.1"],"outbound":true,"hostIfindex":99999}`
	if err := os.WriteFile(filepath.Join(f.cfg.StateDir, "pods", "18446744073709551615.json"), []byte(ghost), 0o600); err != nil {
		t.Fatal(err)
	}
	removed, err := kernel.Remove(f.cfg)
	if err != nil || !slices.Contains(removed, "capture of pod ghost, its network namespace is gone") {
		t.Errorf("removed %q, %v", removed, err)
	}
	f.open(t)
}

func TestRemoveRefusesWhileAnAgentRuns(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	during := leftovers(t, f)
	otherState := f.cfg
	otherState.StateDir = filepath.Join(t.TempDir(), "none")
	for _, cfg := range []kernel.Config{f.cfg, otherState} {
		if removed, err := kernel.Remove(cfg); err == nil || !strings.Contains(err.Error(), "another agent that uses it is running") || len(removed) > 0 {
			t.Errorf("removed %q, %v", removed, err)
		}
	}
	if after := leftovers(t, f); after != during {
		t.Errorf("before:\n%s\nafter:\n%s", during, after)
	}
}
