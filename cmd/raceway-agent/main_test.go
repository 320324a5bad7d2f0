package main

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Getenv("RACEWAY_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestStartErrorsNameTheirCause(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	good := []string{
		"--node=n", "--cluster-dir=" + dir, "--ca-address=127.0.0.1:1", "--ca-root=" + file, "--ca-token-file=" + file,
		"--socket=" + filepath.Join(dir, "agent.sock"), "--metrics-address=", "--access-log=",
	}
	for _, tt := range []struct {
		name string
		args []string
		text string
	}{
		{"nothing set", nil, "--node is not set\n--ca-address is not set\n--ca-root is not set\n--ca-token-file is not set"},
		{"empty", append(good, "--node="), "--node is not set"},
		{"unknown flag", append(good, "--nodes=x"), "--nodes"},
		{"argument", append(good, "x"), "x"},
		{"level", append(good, "--log-level=loud"), "loud"},
		{"node with a slash", append(good, "--node=a/b"), "a/b"},
		{"trust domain", append(good, "--trust-domain=A"), "trust domain"},
		{"negative settle", append(good, "--settle=-1s"), "settle"},
		{"access log in no directory", append(good, "--access-log="+dir+"/none/log"), "access log"},
		{"no cluster directory", append(good, "--cluster-dir="+dir+"/none"), "none"},
		{"a taint without a node object", append(good, "--startup-taint=x/y"), "--startup-taint means nothing with --cluster-dir"},
		{"a kubeconfig and a directory", append(good, "--kubeconfig=x"), "--kubeconfig means nothing with --cluster-dir"},
		{"CNI and a directory", append(good, "--cni-conf-dir=x"), "--cni-conf-dir means nothing with --cluster-dir"},
		{"status files and an API server", append(good, "--cluster-dir=", "--status-dir=x"), "--status-dir means nothing without --cluster-dir"},
		{"mesh config of no namespace", append(good, "--cluster-dir=", "--mesh-config=raceway"), `"raceway" is no namespace/name`},
		{"CNI plugins without configuration", append(good, "--cluster-dir=", "--cni-bin-dir=x"), "one is set and the other is not"},
		{"roots without a certificate", good, "PEM"},
		{"no service account", append(good, "--cluster-dir="), "service account of the pod: "},
		{"no kubeconfig", append(good, "--cluster-dir=", "--kubeconfig="+dir+"/none"), "kubeconfig " + dir + "/none: "},
	} {
		cmd := command()
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		cmd.SetArgs(tt.args)
		// Nothing of it comes as far as serving; the deadline is for when it does.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := cmd.ExecuteContext(ctx); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.text)
		} else if !strings.Contains(tt.text, "\n") && strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: more than one line: %v", tt.name, err)
		}
	}
}

func TestVariablesSetFlags(t *testing.T) {
	t.Setenv("RACEWAY_NODE", "a/b")
	cmd := command()
	cmd.SetArgs([]string{"--cluster-dir=x", "--ca-address=x:1", "--ca-root=x", "--ca-token-file=x", "--access-log="})
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "a/b") {
		t.Errorf("error %v", err)
	}
}

func TestReaderOfTheOutputMayEnd(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "--help")
	cmd.Env = append(os.Environ(), "RACEWAY_TEST_MAIN=1")
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Run(); err != nil {
		t.Errorf("with a closed pipe as output: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}
