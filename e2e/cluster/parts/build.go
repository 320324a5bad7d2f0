package parts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Build makes what is missing and returns the parts. It takes some minutes, a Go module
// proxy and apt-get. What other versions have left behind is removed.
func Build(ctx context.Context, log *slog.Logger) (_ Parts, err error) {
	source, err := source(ctx)
	if err != nil {
		return Parts{}, err
	}
	dir, err := cached(source)
	if err != nil {
		return Parts{}, err
	}
	if _, err := os.Stat(dir); err == nil {
		return Parts{Dir: dir}, nil
	}
	parent := filepath.Dir(dir)
	if err := os.RemoveAll(parent); err != nil {
		return Parts{}, fmt.Errorf("remove parts of other versions: %w", err)
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return Parts{}, fmt.Errorf("make the cache: %w", err)
	}
	partial, err := os.MkdirTemp(parent, "partial-")
	if err != nil {
		return Parts{}, fmt.Errorf("make the cache: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	p := Parts{Dir: partial}
	for _, step := range []struct {
		name string
		do   func(context.Context, Parts, string) error
	}{
		{"Debian packages", fetchPackages},
		{"CoreDNS", buildCoreDNS},
		{"Kubernetes", buildKubernetes},
	} {
		start := time.Now()
		if err := step.do(ctx, p, source); err != nil {
			return Parts{}, fmt.Errorf("get %s: %w", step.name, err)
		}
		log.Info("a part is ready", "part", step.name, "seconds", int(time.Since(start).Seconds()))
	}
	if err := errors.Join(os.Chmod(partial, 0o755), os.Rename(partial, dir)); err != nil { //nolint:gosec // nothing in it is secret
		return Parts{}, fmt.Errorf("keep the parts: %w", err)
	}
	return Parts{Dir: dir}, nil
}

// run runs a command in dir and shows what it said only when it fails.
func run(ctx context.Context, dir, command string, args ...string) error {
	cmd := exec.CommandContext(ctx, command, args...)
	cmd.Dir = dir
	if command == "go" {
		cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", command, strings.Join(args, " "), err, out)
	}
	return nil
}

func fetchPackages(ctx context.Context, p Parts, _ string) (err error) {
	downloads, err := os.MkdirTemp(p.Dir, "downloads-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(downloads)) }()
	download := append([]string{"-qq", "-o", "APT::Sandbox::User=root", "download"}, packages()...)
	if err := run(ctx, downloads, "apt-get", download...); err != nil {
		// Lists that are missing or old name packages that are no longer there.
		if err := run(ctx, downloads, "apt-get", "-qq", "update"); err != nil {
			return err
		}
		if err := run(ctx, downloads, "apt-get", download...); err != nil {
			return err
		}
	}
	packages, err := filepath.Glob(filepath.Join(downloads, "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range packages {
		if err := run(ctx, downloads, "dpkg-deb", "-x", deb, p.Debian()); err != nil {
			return err
		}
	}
	return nil
}

func buildCoreDNS(ctx context.Context, p Parts, source string) error {
	return run(ctx, filepath.Join(source, "coredns"), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", p.CoreDNS(), ".")
}

// buildKubernetes stamps the version as Kubernetes' own build does: a version of zero is
// refused by its components.
func buildKubernetes(ctx context.Context, p Parts, source string) error {
	dir := filepath.Join(source, "kubernetes")
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	list.Dir = dir
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("find the version: %w", err)
	}
	version := strings.TrimSpace(string(out))
	numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(numbers) != 3 {
		return fmt.Errorf("find the version: %q is none", version)
	}
	const stamp = " -X k8s.io/component-base/version."
	flags := "-s -w" + stamp + "gitVersion=" + version + stamp + "gitMajor=" + numbers[0] + stamp + "gitMinor=" + numbers[1] + stamp + "gitTreeState=clean"
	if err := run(ctx, dir, "go", "build", "-trimpath", "-ldflags", flags, "-o", p.Kubernetes("kubernetes"), "."); err != nil {
		return err
	}
	for _, command := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "etcd"} {
		if err := os.Symlink("kubernetes", p.Kubernetes(command)); err != nil {
			return err
		}
	}
	return nil
}
