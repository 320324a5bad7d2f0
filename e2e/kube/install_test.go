package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// system is the namespace that Raceway is installed in.
const system = "raceway-system"

// build makes the image as `make image` does and gives it to the nodes; the command line and
// helm come from it and from the tools of this repository.
func (w *world) build(ctx context.Context) error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"make", "image", "build"}} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", args, err, out)
		}
	}
	w.raceway = filepath.Join(root, "bin/raceway")
	if w.helm, err = tool(ctx, root, "helm"); err != nil {
		return err
	}
	return w.LoadImage(ctx, filepath.Join(root, "bin/raceway-image.tar"))
}

// tool builds one of .ci/tools and returns its path.
func tool(ctx context.Context, root, name string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "-modfile=.ci/tools/go.mod", "-n", name)
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// runHelm runs helm as the administrator.
func (w *world) runHelm(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), w.helm, append(args, "--kubeconfig", w.Kubeconfig())...)
	cmd.Dir = "../.."
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := w.Run(cmd)
	if err != nil {
		t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// install does what docs/install.md tells users to do.
func (w *world) install(t *testing.T, values ...string) {
	t.Helper()
	w.apply(t, `
apiVersion: v1
kind: Namespace
metadata:
  name: raceway-system
  labels: {pod-security.kubernetes.io/enforce: privileged}
`)
	w.runHelm(t, "upgrade", "--install", "raceway-crds", "daemonset/crds", "-n", system)
	args := []string{"upgrade", "--install", "raceway", "daemonset/chart", "-n", system, "--wait", "--timeout", "3m"}
	w.runHelm(t, append(args, values...)...)
	w.installed = true
}

// cli runs the operator's command line with the kubeconfig.
func (w *world) cli(ctx context.Context, args ...string) (string, error) {
	return w.Run(exec.CommandContext(ctx, w.raceway, append(args, "--kubeconfig", w.Kubeconfig())...))
}

// workload is what the tests want of a row of `raceway workloads`.
type workload struct {
	Namespace, Name, Node, Protocol, Capture, Reason string
}

// workloads asks the agents for the pods of a namespace.
func (w *world) workloads(ctx context.Context, namespace string) (map[string]workload, error) {
	out, err := w.cli(ctx, "workloads", "-n", namespace, "-o", "json")
	if err != nil {
		return nil, err
	}
	var rows []workload
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		return nil, fmt.Errorf("raceway workloads says %q: %w", out, err)
	}
	found := make(map[string]workload)
	for _, r := range rows {
		found[r.Name] = r
	}
	return found, nil
}
