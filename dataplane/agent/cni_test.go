package agent

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
)

// nobody answers every question about a pod.
type nobody struct{}

func (nobody) Add(context.Context, discovery.Sandbox) (bool, error) { return false, nil }
func (nobody) Check(context.Context, discovery.Sandbox) error       { return nil }
func (nobody) Del(context.Context, discovery.Sandbox) error         { return nil }

const network = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}`

// pluginRig is a plugin on a host of its own.
type pluginRig struct {
	*testing.T
	*plugin
	store dataplane.Store
	dir   string
	stop  func()
}

func newPluginRig(t *testing.T) *pluginRig {
	t.Helper()
	r := &pluginRig{T: t, dir: t.TempDir()}
	cfg := Config{
		Node: "n1", Log: slog.New(slog.DiscardHandler), Pod: dataplane.Name{Namespace: "raceway-system", Name: "agent"},
		CNI: CNIConfig{
			ConfDir: r.path("net.d"), BinDir: r.path("bin"), StateDir: r.path("state"), Binary: r.path("raceway-cni"), Socket: r.path("cni.sock"),
			HostConfDir: "/etc/cni/net.d", APIServer: "https://10.0.0.1:443", APICAFile: r.path("ca.crt"), TokenFile: r.path("token"), Exempt: []string{"kube-system"},
		},
	}
	for _, dir := range []string{"net.d", "bin"} {
		if err := os.Mkdir(r.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.write("net.d/10-net.conflist", network)
	r.write("raceway-cni", "program")
	r.write("ca.crt", "roots")
	r.write("token", "a.b.c\n")
	r.plugin = newPlugin(cfg, &r.store, nobody{})
	return r
}

func (r *pluginRig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *pluginRig) write(name, text string) {
	r.Helper()
	if err := os.WriteFile(r.path(name), []byte(text), 0o600); err != nil {
		r.Fatal(err)
	}
}

func (r *pluginRig) read(name string) string {
	text, err := os.ReadFile(r.path(name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.Error(err)
	}
	return string(text)
}

func (r *pluginRig) run() {
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- r.plugin.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			r.Error(err)
		}
	}
}

func (r *pluginRig) publish(c dataplane.Contents) { r.store.Publish(dataplane.NewSnapshot(c)) }

func (r *pluginRig) answers() bool {
	_, err := node.NewClient(r.path("cni.sock")).Add(r.Context(), discovery.Sandbox{Pod: dataplane.Name{Namespace: "shop", Name: "web"}})
	return err == nil
}

func TestPluginIsInstalledOnceItHasAnswers(t *testing.T) {
	r := newPluginRig(t)
	r.run()
	time.Sleep(50 * time.Millisecond)
	if r.answers() || r.read("net.d/10-net.conflist") != network || r.ready() == nil {
		t.Error("the plugin is there, and nothing is known of the cluster")
	}
	r.publish(shop())
	within(t, "the plugin is in place", func() bool { return r.ready() == nil })
	if !r.answers() || !strings.Contains(r.read("net.d/10-net.conflist"), `"raceway-cni"`) || r.read("bin/raceway-cni") != "program" {
		t.Error("it is not what it is said to be")
	}
	state, err := install.ReadState(r.path("state"))
	want := install.API{Server: "https://10.0.0.1:443", CA: "roots", Token: "a.b.c"}
	if err != nil || state.API != want || state.ConfDir != "/etc/cni/net.d" || !slices.Equal(state.Exempt, []string{"kube-system"}) {
		t.Errorf("state %+v, %v", state, err)
	}
	enrolled := shop()
	enrolled.Namespaces[0].Labels = map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}
	r.publish(enrolled)
	within(t, "the state follows", func() bool {
		state, err := install.ReadState(r.path("state"))
		wanted, known := state.Cluster.Wants("shop", "")
		return err == nil && wanted && known
	})

	r.stop()
	if r.answers() || !strings.Contains(r.read("net.d/10-net.conflist"), `"raceway-cni"`) {
		t.Error("an agent that stops leaves the plugin, and answers no more")
	}
}

func TestPluginThatIsRemovedStaysAway(t *testing.T) {
	r := newPluginRig(t)
	r.run()
	defer r.stop()
	r.publish(shop())
	within(t, "the plugin is in place", func() bool { return r.ready() == nil })
	if err := r.remove(); err != nil {
		t.Fatal(err)
	}
	if got := r.read("net.d/10-net.conflist"); got != network {
		t.Errorf("configuration %s", got)
	}
	r.write("net.d/00-new.conflist", network) // somebody writes it anew
	r.publish(shop())
	time.Sleep(100 * time.Millisecond)
	for _, name := range []string{"bin/raceway-cni", "state/state.json"} {
		if got := r.read(name); got != "" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := r.read("net.d/00-new.conflist"); got != network {
		t.Errorf("new configuration %s", got)
	}
	if !r.answers() {
		t.Error("a plugin that is just running is left without an answer")
	}
}

func TestReleasedClusterGetsNoPlugin(t *testing.T) {
	r := newPluginRig(t)
	r.run()
	defer r.stop()
	c := shop()
	c.Released = true
	r.publish(c)
	within(t, "questions are answered", r.answers)
	if err := r.remove(); err != nil {
		t.Error(err)
	}
	if got := r.read("net.d/10-net.conflist"); got != network {
		t.Errorf("configuration %s", got)
	}
}

func TestPluginWithoutItsTokenIsNotReady(t *testing.T) {
	r := newPluginRig(t)
	if err := os.Remove(r.path("token")); err != nil {
		t.Fatal(err)
	}
	r.run()
	defer r.stop()
	r.publish(shop())
	within(t, "it says so", func() bool {
		err := r.ready()
		return err != nil && strings.Contains(err.Error(), "token of the CNI plugin")
	})
	if !r.answers() {
		t.Error("questions have no answer")
	}
}

func TestExpiryOfATokenIsRead(t *testing.T) {
	claims := func(text string) string { return "h." + base64.RawURLEncoding.EncodeToString([]byte(text)) + ".s" }
	for token, want := range map[string]time.Time{
		claims(`{"exp":1700000000}`): time.Unix(1700000000, 0).UTC(), claims(`{"iss":"x"}`): {}, claims(`[`): {}, "a.b.c": {}, "opaque": {}, "": {},
	} {
		if got := expiry(token); got != want {
			t.Errorf("%q expires at %v, want %v", token, got, want)
		}
	}
}

func TestAddressesOfANewPodAreThoseThatTheKubeletReports(t *testing.T) {
	addrs := func(texts ...string) (list []netip.Addr) {
		for _, text := range texts {
			list = append(list, netip.MustParseAddr(text))
		}
		return list
	}
	for _, tt := range []struct{ given, want []netip.Addr }{
		{addrs("10.0.0.1", "fd00::1"), addrs("10.0.0.1", "fd00::1")},
		{addrs("fd00::1", "10.0.0.1", "10.0.0.2", "fd00::2"), addrs("fd00::1", "10.0.0.1")},
		{addrs("::ffff:10.0.0.1"), addrs("10.0.0.1")},
		{nil, nil},
	} {
		if got := reported(tt.given); !slices.Equal(got, tt.want) {
			t.Errorf("of %v: %v, want %v", tt.given, got, tt.want)
		}
	}
}

// fakeSandboxes is a cluster that knows one pod, whose network comes later.
type fakeSandboxes struct {
	store   *dataplane.Store
	pod     dataplane.Workload
	err     error
	stopped []string
}

func (f *fakeSandboxes) Started(_ context.Context, s discovery.Sandbox) (dataplane.Workload, error) {
	if f.err != nil {
		return dataplane.Workload{}, f.err
	}
	w := f.pod
	w.NetNS, w.Addrs, w.Starting = s.NetNS, s.Addrs, true
	next := dataplane.NewSnapshot(shop(w))
	f.store.Publish(next)
	return *next.Workload(w.UID), nil
}

func (f *fakeSandboxes) Stopped(pod dataplane.Name, uid string) {
	f.stopped = append(f.stopped, fmt.Sprint(pod, " ", uid))
}

func TestAddWithoutCapture(t *testing.T) {
	a := &Agent{}
	f := &fakeSandboxes{store: &a.store, pod: dataplane.Workload{
		UID: "web", Name: dataplane.Name{Namespace: "shop", Name: "web"}, Node: "n1", Phase: dataplane.PodPending,
	}}
	a.sandboxes = f
	s := discovery.Sandbox{Pod: f.pod.Name, UID: "web", NetNS: "/var/run/netns/cni-1", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	if _, err := (arrivals{a}).Add(t.Context(), s); !errors.Is(err, node.ErrNotReady) {
		t.Errorf("before the first snapshot: %v", err)
	}
	if err := (arrivals{a}).Check(t.Context(), s); !errors.Is(err, node.ErrNotReady) {
		t.Errorf("check before the first snapshot: %v", err)
	}
	a.store.Publish(dataplane.NewSnapshot(shop()))
	if captured, err := (arrivals{a}).Add(t.Context(), s); captured || err != nil {
		t.Errorf("a pod that is not to be enrolled: %v, %v", captured, err)
	}
	if snapshot, _ := a.store.Load(); snapshot.Workload("web").NetNS != "/run/netns/cni-1" {
		t.Errorf("its namespace is %s", snapshot.Workload("web").NetNS)
	}
	if err := (arrivals{a}).Check(t.Context(), s); err != nil {
		t.Errorf("check of it: %v", err)
	}
	f.err = errors.New("the API server knows no such pod")
	if captured, err := (arrivals{a}).Add(t.Context(), s); captured || !errors.Is(err, f.err) {
		t.Errorf("a pod that nobody knows: %v, %v", captured, err)
	}
	a.released.Store(true)
	if captured, err := (arrivals{a}).Add(t.Context(), s); captured || err != nil {
		t.Errorf("while the mesh is taken off: %v, %v", captured, err)
	}
	if err := (arrivals{a}).Del(t.Context(), s); err != nil || !slices.Equal(f.stopped, []string{"shop/web web"}) {
		t.Errorf("stopped %v, %v", f.stopped, err)
	}
}
