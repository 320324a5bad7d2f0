package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a /proc and a /run/netns that the test makes, with real network namespaces.
type host struct {
	*testing.T
	*Finder
	proc, run string
}

func newHost(t *testing.T) *host {
	t.Helper()
	netnstest.Require(t)
	h := &host{T: t, proc: t.TempDir(), run: t.TempDir()}
	h.Finder = New(Config{Proc: h.proc, Run: h.run, Fresh: time.Nanosecond})
	h.process(1, "", 1, netnstest.New(t).Path())
	h.link("/proc/self/ns/user", filepath.Join(h.proc, "1", "ns", "user"))
	return h
}

func (h *host) link(old, name string) {
	h.Helper()
	if err := os.Symlink(old, name); err != nil {
		h.Fatal(err)
	}
}

func (h *host) write(content string, path ...string) {
	h.Helper()
	if err := os.WriteFile(filepath.Join(path...), []byte(content), 0o600); err != nil {
		h.Fatal(err)
	}
}

// process makes one that started at a time and is in a pod, "" for none, and a namespace.
func (h *host) process(pid int, uid string, started int, netns string) (path string) {
	h.Helper()
	dir := filepath.Join(h.proc, fmt.Sprint(pid))
	if err := os.MkdirAll(filepath.Join(dir, "ns"), 0o700); err != nil {
		h.Fatal(err)
	}
	cgroup := "0::/init.scope\n"
	if uid != "" {
		cgroup = "0::/kubepods/burstable/pod" + uid + "/x\n"
	}
	h.write(cgroup, dir, "cgroup")
	h.write(fmt.Sprintf("%d (a ) b (c) S 1%s %d 0 0\n", pid, strings.Repeat(" 0", 17), started), dir, "stat")
	path = filepath.Join(dir, "ns", "net")
	h.link(netns, path)
	return path
}

func (h *host) expect(pod Pod, want string) {
	h.Helper()
	if got, err := h.Find(h.Context(), pod); err != nil || got != want {
		h.Errorf("found %q, %v, want %s", got, err, want)
	}
}

func (h *host) expectNone(pod Pod, why string) {
	h.Helper()
	if got, err := h.Find(h.Context(), pod); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), why) {
		h.Errorf("found %q, %v, want %q", got, err, why)
	}
}

func TestNameInRunIsPreferred(t *testing.T) {
	h := newHost(t)
	node := netnstest.NewNode(t)
	a, b := node.NewPod(t), node.NewPod(t)
	h.process(10, web, 100, a.Path())
	direct := h.process(20, db, 100, b.Path())
	named := filepath.Join(h.run, "cni-1")
	h.link(a.Path(), named)
	h.expect(Pod{UID: web, Addrs: a.Addrs()}, named)
	h.expect(Pod{UID: web}, named)
	h.expect(Pod{UID: db, Addrs: b.Addrs()}, direct)
	h.expectNone(Pod{UID: db, Addrs: a.Addrs()}, "does not have the pod's address "+a.V4.String())
	h.expectNone(Pod{UID: db, Addrs: []netip.Addr{b.V4, a.V6}}, a.V6.String())
	h.expectNone(Pod{UID: etcd}, "no process on this node is of pod "+etcd)
}

func TestProcessThatMovedDoesNotMislead(t *testing.T) {
	h := newHost(t)
	node := netnstest.NewNode(t)
	pod, other := node.NewPod(t), node.NewPod(t)
	mine := h.process(30, web, 300, pod.Path())
	first := h.process(40, web, 100, pod.Path()) // its number is higher, and it is older: numbers begin anew
	own := h.process(20, web, 200, other.Path())
	h.process(25, web, 150, filepath.Join(h.proc, "1", "ns", "net")) // as a monitor of the runtime
	h.expect(Pod{UID: web, Addrs: pod.Addrs()}, first)
	h.expect(Pod{UID: web}, first)
	if err := os.RemoveAll(filepath.Dir(filepath.Dir(first))); err != nil {
		t.Fatal(err)
	}
	h.expect(Pod{UID: web, Addrs: pod.Addrs()}, mine)
	h.expect(Pod{UID: web, Addrs: other.Addrs()}, own)
	named := filepath.Join(h.run, "cni-1")
	h.link(pod.Path(), named)
	h.expect(Pod{UID: web}, named)
}

// Whoever lacks the host's privileges can make a network namespace, and in it be root, give
// himself the pod's address and wait to be mistaken for it.
func TestNamespaceOfAUserNamespaceCountsOnlyWithAName(t *testing.T) {
	h := newHost(t)
	jail := exec.CommandContext(t.Context(), "sleep", "1000")
	jail.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := jail.Start(); err != nil {
		t.Skipf("needs user namespaces: %v", err)
	}
	t.Cleanup(func() {
		_ = jail.Process.Kill()
		_ = jail.Wait()
	})
	theirs := fmt.Sprintf("/proc/%d/ns/net", jail.Process.Pid)
	h.process(10, web, 100, theirs)
	h.expectNone(Pod{UID: web}, "belongs to a user namespace")
	named := filepath.Join(h.run, "cni-1")
	h.link(theirs, named) // as a runtime does that gives the pod a user namespace
	h.expect(Pod{UID: web}, named)
}

func TestHostsNamespaceIsNoPods(t *testing.T) {
	h := newHost(t)
	hosts := filepath.Join(h.proc, "1", "ns", "net")
	h.process(10, web, 100, hosts)
	h.expectNone(Pod{UID: web}, "is the host's")
	h.link(hosts, filepath.Join(h.run, "default"))
	h.expectNone(Pod{UID: web}, "is the host's")
	// Nothing is taken on trust where the host's cannot be told.
	h.process(20, db, 100, netnstest.New(t).Path())
	if err := os.Remove(hosts); err != nil {
		t.Fatal(err)
	}
	h.expectNone(Pod{UID: db}, "cannot be told from the host's")
}

func TestNumberOfAnotherProcessIsNoticed(t *testing.T) {
	h := newHost(t)
	h.cfg.Fresh = time.Hour
	h.process(10, web, 100, netnstest.New(t).Path())
	h.expect(Pod{UID: web}, filepath.Join(h.proc, "10", "ns", "net"))
	h.write("0::/kubepods/pod"+db+"\n", h.proc, "10", "cgroup")
	h.expectNone(Pod{UID: web}, "is not of the pod any more")
}

func TestOneLookServesManyPods(t *testing.T) {
	h := newHost(t)
	h.cfg.Fresh = time.Hour
	h.process(10, web, 100, netnstest.New(t).Path())
	h.expect(Pod{UID: web}, filepath.Join(h.proc, "10", "ns", "net"))
	late := h.process(20, db, 100, netnstest.New(t).Path())
	h.expectNone(Pod{UID: db}, "no process")
	h.cfg.Fresh = time.Nanosecond
	h.expect(Pod{UID: db}, late)
}

func TestLookEndsWithItsContext(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Find(ctx, Pod{UID: web}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestMissingPrivilegeIsNamed(t *testing.T) {
	s := &scan{denied: os.ErrPermission}
	if got := s.blind(); !strings.Contains(got, "CAP_SYS_PTRACE") {
		t.Error(got)
	}
}

// The machine's own /proc has processes that end while they are looked at.
func TestRealProcIsRead(t *testing.T) {
	if _, err := New(Config{}).Find(t.Context(), Pod{UID: web}); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v", err)
	}
	self, err := startOf("/proc/self")
	if err != nil || self == 0 {
		t.Errorf("this process started at %d, %v", self, err)
	}
}

func TestStablePath(t *testing.T) {
	for path, want := range map[string]string{"/var/run/netns/cni-1": "/run/netns/cni-1", "/run/netns/cni-1": "/run/netns/cni-1", "/proc/7/ns/net": "/proc/7/ns/net"} {
		if got := Stable(path); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
}
