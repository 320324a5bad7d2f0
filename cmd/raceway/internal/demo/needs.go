package demo

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// need is something that the demo cannot do without. check says what is missing, in one
// line to go behind "the demo needs", or nothing.
type need struct {
	name  string
	check func() string
}

// needs are probed and not derived from the kernel's version: distributions port features
// back, and build kernels without them.
func needs(binDir string) []need {
	return []need{
		{"capabilities", missingCapability},
		{"kernel", missingNamespaceCookie},
		{"BPF", missingBPF},
		{"BTF", func() string {
			const file = "/sys/kernel/btf/vmlinux"
			if _, err := os.Stat(file); err != nil {
				return "the kernel's BTF, " + file + ": a kernel built with CONFIG_DEBUG_INFO_BTF has it"
			}
			return ""
		}},
		{"cgroup v2", func() string {
			return missingFileSystem("cgroup2", "cgroup v2: a kernel built with CONFIG_CGROUPS and CONFIG_CGROUP_BPF has it")
		}},
		{"bpffs", func() string {
			return missingFileSystem("bpf", "the BPF file system: a kernel built with CONFIG_BPF_SYSCALL has it")
		}},
		{"IPv6", func() string {
			if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
				return "IPv6 in the kernel, which pods have by default: do not boot with ipv6.disable=1"
			}
			return ""
		}},
		{"raceway-agent", func() string { return missingProgram(binDir, "raceway-agent") }},
		{"raceway-ca", func() string { return missingProgram(binDir, "raceway-ca") }},
	}
}

// missing names everything that this machine lacks, in a line each.
func missing(binDir string) []string {
	if os.Geteuid() != 0 {
		// Nothing else can be found out.
		return []string{"root, for network namespaces and BPF: run it with sudo"}
	}
	var lines []string
	for _, n := range needs(binDir) {
		if line := n.check(); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

func missingCapability() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Sprintf("to know its own capabilities: capget: %v", err)
	}
	var lacking []string
	for _, c := range []struct {
		name string
		bit  uint
	}{
		{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN},
		{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},
		{"CAP_NET_RAW", unix.CAP_NET_RAW},
	} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			lacking = append(lacking, c.name)
		}
	}
	if len(lacking) == 0 {
		return ""
	}
	return strings.Join(lacking, ", ") + ": root without them, as in an ordinary container, is not enough"
}

// missingNamespaceCookie asks for what tells a pod's sockets from another's.
func missingNamespaceCookie() string {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Sprintf("sockets: %v", err)
	}
	defer unix.Close(fd)
	if _, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		return fmt.Sprintf("Linux 5.15 or newer: this one (%s) has no network namespace cookies (SO_NETNS_COOKIE: %v)", release(), err)
	}
	return ""
}

func release() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// missingBPF asks for an object that is surely not there: a kernel that would load programs
// for us answers so, one that would not refuses.
func missingBPF() string {
	_, err := bpfObjectExists(programByID, 1<<31-1)
	switch {
	case err == nil:
		return ""
	case errors.Is(err, unix.EPERM):
		return "the right to use BPF: bpf(2) is not permitted here; a container's seccomp profile or kernel lockdown may forbid it"
	}
	return fmt.Sprintf("BPF: bpf(2): %v; a kernel built with CONFIG_BPF_SYSCALL has it", err)
}

// missingFileSystem opens a new instance of the file system and mounts it nowhere.
func missingFileSystem(name, line string) string {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return line + fmt.Sprintf(" (%v)", err)
	}
	unix.Close(fd)
	return ""
}

func missingProgram(dir, name string) string {
	path := filepath.Join(dir, name)
	if info, err := os.Stat(path); err != nil || info.Mode()&0o111 == 0 {
		return path + ": run \"make build\", which puts it beside raceway"
	}
	return ""
}
