// Command guest is the first process of the machine that e2e/oldkernel starts: it mounts what
// a node has, loads modules, runs what the machine was made for and switches it off.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Files that the machine is made with.
const (
	modulesFile  = "/etc/raceway/modules"  // names, one on each line
	commandsFile = "/etc/raceway/commands" // commands, one on each line, without quoting
)

// limit bounds one command.
const limit = 40 * time.Minute

func main() {
	fmt.Println("guest: up")
	if err := run(); err != nil {
		fmt.Println("guest: FAILED:", err)
	} else {
		fmt.Println("guest: PASSED")
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // nobody is left to tell
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := bringUp("lo"); err != nil {
		return err
	}
	commands, err := lines(commandsFile)
	if err != nil {
		return err
	}
	var errs []error
	for _, command := range commands {
		start := time.Now()
		err := execute(strings.Fields(command))
		fmt.Printf("guest: %s: %v after %s\n", command, outcome(err), time.Since(start).Round(time.Second))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func outcome(err error) string {
	if err != nil {
		return "FAILED: " + err.Error()
	}
	return "ok"
}

func mountAll() error {
	for _, m := range []struct{ kind, target, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/run", ""},
		{"tmpfs", "/tmp", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"bpf", "/sys/fs/bpf", ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, 0, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// loadModules loads modules and, before each, those that it depends on.
func loadModules() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	root := filepath.Join("/lib/modules", unix.ByteSliceToString(uts.Release[:]))
	files, err := modules(root)
	if err != nil {
		return err
	}
	wanted, err := lines(modulesFile)
	if err != nil {
		return err
	}
	for _, name := range wanted {
		if err := load(files, name, map[string]bool{}); err != nil {
			return err
		}
	}
	return nil
}

// module is a file and the names of the modules that it needs.
type module struct {
	file  string
	needs []string
}

// modules finds the modules below root, and of each, in its .modinfo section, what it needs.
func modules(root string) (map[string]module, error) {
	found := make(map[string]module)
	err := filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Ext(file) != ".ko" {
			return err
		}
		needs, err := dependencies(file)
		found[moduleName(file)] = module{file, needs}
		return err
	})
	return found, err
}

func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

func load(files map[string]module, name string, loaded map[string]bool) error {
	m, ok := files[name]
	if !ok {
		return fmt.Errorf("there is no module %s", name)
	}
	if loaded[name] {
		return nil
	}
	loaded[name] = true
	for _, need := range m.needs {
		if err := load(files, need, loaded); err != nil {
			return err
		}
	}
	file, err := os.Open(m.file)
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read only
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

func execute(command []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir = filepath.Dir(command[0])
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	cmd.Env = []string{"PATH=/bin", "HOME=/tmp", "RACEWAY_REQUIRE_ROOT=1", "RACEWAY_PROGRAMS=/bin"}
	return cmd.Run()
}

func bringUp(link string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(link)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

// lines are those of a file that are not empty.
func lines(name string) ([]string, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	var all []string
	scanner := bufio.NewScanner(file)
	for scanner.Scan() {
		if line := strings.TrimSpace(scanner.Text()); line != "" {
			all = append(all, line)
		}
	}
	return all, scanner.Err()
}
