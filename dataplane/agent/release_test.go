package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// The mesh is taken off the cluster: pods go back to plain networking without losing a
// connection, and nothing is left on the node.
func TestReleasedNodeIsAsBefore(t *testing.T) {
	p, host, state := newPods(t)
	web, db := host.NewPod(t), host.NewPod(t)
	pod := enrolledPod("web", web)
	a := serve(t, p, pod)
	r := newPluginRig(t)
	r.run()
	defer r.stop()
	r.publish(shop())
	within(t, "the plugin is in place", func() bool { return r.ready() == nil })
	api := new(fakeCluster)
	snapshot := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(snapshot, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.cfg.SnapshotFile, a.plugin, a.cluster = snapshot, r.plugin, api
	within(t, "web is captured", func() bool { return a.reconciler.Status()["web"].State == dataplane.CaptureInForce })
	server := echoServer(t, db.Namespace, netip.AddrPortFrom(db.V4, 3306))
	early := dialEcho(t, web.Namespace, server)
	echoes(t, early)

	released := shop(pod)
	released.Released = true
	a.store.Publish(dataplane.NewSnapshot(released))
	within(t, "the release begins", a.released.Load)
	a.store.Publish(dataplane.NewSnapshot(shop(pod))) // somebody changed his mind: that takes a restart
	if captured, err := (arrivals{a}).Add(t.Context(), discovery.Sandbox{Pod: pod.Name}); captured || err != nil {
		t.Errorf("a new pod: %v, %v", captured, err)
	}
	echoes(t, early)
	within(t, "the node says that it is released", func() bool { _, marks := api.counts(); return marks == 1 })
	echoes(t, dialEcho(t, web.Namespace, server))
	if status := a.reconciler.Status(); len(status) > 0 || len(p.all()) > 0 {
		t.Errorf("pods are left: %v", status)
	}
	if got := r.read("net.d/10-net.conflist"); got != network {
		t.Errorf("network configuration %s", got)
	}
	for _, path := range []string{state, snapshot, pinsOf(state)} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if counters, err := a.hookCounters(); err != nil || counters != nil {
		t.Errorf("counters %v, %v", counters, err)
	}
}

// A node whose agent is gone is cleaned from the command line.
func TestReleaseNodeLeavesNothing(t *testing.T) {
	netnstest.Require(t)
	host, state := netnstest.NewNode(t), t.TempDir()
	web := host.NewPod(t)
	left := kernel.Config{Dir: pinsOf(state), StateDir: state, HostNetNS: host.Path(), Log: slog.New(slog.DiscardHandler)}
	datapath, err := kernel.Open(left)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := datapath.OpenPod(kernel.PodConfig{UID: "web", NetNS: web.Path(), Addrs: web.Addrs()})
	if err != nil {
		t.Fatal(err)
	}
	if err := pod.CaptureOutbound(); err != nil {
		t.Fatal(err)
	}
	r := newPluginRig(t)
	r.run()
	r.publish(shop())
	within(t, "the plugin is in place", func() bool { return r.ready() == nil })
	cfg := ReleaseConfig{
		Kernel: left,
		CNI:    r.plugin.cfg, SnapshotFile: filepath.Join(r.dir, "ca.crt"), Files: []string{filepath.Join(r.dir, "token"), filepath.Join(r.dir, "none")},
	}
	if removed, err := ReleaseNode(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "another agent that uses it is running") || len(removed) > 0 || r.ready() != nil {
		t.Errorf("beside an agent it removed %q, %v", removed, err)
	}
	r.stop()
	if err := datapath.Close(); err != nil {
		t.Fatal(err)
	}
	removed, err := ReleaseNode(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(removed, "\n")
	for _, what := range []string{
		"capture of pod web", "programs and maps", "state in " + state, "CNI plugin in " + r.path("net.d/10-net.conflist"),
		r.path("bin/raceway-cni"), r.path("state"), r.path("ca.crt"), r.path("token"),
	} {
		if !strings.Contains(all, what) {
			t.Errorf("it does not say that it removed %s:\n%s", what, all)
		}
	}
	if strings.Contains(all, r.path("none")) {
		t.Errorf("it removed what was not there:\n%s", all)
	}
	if got := r.read("net.d/10-net.conflist"); got != network {
		t.Errorf("network configuration %s", got)
	}
	if files, err := filepath.Glob(r.path("*/*")); err != nil || len(files) != 1 {
		t.Errorf("left: %q, %v", files, err)
	}
	if removed, err := ReleaseNode(t.Context(), cfg); err != nil || len(removed) > 0 {
		t.Errorf("again: %q, %v", removed, err)
	}
}
