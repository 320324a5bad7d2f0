package install

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bridge is what a network plugin wrote.
const bridge = "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"net\",\n  \"x\": 1,\n  \"plugins\": [\n    {\"type\": \"bridge\"}\n  ]\n}\n"

// site is a node, as an Installer finds it.
type site struct {
	t testing.TB
	Config
	now time.Time
}

func newSite(t testing.TB) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{t: t, now: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC), Config: Config{
		ConfDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), StateDir: filepath.Join(dir, "lib", "raceway", "cni"),
		Binary: filepath.Join(dir, "raceway-cni"), Log: slog.New(slog.DiscardHandler),
	}}
	s.Entry = conf.Entry{StateDir: s.StateDir, Socket: "/run/raceway/cni.sock", Namespace: "raceway-system"}
	must(t, os.Mkdir(s.ConfDir, 0o755))
	must(t, os.WriteFile(s.Binary, []byte("#!/bin/true v1"), 0o755))
	must(t, WriteState(s.StateDir, State{ConfDir: s.ConfDir}))
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.ConfDir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	must(s.t, os.WriteFile(s.path(name), []byte(text), 0o644))
}

func (s *site) read(name string) string {
	s.t.Helper()
	text, err := os.ReadFile(s.path(name))
	must(s.t, err)
	return string(text)
}

func (s *site) files() string {
	s.t.Helper()
	entries, err := os.ReadDir(s.ConfDir)
	must(s.t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// with is text with the plugin at its end.
func (s *site) with(text string) string {
	s.t.Helper()
	out, err := conf.Insert([]byte(text), s.Entry)
	must(s.t, err)
	return string(out)
}

// pass has the installer look, a moment later.
func (s *site) pass(i *Installer) time.Duration {
	s.now = s.now.Add(time.Minute)
	return i.pass(s.now)
}

func (s *site) wantFine(i *Installer) {
	s.t.Helper()
	if p := i.Problems(); len(p) > 0 || !i.InPlace() {
		s.t.Errorf("Problems = %v, InPlace %v", p, i.InPlace())
	}
	if p := Check(s.Config); len(p) > 0 {
		s.t.Errorf("Check = %v", p)
	}
}

func (s *site) wantProblem(i *Installer, words ...string) {
	s.t.Helper()
	p := i.Problems()
	if len(p) != 1 || i.InPlace() {
		s.t.Fatalf("Problems = %v, InPlace %v", p, i.InPlace())
	}
	for _, w := range words {
		if !strings.Contains(p[0].String(), w) {
			s.t.Errorf("the problem is %q, want %q in it", p[0], w)
		}
	}
}

func TestInstallAndRemove(t *testing.T) {
	const list = `{"name":"n","plugins":[{"type":"a"}]}`
	const single = "{\"cniVersion\":\"0.3.1\",\n\t\"name\":\"n\", \"type\":\"a\"}\n"
	for name, test := range map[string]struct {
		files  map[string]string
		active string // name of what holds the entry
	}{
		"one":                      {map[string]string{"10-net.conflist": bridge}, "10-net.conflist"},
		"two, the first counts":    {map[string]string{"10-net.conflist": bridge, "05-other.conflist": list}, "05-other.conflist"},
		"capitals sort first":      {map[string]string{"a.conflist": bridge, "B.conflist": list}, "B.conflist"},
		"single":                   {map[string]string{"10-net.conf": single}, "10-net.conf.conflist"},
		"single in .json":          {map[string]string{"10-net.json": single, "20-net.conflist": bridge}, "10-net.json.conflist"},
		"single before its list":   {map[string]string{"10-net.conf": single, "10-net.conflist": bridge}, "10-net.conf.conflist"},
		"others' files are theirs": {map[string]string{"10-net.conflist": bridge, "00-net.conflist.bak": "x", "raceway-cni.txt": "raceway-cni {"}, "10-net.conflist"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			for file, text := range test.files {
				s.write(file, text)
			}
			before := s.files()
			i := New(s.Config)
			s.pass(i)
			s.wantFine(i)
			if got, err := active(s.ConfDir); err != nil || got != test.active {
				t.Fatalf("the active one is %s, %v, want %s among %s", got, err, test.active, s.files())
			}
			if l, err := libcni.NetworkConfFromFile(s.path(test.active)); err != nil || l.Plugins[len(l.Plugins)-1].Network.Type != conf.PluginType {
				t.Errorf("libcni reads %v, %v", l, err)
			}
			for range 2 {
				must(t, Remove(s.Config))
			}
			for file, text := range test.files {
				if got := s.read(file); got != text {
					t.Errorf("%s is %q, was %q", file, got, text)
				}
			}
			if got := s.files(); got != before {
				t.Errorf("left: %s, were %s", got, before)
			}
			for _, path := range []string{s.StateDir, filepath.Join(s.BinDir, conf.PluginType)} {
				if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}
		})
	}
}

func TestAgentThatGoesLeavesThePlugin(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	run(t, s)()
	if got := s.read("10-net.conflist"); got != s.with(bridge) {
		t.Errorf("the configuration is %s", got)
	}
	if p := Check(s.Config); len(p) > 0 {
		t.Errorf("Check = %v", p)
	}
}

// run keeps the plugin installed, and waits until it is, until stop.
func run(t *testing.T, s *site) (stop func()) {
	t.Helper()
	i := New(s.Config)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); must(t, <-done) }) }
	t.Cleanup(stop)
	eventually(t, i.InPlace)
	return stop
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come")
		}
	}
}

func TestRunPutsTheEntryBackAndFollowsTheActiveFile(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	run(t, s)
	s.write("10-net.conflist", bridge) // as the network plugin does when it restarts
	eventually(t, func() bool { return s.read("10-net.conflist") == s.with(bridge) })
	s.write("05-new.conflist", bridge)
	eventually(t, func() bool { return s.read("05-new.conflist") == s.with(bridge) })
	must(t, os.Remove(filepath.Join(s.BinDir, conf.PluginType)))
	s.write("99-event", "")
	eventually(t, func() bool { return len(Check(s.Config)) == 0 })
}

func TestRunWaitsForTheNetworkPluginAndTheState(t *testing.T) {
	s := newSite(t)
	must(t, os.RemoveAll(s.ConfDir))
	must(t, os.RemoveAll(s.StateDir))
	i := New(s.Config)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	eventually(t, func() bool { return strings.Contains(i.Problems()[0].Cause, "has not written what it knows") })
	s.write("10-net.conflist", bridge)
	must(t, WriteState(s.StateDir, State{}))
	eventually(t, i.InPlace)
	cancel()
	must(t, <-done)
}

func TestConfigurationThatCannotBeEdited(t *testing.T) {
	for text, says := range map[string]string{
		"":                            "not the JSON",
		`{"plugins":[`:                "not the JSON",
		`{"name":"n"}`:                `no field "plugins"`,
		`{"name":"n","plugins":[]}`:   "no plugin for Raceway's to follow",
		`{"name":"n","plugins":null}`: "not a list",
	} {
		s := newSite(t)
		i := New(s.Config)
		s.write("10-net.conflist", text)
		if wait := s.pass(i); wait != retry {
			t.Errorf("it looks again after %v", wait)
		}
		s.wantProblem(i, "10-net.conflist", says)
		if got := s.read("10-net.conflist"); got != text || s.files() != "10-net.conflist" {
			t.Errorf("%q has become %q in %s", text, got, s.files())
		}
		must(t, Remove(s.Config))
		if got := s.read("10-net.conflist"); got != text {
			t.Errorf("Remove made %q of %q", got, text)
		}
	}
}

func TestRemoveTellsOfAnEntryThatItCannotTakeOut(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	s.write("20-net.conflist", `{"plugins":[{"type":"raceway-cni"}`)
	s.pass(New(s.Config))
	if err := Remove(s.Config); err == nil || !strings.Contains(err.Error(), "20-net.conflist") {
		t.Errorf("Remove = %v", err)
	}
	if got := s.read("10-net.conflist"); got != bridge {
		t.Errorf("the other is %s", got)
	}
	if _, err := os.Stat(filepath.Join(s.BinDir, conf.PluginType)); err != nil {
		t.Errorf("the binary, for an entry that stays: %v", err)
	}
}

func TestSymbolicLinkStays(t *testing.T) {
	s := newSite(t)
	must(t, os.Mkdir(s.path("real"), 0o755))
	s.write("real/net.conflist", bridge)
	must(t, os.Symlink("real/net.conflist", s.path("10-net.conflist")))
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	if to, err := os.Readlink(s.path("10-net.conflist")); err != nil || to != "real/net.conflist" || s.read("real/net.conflist") != s.with(bridge) {
		t.Errorf("the link is %s, %v", to, err)
	}
	must(t, Remove(s.Config))
	if s.read("real/net.conflist") != bridge {
		t.Errorf("the file is %s", s.read("real/net.conflist"))
	}
	must(t, os.Remove(s.path("real/net.conflist")))
	must(t, WriteState(s.StateDir, State{}))
	s.pass(i)
	s.wantProblem(i, "link to a file that is not visible")
	must(t, Remove(s.Config))
}

func TestModeAndOwnerStay(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	must(t, os.Chmod(s.path("10-net.conflist"), 0o640))
	uid := os.Geteuid()
	if uid == 0 {
		uid = 1234
		must(t, os.Chown(s.path("10-net.conflist"), uid, 4321))
	}
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	info, err := os.Stat(s.path("10-net.conflist"))
	must(t, err)
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode() != 0o640 || int(st.Uid) != uid {
		t.Errorf("the file is %v of %+v", info.Mode(), st)
	}
}

func TestLeftoversOfAPowerCutGo(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	s.write(".10-net.conflist"+tempMark+"123", "half of")
	must(t, os.Mkdir(s.BinDir, 0o755))
	must(t, os.WriteFile(filepath.Join(s.BinDir, ".raceway-cni"+tempMark+"9"), []byte("half of"), 0o755))
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	if got := s.files(); got != "10-net.conflist" {
		t.Errorf("there are %s", got)
	}
	if entries, err := os.ReadDir(s.BinDir); err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v", entries, err)
	}
}

func TestInterruptedWrapIsFinished(t *testing.T) {
	s := newSite(t)
	const single = `{"name":"n","type":"a"}`
	s.write("10-net.conf", single)
	s.write("10-net.conf.conflist", `{"half":`) // never so: it is put there as a whole; but who knows
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	must(t, Remove(s.Config))
	if s.files() != "10-net.conf" || s.read("10-net.conf") != single {
		t.Errorf("there are %s", s.files())
	}
}

func TestBinaryIsReplacedWhileItRuns(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	sleep, err := os.ReadFile("/bin/sleep")
	must(t, err)
	must(t, os.WriteFile(s.Binary, sleep, 0o755))
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	p, err := os.StartProcess(filepath.Join(s.BinDir, conf.PluginType), []string{"sleep", "60"}, &os.ProcAttr{})
	must(t, err)
	defer func() { _, _ = p.Wait() }()
	defer func() { _ = p.Kill() }()
	must(t, os.WriteFile(s.Binary, []byte("v2"), 0o755))
	second := New(s.Config)
	s.pass(second)
	s.wantFine(second)
	// The agent of the version before does not put its own back, nor its entry.
	must(t, os.WriteFile(s.Binary, sleep, 0o755))
	s.pass(i)
	if text, err := os.ReadFile(filepath.Join(s.BinDir, conf.PluginType)); err != nil || string(text) != "v2" {
		t.Errorf("the binary is %.10q, %v", text, err)
	}
}

func TestReadOnlyDirectorySaysWhatToDo(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	for _, err := range []error{syscall.EROFS, syscall.EACCES} {
		said := explain(&fs.PathError{Op: "open", Path: s.ConfDir, Err: err}).Error()
		if !strings.Contains(said, s.ConfDir) || !strings.Contains(said, "must") {
			t.Errorf("%v is explained as %q", err, said)
		}
	}
	if os.Geteuid() != 0 {
		return
	}
	must(t, syscall.Mount(s.ConfDir, s.ConfDir, "", syscall.MS_BIND, ""))
	t.Cleanup(func() { must(t, syscall.Unmount(s.ConfDir, syscall.MNT_DETACH)) })
	must(t, syscall.Mount("", s.ConfDir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	i := New(s.Config)
	s.pass(i)
	s.wantProblem(i, s.ConfDir, "read-only file system", "hostPath volume that is not readOnly")
	if p := Check(s.Config); !slices.ContainsFunc(p, func(p discovery.Problem) bool { return strings.Contains(p.String(), "is not in it") }) {
		t.Errorf("Check = %v", p)
	}
}

// FuzzInstall: no configuration is lost, whatever is in it, and Remove brings it back.
func FuzzInstall(f *testing.F) {
	for _, seed := range []string{bridge, "", "{", `{"name":"n","plugins":[]}`, `{"plugins":[{"type":"raceway-cni"},{"type":"a"}]}`, `{"name":"n","type":"a"}`} {
		f.Add("10-net.conflist", []byte(seed))
		f.Add("10-net.conf", []byte(seed))
	}
	f.Fuzz(func(t *testing.T, name string, text []byte) {
		if name != "10-net.conf" {
			name = "10-net.conflist"
		}
		s := newSite(t)
		s.write(name, string(text))
		before := text
		if bare, _, err := conf.Remove(text); err == nil {
			before = bare
		}
		s.pass(New(s.Config))
		if _, err := active(s.ConfDir); err != nil {
			t.Fatalf("the configuration is lost: %v", err)
		}
		err := Remove(s.Config)
		if got := s.read(name); got != string(before) && (err == nil || got != string(text)) {
			t.Fatalf("%q has become %q (%v)", text, got, err)
		}
		if got := s.files(); got != name {
			t.Fatalf("there are %s", got)
		}
	})
}
