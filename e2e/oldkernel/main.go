// Command oldkernel runs the tests that need a kernel on another one than the machine's: it
// makes a small machine of Debian's kernel, the tests and nothing else, and emulates it with
// QEMU. It is slow, and needs no hardware virtualization.
//
//	go run ./e2e/oldkernel                           Debian 12's kernel, 6.1
//	go run ./e2e/oldkernel -run 'TestStrict'         fewer tests
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var m machine
	flag.StringVar(&m.kernel, "kernel", "linux-image-cloud-amd64", "Debian package of the kernel")
	flag.StringVar(&m.cache, "cache", defaultCache(), "directory for what is downloaded")
	flag.StringVar(&m.run, "run", "", "only tests that match this pattern (go test -run)")
	flag.IntVar(&m.cpus, "cpus", 2, "processors of the machine")
	flag.StringVar(&m.memory, "memory", "3G", "its memory")
	flag.Parse()
	if err := m.test(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "oldkernel:", err)
		os.Exit(1) //nolint:gocritic // the signal handler ends with the process
	}
}

func defaultCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "raceway", "oldkernel")
}

// machine is what is made and run.
type machine struct {
	kernel, cache string
	run           string
	cpus          int
	memory        string
}

// needed are the commands that it takes, and the Debian packages that have them.
func needed() map[string]string {
	return map[string]string{"qemu-system-x86_64": "qemu-system-x86", "cpio": "cpio", "dpkg-deb": "dpkg", "apt-get": "apt"}
}

func (m machine) test(ctx context.Context) (err error) {
	for command, pkg := range needed() {
		if _, err := exec.LookPath(command); err != nil {
			return fmt.Errorf("%s is not installed: apt-get install %s", command, pkg)
		}
	}
	unpacked, err := m.unpackKernel(ctx)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "raceway-oldkernel-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	root := filepath.Join(work, "root")
	if err := m.makeRoot(ctx, root, unpacked); err != nil {
		return err
	}
	initrd := filepath.Join(work, "initrd")
	if err := archive(ctx, root, initrd); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(unpacked, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("package %s has %d kernels, want one", m.kernel, len(images))
	}
	return m.boot(ctx, images[0], initrd)
}

// command runs a program, whose output is shown when it fails.
func command(ctx context.Context, dir string, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
