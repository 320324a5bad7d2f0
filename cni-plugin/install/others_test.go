package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
)

func TestEntryIsNotFoughtOver(t *testing.T) {
	s := newSite(t)
	i := New(s.Config)
	const name = "10-net.conflist"
	inserted := 0
	takeOut := func() {
		s.write(name, bridge)
		s.now = s.now.Add(16 * time.Second) // more than any back-off
		i.pass(s.now)
		if s.read(name) != bridge {
			inserted++
		}
	}
	for range maxInsertions {
		takeOut()
	}
	s.wantFine(i)
	takeOut()
	s.wantProblem(i, name, "5 times within 10m0s", "left out until 2026-05-01T13:")
	if inserted != maxInsertions {
		t.Fatalf("inserted %d times", inserted)
	}
	takeOut()
	if inserted != maxInsertions {
		t.Error("inserted in the truce")
	}
	// Another file is another party's.
	s.write("05-other.conflist", bridge)
	s.pass(i)
	s.wantFine(i)
	must(t, os.Remove(s.path("05-other.conflist")))
	// And when it is over, it is tried again.
	s.now = s.now.Add(truce)
	takeOut()
	s.wantFine(i)
}

func TestEntryIsPutBackWithBackOff(t *testing.T) {
	s := newSite(t)
	i := New(s.Config)
	const name = "10-net.conflist"
	for _, want := range []time.Duration{0, 1 * time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second} {
		s.write(name, bridge)
		wait := i.pass(s.now)
		if wait != want {
			t.Fatalf("it is put back after %v, want %v", wait, want)
		}
		if want > 0 {
			s.wantProblem(i, "put back in a moment")
			s.now = s.now.Add(want)
			i.pass(s.now)
		}
		s.wantFine(i)
	}
}

func TestRareRewritesNeverStopIt(t *testing.T) {
	s := newSite(t)
	i := New(s.Config)
	for range 4 * maxInsertions {
		s.write("10-net.conflist", bridge)
		s.now = s.now.Add(window/maxInsertions + time.Second)
		i.pass(s.now)
		s.wantFine(i)
	}
}

func TestSingleConfigurationThatIsWrittenAgain(t *testing.T) {
	s := newSite(t)
	i := New(s.Config)
	single := func(n int) string { return fmt.Sprintf(`{"name":"n","type":"a","n":%d}`, n) }
	for n := range 3 {
		s.write("10-net.conf", single(n))
		s.pass(i)
		s.wantFine(i)
	}
	if got := s.files(); got != "10-net.conf.conflist 10-net.conf.raceway-saved" {
		t.Errorf("there are %s", got)
	}
	must(t, Remove(s.Config))
	if s.files() != "10-net.conf" || s.read("10-net.conf") != single(2) {
		t.Errorf("there are %s: %s", s.files(), s.read("10-net.conf"))
	}
}

func TestRemoveKeepsWhatOthersChanged(t *testing.T) {
	const single = `{"name":"n","type":"a"}`
	t.Run("list", func(t *testing.T) {
		s := newSite(t)
		s.write("10-net.conflist", bridge)
		s.pass(New(s.Config))
		s.write("10-net.conflist", strings.Replace(s.read("10-net.conflist"), `"x": 1`, `"x": 2`, 1))
		must(t, Remove(s.Config))
		if got, want := s.read("10-net.conflist"), strings.Replace(bridge, `"x": 1`, `"x": 2`, 1); got != want {
			t.Errorf("it is %s, want %s", got, want)
		}
	})
	t.Run("list of a single one", func(t *testing.T) {
		s := newSite(t)
		s.write("10-net.conf", single)
		s.pass(New(s.Config))
		s.write("10-net.conf.conflist", strings.Replace(s.read("10-net.conf.conflist"), `"a"`, `"b"`, 1))
		must(t, Remove(s.Config))
		if got := s.files(); got != "10-net.conf.conflist" || !strings.Contains(s.read(got), `"b"`) || strings.Contains(s.read(got), conf.PluginType) {
			t.Errorf("there are %s", got)
		}
	})
	t.Run("list is gone and there is another", func(t *testing.T) {
		s := newSite(t)
		s.write("10-net.conf", single)
		s.pass(New(s.Config))
		must(t, os.Remove(s.path("10-net.conf.conflist")))
		s.write("20-net.conflist", bridge)
		must(t, Remove(s.Config))
		if got := s.files(); got != "20-net.conflist" {
			t.Errorf("there are %s", got)
		}
	})
	t.Run("list is gone and there is no other", func(t *testing.T) {
		s := newSite(t)
		s.write("10-net.conf", single)
		s.pass(New(s.Config))
		must(t, os.Remove(s.path("10-net.conf.conflist")))
		must(t, Remove(s.Config))
		if s.files() != "10-net.conf" || s.read("10-net.conf") != single {
			t.Errorf("there are %s", s.files())
		}
	})
	t.Run("written again beside it", func(t *testing.T) {
		s := newSite(t)
		s.write("10-net.conf", single)
		s.pass(New(s.Config))
		s.write("10-net.conf", `{"name":"n","type":"newer"}`)
		must(t, Remove(s.Config))
		if s.files() != "10-net.conf" || !strings.Contains(s.read("10-net.conf"), "newer") {
			t.Errorf("there are %s", s.files())
		}
	})
}

func TestCiliumThatKeepsTheDirectoryIsNamed(t *testing.T) {
	const cilium = `{"cniVersion":"0.3.1","name":"cilium","plugins":[{"type":"cilium-cni","log-file":"/var/run/cilium/cilium-cni.log"}]}`
	s := newSite(t)
	i := New(s.Config)
	s.write("10-flannel.conflist", bridge)
	s.pass(i)
	s.wantFine(i)
	// Cilium comes and puts aside what there is, our entry in it.
	must(t, os.Rename(s.path("10-flannel.conflist"), s.path("10-flannel.conflist.cilium_bak")))
	for range maxInsertions + 1 {
		s.write("05-cilium.conflist", cilium)
		s.now = s.now.Add(16 * time.Second)
		i.pass(s.now)
	}
	s.wantProblem(i, "05-cilium.conflist", "cni.exclusive=false", "5 times")
	must(t, Remove(s.Config))
	if got := s.read("10-flannel.conflist.cilium_bak"); got != bridge {
		t.Errorf("what Cilium put aside is %s, want %s", got, bridge)
	}
	if got := s.read("05-cilium.conflist"); got != cilium {
		t.Errorf("Cilium's is %s", got)
	}
}

func TestConcurrentWritersLoseNothing(t *testing.T) {
	s := newSite(t)
	version := func(n int) string { return strings.Replace(bridge, `"x": 1`, fmt.Sprintf(`"x": %d`, n), 1) }
	const last = 300
	s.write("10-net.conflist", version(0))
	var writers sync.WaitGroup
	for n := 1; n <= 2; n++ { // the agents of an upgrade
		i := New(s.Config)
		i.settled = true
		writers.Go(func() {
			for range 300 {
				_, err := insert(s.ConfDir, "10-net.conflist", s.Entry, true)
				if err != nil && !errors.Is(err, errChanged) {
					t.Errorf("insert: %v", err)
				}
			}
		})
	}
	writers.Go(func() { // a network plugin that writes newer and newer ones, by rename
		for n := 1; n <= last; n++ {
			temp := s.path("theirs.tmp")
			if err := errors.Join(os.WriteFile(temp, []byte(version(n)), 0o644), os.Rename(temp, s.path("10-net.conflist"))); err != nil {
				t.Error(err)
			}
		}
	})
	writers.Wait()
	i := New(s.Config)
	s.pass(i)
	s.wantFine(i)
	if got := s.read("10-net.conflist"); got != s.with(version(last)) {
		t.Errorf("the last version is lost: %s", got)
	}
	if got := s.files(); got != "10-net.conflist" {
		t.Errorf("there are %s", got)
	}
}

func TestWhatIsWrittenBetweenComparisonAndExchangeIsKept(t *testing.T) {
	dir := t.TempDir()
	ours, path := filepath.Join(dir, "ours"), filepath.Join(dir, "net.conflist")
	for _, test := range []struct {
		now  string
		want error
		left string
	}{{"as read", nil, "edited"}, {"written since", errChanged, "written since"}} {
		must(t, errors.Join(os.WriteFile(ours, []byte("edited"), 0o600), os.WriteFile(path, []byte(test.now), 0o600)))
		if err := exchange(ours, path, []byte("as read")); !errors.Is(err, test.want) {
			t.Errorf("exchange = %v, want %v", err, test.want)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != test.left {
			t.Errorf("there is %q, %v, want %q", text, err, test.left)
		}
	}
}

func TestTwoVersionsDoNotFight(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	older := New(s.Config)
	s.pass(older)
	newer := s.Config
	newer.Entry.Socket = "/run/raceway/v2.sock"
	i := New(newer)
	i.pass(s.now)
	want := s.read("10-net.conflist")
	if !strings.Contains(want, "v2.sock") {
		t.Fatalf("the newer one's is %s", want)
	}
	s.pass(older)
	if got := s.read("10-net.conflist"); got != want {
		t.Errorf("the older one made %s", got)
	}
}
