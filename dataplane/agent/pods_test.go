package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// newPods is the Target on a node of its own; state is where the kernel side keeps records.
func newPods(t *testing.T) (p *pods, node *netnstest.Node, state string) {
	t.Helper()
	netnstest.Require(t)
	node, state = netnstest.NewNode(t), t.TempDir()
	datapath, err := kernel.Open(kernel.Config{
		Dir: pinsOf(state), StateDir: state,
		HostNetNS: node.Path(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := datapath.Unload(); err != nil {
			t.Error(err)
		}
	})
	keeper := certstest.New(t, "cluster.local").Keeper(t)
	return &pods{datapath: datapath, keeper: keeper, log: slog.New(slog.DiscardHandler), served: map[string]*servedPod{}}, node, state
}

// pinsOf is a directory for pins that belongs to a temporary one.
func pinsOf(state string) string {
	return "/sys/fs/bpf/raceway-test" + strings.ToLower(strings.ReplaceAll(state, "/", "-"))
}

func TestPodThatCouldNotBePreparedIsRemoved(t *testing.T) {
	p, _, _ := newPods(t)
	w := &dataplane.Workload{UID: "web", NetNS: filepath.Join(t.TempDir(), "missing"), Addrs: []netip.Addr{netip.MustParseAddr("10.1.1.2")}}
	if err := p.Prepare(t.Context(), w); err == nil {
		t.Fatal("a pod without a network namespace was prepared")
	}
	if err := p.Remove(t.Context(), "web"); err != nil {
		t.Error(err)
	}
}

func TestRemoveThatFailedHalfWayIsTriedAgain(t *testing.T) {
	p, node, state := newPods(t)
	web := node.NewPod(t)
	pod, err := p.datapath.OpenPod(kernel.PodConfig{UID: "web", NetNS: web.Path(), Addrs: web.Addrs()})
	if err != nil {
		t.Fatal(err)
	}
	p.served["web"] = &servedPod{Pod: pod, stop: func() {}, cut: func() {}}
	records, err := filepath.Glob(filepath.Join(state, "pods", "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records %v, %v", records, err)
	}
	// A directory that is not empty cannot be removed as a file is.
	if err := os.Remove(records[0]); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(records[0], "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(t.Context(), "web"); err == nil {
		t.Error("nothing was in the way")
	}
	if err := os.RemoveAll(records[0]); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(t.Context(), "web"); err != nil {
		t.Errorf("again: %v", err)
	}
}
