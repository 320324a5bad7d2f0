package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestNodeReleaseWantsToBeMeant(t *testing.T) {
	code, _, stderr := raceway(t, t.TempDir(), "node", "release")
	if code != exitUsage || !strings.Contains(stderr, "--force") {
		t.Errorf("code %d: %s", code, stderr)
	}
}

func TestNodeReleaseLeavesNothing(t *testing.T) {
	netnstest.Require(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"net.d", "bin", "cni"} {
		if err := os.Mkdir(path(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const others = `{"cniVersion":"1.0.0","name":"lab","plugins":[{"type":"bridge"}]}`
	with := strings.Replace(others, `{"type":"bridge"}`, `{"type":"bridge"},{"type":"raceway-cni","stateDir":"/var/lib/raceway/cni","socket":"/run/raceway/cni.sock"}`, 1)
	for name, content := range map[string]string{
		"net.d/10-lab.conflist": with, "bin/raceway-cni": "", "bin/bridge": "", "cni/state.json": "{}", "snapshot": "", "agent.sock": "",
	} {
		if err := os.WriteFile(path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	release := []string{
		"node", "release", "--force", "--bpf-dir", "/sys/fs/bpf/raceway-test-" + filepath.Base(dir), "--state-dir", path("state"),
		"--agent-socket", path("agent.sock"), "--cni-socket", path("cni.sock"), "--snapshot-file", path("snapshot"),
		"--cni-conf-dir", path("net.d"), "--cni-bin-dir", path("bin"), "--cni-state-dir", path("cni"),
	}
	code, stdout, stderr := raceway(t, t.TempDir(), release...)
	if code != exitOK || !strings.Contains(stdout, path("bin/raceway-cni")) {
		t.Fatalf("code %d: %s%s", code, stdout, stderr)
	}
	for _, name := range []string{"bin/raceway-cni", "cni", "snapshot", "agent.sock"} {
		if _, err := os.Stat(path(name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	if left, err := os.ReadFile(path("net.d/10-lab.conflist")); err != nil || string(left) != others {
		t.Errorf("the configuration is %s, %v, want %s", left, err, others)
	}
	if code, stdout, stderr := raceway(t, t.TempDir(), release...); code != exitOK || !strings.Contains(stdout, "nothing to remove") {
		t.Errorf("once more: code %d: %s%s", code, stdout, stderr)
	}
}
