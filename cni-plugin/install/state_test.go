package install

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

const istio = "istio.io/dataplane-mode"

func snapshot(released bool) *dataplane.Snapshot {
	pod := func(uid, node string, labels map[string]string) dataplane.Workload {
		return dataplane.Workload{UID: uid, Name: dataplane.Name{Namespace: "shop", Name: uid}, Node: node, Labels: labels}
	}
	return dataplane.NewSnapshot(dataplane.Contents{
		Released: released, EnrollLabels: []string{istio},
		Namespaces: []dataplane.Namespace{
			{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: "ambient", "team": "a"}},
			{Name: "old", Labels: map[string]string{istio: "ambient"}},
			{Name: "blog"},
		},
		Workloads: []dataplane.Workload{
			pod("plain", "n1", map[string]string{"app": "x"}),
			pod("out", "n1", map[string]string{"app": "x", dataplane.ModeLabel: "none"}),
			pod("far", "n2", map[string]string{dataplane.ModeLabel: "none"}),
			pod("in", "n1", map[string]string{istio: "ambient"}),
		},
	})
}

func TestClusterDecidesAsTheSnapshotDoes(t *testing.T) {
	c := ClusterOf(snapshot(false), "n1")
	for _, test := range []struct {
		namespace, uid string
		wanted, known  bool
	}{
		{"shop", "", true, true},
		{"shop", "plain", true, true},
		{"shop", "newer", true, true},
		{"shop", "out", false, true},
		{"old", "", true, true},
		{"blog", "", false, true},
		{"blog", "in", true, true},
		{"new", "", false, false},
		{"new", "in", false, false},
	} {
		if wanted, known := c.Wants(test.namespace, test.uid); wanted != test.wanted || known != test.known {
			t.Errorf("Wants(%s, %s) = %v, %v", test.namespace, test.uid, wanted, known)
		}
	}
	want := Cluster{
		EnrollLabels: []string{istio},
		Namespaces:   map[string]map[string]string{"shop": {dataplane.ModeLabel: "ambient"}, "old": {istio: "ambient"}, "blog": {}},
		Pods:         map[string]map[string]string{"out": {dataplane.ModeLabel: "none"}, "in": {istio: "ambient"}},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("the cluster is %+v, want %+v", c, want)
	}
	released := ClusterOf(snapshot(true), "n1")
	if wanted, known := released.Wants("shop", ""); wanted || !known {
		t.Errorf("released, Wants = %v, %v", wanted, known)
	}
}

func TestStateIsWrittenWhenItChanges(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raceway", "cni")
	state := State{
		API: API{Server: "https://10.0.0.1:443", CA: "pem", Token: "secret", Expires: time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)}, ConfDir: "/etc/cni/net.d",
		Exempt: []string{"kube-system"}, Cluster: ClusterOf(snapshot(false), "n1"),
	}
	path := filepath.Join(dir, stateName)
	written := func() os.FileInfo {
		t.Helper()
		must(t, WriteState(dir, state))
		info, err := os.Stat(path)
		must(t, err)
		got, err := ReadState(dir)
		must(t, err)
		if !reflect.DeepEqual(got, state) || info.Mode() != 0o600 {
			t.Errorf("the state is %+v of mode %v", got, info.Mode())
		}
		return info
	}
	first := written()
	if again := written(); !os.SameFile(first, again) {
		t.Error("written although nothing has changed")
	}
	state.API.Token = "newer"
	if again := written(); os.SameFile(first, again) {
		t.Error("written in place, where a reader may find half of it")
	}
	must(t, os.Chmod(path, 0o644))
	written()
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory is %v, %v", info.Mode(), err)
	}
}

func TestCheckOfTheState(t *testing.T) {
	s := newSite(t)
	s.write("10-net.conflist", bridge)
	s.pass(New(s.Config))
	path := filepath.Join(s.StateDir, stateName)
	must(t, os.Chmod(path, 0o604))
	expect := func(says string) {
		t.Helper()
		if p := Check(s.Config); len(p) != 1 || !strings.Contains(p[0].String(), says) {
			t.Errorf("Check = %v, want %q", p, says)
		}
	}
	expect("others may read it")
	must(t, os.WriteFile(path, []byte("{"), 0o600))
	expect("unexpected end of JSON")
	must(t, os.Remove(path))
	expect("no such file")
	must(t, WriteState(s.StateDir, State{}))
	binary := filepath.Join(s.BinDir, "raceway-cni")
	must(t, os.Chmod(binary, 0o644))
	expect("not a program")
	must(t, os.WriteFile(binary, []byte("x"), 0o755))
	must(t, os.Chmod(binary, 0o755))
	expect("not the plugin of this agent")
	must(t, os.Remove(binary))
	expect("no such file")
	s.pass(New(s.Config))
	s.write("10-net.conflist", bridge)
	expect("is not in it: pods that start now")
	s.write("05-net.conf", `{"type":"a"}`)
	expect("05-net.conf")
	must(t, os.Remove(s.path("05-net.conf")))
	s.write("10-net.conflist", strings.Replace(s.with(bridge), "cni.sock", "other.sock", 1))
	expect("should be")
	s.write("10-net.conflist", "{")
	expect("cannot use it")
	must(t, os.Remove(s.path("10-net.conflist")))
	expect("no network plugin has written")
}

// FuzzReadState: whatever is there is an error or a state that decides, and stays as it is.
func FuzzReadState(f *testing.F) {
	good, err := json.Marshal(State{API: API{Server: "s"}, Cluster: ClusterOf(snapshot(false), "n1")})
	must(f, err)
	for _, seed := range []string{string(good), "", "{", "null", "[]", `{"cluster":{"namespaces":{"shop":null}}}`, `{"cluster":{"namespaces":[]}}`, `{"api":{"expires":"x"}}`} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(dir, stateName)
		must(t, os.WriteFile(path, text, 0o600))
		s, err := ReadState(dir)
		if left, readErr := os.ReadFile(path); readErr != nil || !bytes.Equal(left, text) {
			t.Fatalf("the file is %q, %v", left, readErr)
		}
		if err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("the error names no file: %v", err)
			}
			return
		}
		if wanted, known := s.Cluster.Wants("shop", "in"); wanted && !known {
			t.Error("wanted, and not known")
		}
		must(t, WriteState(dir, s))
		again, err := ReadState(dir)
		must(t, err)
		if a, b := marshal(t, s), marshal(t, again); a != b {
			t.Errorf("%s has become %s", a, b)
		}
	})
}

func marshal(t *testing.T, s State) string {
	t.Helper()
	text, err := json.Marshal(s)
	must(t, err)
	return string(text)
}
