package perf

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/perf/report"
)

// usage is CPU time: what the whole machine was busy with, by kind, and the part of it that
// is the proxies' own: of agents or of a yardstick (their user and system time; softirq is
// nobody's).
type usage struct {
	User    time.Duration `json:"user"`
	System  time.Duration `json:"system"`
	Softirq time.Duration `json:"softirq"`
	Proxies time.Duration `json:"proxies,omitempty"`
}

func (u usage) minus(o usage) usage {
	return usage{u.User - o.User, u.System - o.System, u.Softirq - o.Softirq, u.Proxies - o.Proxies}
}

func (u usage) plus(o usage) usage {
	return usage{u.User + o.User, u.System + o.System, u.Softirq + o.Softirq, u.Proxies + o.Proxies}
}

func (u usage) each(yield func(kind string, t time.Duration)) {
	yield("user", u.User)
	yield("system", u.System)
	yield("softirq", u.Softirq)
	yield("total", u.User+u.System+u.Softirq)
	if u.Proxies > 0 {
		yield("proxies", u.Proxies)
	}
}

// clockTick is the unit of /proc/stat: USER_HZ is 100 on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// machineUsage reads the first line of /proc/stat:
// cpu user nice system idle iowait irq softirq steal guest guest_nice (proc(5)).
func machineUsage() (usage, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return usage{}, fmt.Errorf("read the machine's CPU time: %w", err)
	}
	return parseUsage(string(stat))
}

func parseUsage(stat string) (usage, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return usage{}, fmt.Errorf("read the machine's CPU time: /proc/stat begins with %q", line)
	}
	var ticks [8]time.Duration
	for i := 1; i < len(ticks); i++ {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return usage{}, fmt.Errorf("read the machine's CPU time: %w", err)
		}
		ticks[i] = time.Duration(n) * clockTick
	}
	return usage{
		User:    ticks[1] + ticks[2],
		System:  ticks[3],
		Softirq: ticks[6] + ticks[7],
	}, nil
}

// ThisMachine describes it; what cannot be found out is "unknown" and no error.
func ThisMachine() report.Machine {
	m := report.Machine{
		CPU: "unknown", Kernel: "unknown", Commit: commit(),
		Cores: runtime.NumCPU(), Go: runtime.Version(),
		Congestion: firstLine("/proc/sys/net/ipv4/tcp_congestion_control"),
		Load:       firstLine("/proc/loadavg"),
		Command:    command(os.Args), Date: time.Now().UTC().Truncate(time.Second),
	}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		m.MemoryMiB = info.Totalram * uint64(info.Unit) >> 20
	}
	return m
}

func firstLine(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(content), "\n")
	return line
}

// commit asks git, because a build may be without it (-buildvcs=false).
func commit() string {
	head, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	name := strings.TrimSpace(string(head))
	if changes, err := exec.Command("git", "status", "--porcelain", "--untracked-files=no").Output(); err != nil || len(changes) > 0 {
		name += "+"
	}
	return name
}

// command is how the benchmark was called, without the place of this machine where its
// program happened to be.
func command(args []string) string {
	return strings.Join(append([]string{filepath.Base(args[0])}, args[1:]...), " ")
}
