package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// suite is a package of tests and the tests of it that run.
type suite struct {
	pkg     string
	pattern string
	timeout string
}

// suites are what shows that a kernel does: every hook and program, then enrolment, tunnels,
// policy and telemetry with the real programs.
func suites() []suite {
	return []suite{
		{"dataplane/netns", ".", "10m"},
		{"dataplane/kernel", ".", "30m"},
		{"e2e", "TestLabelsDecide|TestReleaseLeavesNothing|TestOlderConnections|TestPolicy|TestStrict|TestKilledAgent|TestTelemetry", "40m"},
	}
}

// wantedModules are what Debian's kernel has apart.
func wantedModules() []string {
	return []string{"veth", "sch_ingress", "cls_bpf", "dummy", "bridge", "8021q", "ipvlan", "macvlan", "tun", "vxlan", "inet_diag", "tcp_diag", "udp_diag", "nf_conntrack_netlink"}
}

// wantedPrograms are this machine's, which tests call.
func wantedPrograms() []string { return []string{"ip", "sh", "sleep", "ss", "sysctl", "tc", "true"} }

// unpackKernel downloads the newest kernel package and unpacks it, unless that was done.
func (m machine) unpackKernel(ctx context.Context) (string, error) {
	pkg, err := resolve(ctx, m.kernel)
	if err != nil {
		return "", err
	}
	unpacked := filepath.Join(m.cache, pkg)
	if _, err := os.Stat(filepath.Join(unpacked, "boot")); err == nil {
		return unpacked, nil
	}
	downloads := unpacked + ".download"
	if err := os.MkdirAll(downloads, 0o755); err != nil {
		return "", err
	}
	if err := command(ctx, downloads, nil, "apt-get", "-qq", "download", pkg); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(downloads, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("downloaded %d packages, want one", len(debs))
	}
	if err := command(ctx, downloads, nil, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return "", errors.Join(err, os.RemoveAll(unpacked))
	}
	return unpacked, os.RemoveAll(downloads)
}

// resolve names the package that a meta-package such as linux-image-cloud-amd64 stands for.
func resolve(ctx context.Context, pkg string) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", pkg).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w", pkg, err)
	}
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + name, nil
		}
	}
	return pkg, nil
}

// makeRoot fills the machine's file system.
func (m machine) makeRoot(ctx context.Context, root, kernel string) error {
	static := []string{"CGO_ENABLED=0"}
	bin, etc := filepath.Join(root, "bin"), filepath.Join(root, "etc", "raceway")
	for _, dir := range []string{bin, etc, filepath.Join(root, "lib"), filepath.Join(root, "dev")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := command(ctx, "", static, "go", "build", "-o", filepath.Join(root, "init"), "./e2e/oldkernel/guest"); err != nil {
		return err
	}
	if err := command(ctx, "", static, "go", "build", "-o", bin, "./cmd/raceway", "./cmd/raceway-agent", "./cmd/raceway-ca"); err != nil {
		return err
	}
	var commands []string
	for _, s := range suites() {
		// In a folder like its own, for what tests read beside them.
		program := filepath.Join("/raceway", s.pkg, filepath.Base(s.pkg)+".test")
		if err := command(ctx, "", static, "go", "test", "-c", "-o", filepath.Join(root, program), "./"+s.pkg); err != nil {
			return err
		}
		pattern := s.pattern
		if m.run != "" {
			pattern = m.run
		}
		commands = append(commands, fmt.Sprintf("%s -test.run %s -test.timeout %s -test.v", program, pattern, s.timeout))
	}
	for _, program := range wantedPrograms() {
		if err := copyProgram(ctx, program, root); err != nil {
			return err
		}
	}
	for name, content := range map[string][]string{"modules": wantedModules(), "commands": commands} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(strings.Join(content, "\n")+"\n"), 0o644); err != nil {
			return err
		}
	}
	return copyModules(filepath.Join(kernel, "lib", "modules"), filepath.Join(root, "lib", "modules"))
}

// copyProgram takes a program and the libraries that it is linked with.
func copyProgram(ctx context.Context, name, root string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	linked, err := exec.CommandContext(ctx, "ldd", path).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", path, err)
	}
	copies := map[string]string{path: filepath.Join("/bin", name)}
	for field := range strings.FieldsSeq(string(linked)) {
		if filepath.IsAbs(field) {
			copies[field] = field
		}
	}
	for from, to := range copies {
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		to = filepath.Join(root, to)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o755)); err != nil {
			return err
		}
	}
	return nil
}

// copyModules takes the modules of networking: the others are large, and of devices that the
// machine does not have.
func copyModules(from, to string) error {
	releases, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, release := range releases {
		for _, part := range []string{"kernel/lib", "kernel/net", "kernel/drivers/net"} {
			source := filepath.Join(from, release.Name(), part)
			if err := os.CopyFS(filepath.Join(to, release.Name(), part), os.DirFS(source)); err != nil {
				return err
			}
		}
	}
	return nil
}

// archive packs root as the kernel takes it (Documentation/driver-api/early-userspace).
func archive(ctx context.Context, root, to string) error {
	return command(ctx, root, nil, "sh", "-c", "find . -print0 | cpio --null --quiet -o -H newc | gzip -1 > "+to)
}
