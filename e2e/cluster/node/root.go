package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// PartsDir is where a node sees the parts.
const PartsDir = "/opt/parts"

// mount is one mount below the new root.
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

// makeRoot gives the node a root of its own: the machine's, with what is written kept in
// memory, and the node's disk, devices, /proc, /sys, cgroups, /run and bpffs in it. All of
// it is seen in this mount namespace alone and goes with it.
func (c Config) makeRoot() error {
	if err := unix.Sethostname([]byte(c.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root, scratch := filepath.Join(c.Dir, "root"), filepath.Join(c.Dir, "scratch")
	upper, work := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work")
	// An overlay's upper layer cannot lie inside its lower one, so it is a tmpfs.
	if err := perform(
		mount{"tmpfs", scratch, "tmpfs", 0, "mode=755"},
		mount{"", upper, "", 0, ""},
		mount{"", work, "", 0, ""},
		mount{"overlay", root, "overlay", 0, "lowerdir=/,upperdir=" + upper + ",workdir=" + work},
	); err != nil {
		return err
	}
	below := func(path string) string { return filepath.Join(root, path) }
	mounts := []mount{
		{"/dev", below("dev"), "", unix.MS_BIND | unix.MS_REC, ""},
		{"proc", below("proc"), "proc", 0, ""},
		{"sysfs", below("sys"), "sysfs", 0, ""},
		{"bpf", below("sys/fs/bpf"), "bpf", 0, ""},
		{"tmpfs", below("run"), "tmpfs", 0, "mode=755"},
		{c.Parts, below(PartsDir), "", unix.MS_BIND, ""},
	}
	mounts = append(mounts, c.cgroupMounts(below("sys/fs/cgroup"))...)
	for _, path := range Disk() {
		if err := os.MkdirAll(c.OnDisk(path), 0o755); err != nil {
			return fmt.Errorf("make the node's disk: %w", err)
		}
		mounts = append(mounts, mount{c.OnDisk(path), below(path), "", unix.MS_BIND, ""})
	}
	if err := perform(mounts...); err != nil {
		return err
	}
	if err := shield(root); err != nil {
		return err
	}
	return enter(root)
}

// cgroupMounts mounts the hierarchies as the machine has them: with version 1 they are
// directories of a tmpfs.
func (c Config) cgroupMounts(dir string) []mount {
	var mounts []mount
	for _, g := range c.Cgroups {
		if g.Mount != "" && len(mounts) == 0 {
			mounts = append(mounts, mount{"tmpfs", dir, "tmpfs", 0, "mode=755"})
		}
		kind := "cgroup2"
		if g.Controllers != "" {
			kind = "cgroup"
		}
		mounts = append(mounts, mount{kind, filepath.Join(dir, g.Mount), kind, 0, g.Controllers})
	}
	return mounts
}

// perform makes the targets and mounts in order. Without a kind and flags there is nothing
// to mount, only a directory to make.
func perform(mounts ...mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("make a mount point: %w", err)
		}
		if m.kind == "" && m.flags == 0 {
			continue
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// shield hides values that are the whole machine's and that a kubelet would change, behind
// files with the values that it wants. The boot id is one that tells a reboot.
func shield(root string) error {
	values := map[string]string{
		"vm/overcommit_memory":      "1",
		"vm/panic_on_oom":           "0",
		"kernel/panic":              "10",
		"kernel/panic_on_oops":      "1",
		"kernel/keys/root_maxkeys":  "1000000",
		"kernel/keys/root_maxbytes": "25000000",
		"kernel/random/boot_id":     strings.ToLower(rand.Text()),
	}
	dir := filepath.Join(root, "run/sysctl")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("shield the machine: %w", err)
	}
	for name, value := range values {
		file := filepath.Join(dir, strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return fmt.Errorf("shield the machine: %w", err)
		}
		if err := unix.Mount(file, filepath.Join(root, "proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("shield %s: %w", name, err)
		}
	}
	return nil
}

// enter makes root the root, and lets go of the old one.
func enter(root string) error {
	old := filepath.Join(root, "run/old")
	if err := os.MkdirAll(old, 0o755); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	if err := errors.Join(unix.PivotRoot(root, old), os.Chdir("/")); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	if err := unix.Unmount("/run/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	// A kubelet and its containers expect what systemd does.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts: %w", err)
	}
	return os.Remove("/run/old")
}
