package kubelet_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/kubelet"
)

// host is a proc file system and a cgroup tree of files.
type host struct {
	t    *testing.T
	proc string
	root string
}

// proc is a process; the zero values of all but comm and cgroup are those of the host.
type proc struct {
	comm   string
	cgroup string // the true one
	shown  string // what proc says, if that is something else
	v1     string // in a version 1 hierarchy
	netns  string
	nspid  string
	pidns  string
	start  int
}

const initialPIDs = "pid:[4026531836]"

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, proc: filepath.Join(t.TempDir(), "proc"), root: filepath.Join(t.TempDir(), "cgroup")}
	h.cgroup("/")
	h.start(1, proc{comm: "systemd", cgroup: "/init.scope"})
	return h
}

func (h *host) write(path, text string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// cgroup makes a cgroup and those above it.
func (h *host) cgroup(path string) {
	for at := "/"; ; {
		procs := filepath.Join(h.root, at, "cgroup.procs")
		if _, err := os.Stat(procs); err != nil {
			h.write(procs, "")
		}
		rest := strings.Trim(strings.TrimPrefix(path, at), "/")
		if rest == "" {
			return
		}
		next, _, _ := strings.Cut(rest, "/")
		at = filepath.Join(at, next)
	}
}

func (h *host) start(pid int, p proc) {
	h.t.Helper()
	h.cgroup(p.cgroup)
	procs := filepath.Join(h.root, p.cgroup, "cgroup.procs")
	members, err := os.ReadFile(procs)
	if err != nil {
		h.t.Fatal(err)
	}
	h.write(procs, fmt.Sprintf("%s%d\n", members, pid))
	if p.shown == "" {
		p.shown = p.cgroup
	}
	if p.nspid == "" {
		p.nspid = fmt.Sprint(pid)
	}
	if p.pidns == "" {
		p.pidns = initialPIDs
	}
	dir := filepath.Join(h.proc, fmt.Sprint(pid))
	h.write(filepath.Join(dir, "comm"), p.comm+"\n")
	h.write(filepath.Join(dir, "status"), "Name:\t"+p.comm+"\nNSpid:\t"+p.nspid+"\n")
	h.write(filepath.Join(dir, "cgroup"), "4:memory:"+p.v1+"\n0::"+p.shown+"\n")
	h.write(filepath.Join(dir, "stat"), fmt.Sprintf("%d (a ) name) S %s %d 0 0\n", pid, strings.TrimSpace(strings.Repeat("0 ", 18)), p.start))
	h.write(filepath.Join(h.proc, "namespaces", "host"), "")
	if p.netns == "" {
		p.netns = "host"
	}
	h.write(filepath.Join(h.proc, "namespaces", p.netns), "")
	if err := os.Mkdir(filepath.Join(dir, "ns"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	for name, target := range map[string]string{"net": filepath.Join(h.proc, "namespaces", p.netns), "pid": p.pidns} {
		if err := os.Symlink(target, filepath.Join(dir, "ns", name)); err != nil {
			h.t.Fatal(err)
		}
	}
}

// end ends a process; its cgroup goes with it, as systemd has it.
func (h *host) end(pid int, cgroup string) {
	h.t.Helper()
	for _, path := range []string{filepath.Join(h.proc, fmt.Sprint(pid)), filepath.Join(h.root, cgroup)} {
		if err := os.RemoveAll(path); err != nil {
			h.t.Fatal(err)
		}
	}
}

func (h *host) inode(path string) uint64 {
	h.t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(h.root, path), &st); err != nil {
		h.t.Fatal(err)
	}
	return st.Ino
}

func (h *host) config() kubelet.Config { return kubelet.Config{Proc: h.proc, CgroupRoot: h.root} }

const service = "/system.slice/kubelet.service"

func TestKubeletIsFound(t *testing.T) {
	pod := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-1.scope"
	for _, test := range []struct {
		name    string
		running map[int]proc
		pid     int
		path    string
		others  int
		pods    bool
		err     string // part of it
	}{
		{name: "a service", running: map[int]proc{900: {comm: "kubelet", cgroup: service}}, pid: 900, path: service},
		{name: "K3s", running: map[int]proc{
			900: {comm: "k3s-server", cgroup: "/system.slice/k3s.service"},
			901: {comm: "containerd", cgroup: "/system.slice/k3s.service"},
		}, pid: 900, path: "/system.slice/k3s.service", others: 1},
		{name: "none", running: map[int]proc{900: {comm: "kubectl", cgroup: service}}, err: "no process of the host is called kubelet"},
		{name: "two", running: map[int]proc{900: {comm: "kubelet", cgroup: service}, 901: {comm: "kubelet", cgroup: "/user.slice"}}, err: "2 processes"},
		{name: "impostors in pods", running: map[int]proc{
			800: {comm: "kubelet", cgroup: pod},
			801: {comm: "kubelet", cgroup: "/elsewhere", v1: "/kubepods/burstable/pod1/1"},
			802: {comm: "kubelet", cgroup: "/nested", nspid: "802\t7"},
			803: {comm: "kubelet", cgroup: "/other-node", netns: "another"},
			900: {comm: "kubelet", cgroup: service},
		}, pid: 900, path: service},
		{name: "an impostor seen from a cgroup namespace beside it", running: map[int]proc{
			800: {comm: "kubelet", cgroup: "/kubepods/burstable/pod1/1", shown: "/../../pod1/1"},
		}, err: "is in no cgroup below"},
		{name: "seen from a cgroup namespace", running: map[int]proc{900: {comm: "kubelet", cgroup: service, shown: "/../../.." + service}}, pid: 900, path: service},
		{name: "in the root cgroup", running: map[int]proc{900: {comm: "kubelet", cgroup: "/"}}, pid: 900, path: "/"},
		{name: "pods in its cgroup", running: map[int]proc{
			900: {comm: "kubelet", cgroup: "/"},
			901: {comm: "sleep", cgroup: "/", v1: "/kubepods/pod1/1"},
		}, pid: 900, path: "/", others: 1, pods: true},
		{name: "a container's process in its cgroup", running: map[int]proc{
			900: {comm: "kubelet", cgroup: service}, 901: {comm: "sleep", cgroup: service, nspid: "901\t1"},
		}, pid: 900, path: service, others: 1, pods: true},
		{name: "a node that is a container", running: map[int]proc{900: {comm: "kubelet", cgroup: service, pidns: "pid:[4026532000]"}}, path: service},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t)
			for pid, p := range test.running {
				h.start(pid, p)
			}
			got, err := h.config().Find()
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("found %+v, %v; want an error with %q", got, err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.PID != test.pid || got.Path != test.path || got.Cgroup != h.inode(test.path) || got.Others != test.others || got.WithPods != test.pods {
				t.Errorf("found %+v, want %+v", got, test)
			}
		})
	}
}

func TestConfiguredCgroupIsTheKubelets(t *testing.T) {
	h := newHost(t)
	h.start(900, proc{comm: "my-kubelet", cgroup: "/system.slice/mine"})
	c := h.config()
	c.Cgroup = filepath.Join(h.root, "system.slice/mine")
	got, err := c.Find()
	if err != nil || got.Cgroup != h.inode("/system.slice/mine") || got.PID != 0 || got.Others != 1 || got.WithPods {
		t.Errorf("found %+v, %v", got, err)
	}
	c.Cgroup = filepath.Join(h.root, "system.slice/another")
	if got, err := c.Find(); err == nil {
		t.Errorf("found %+v where no cgroup is", got)
	}
}

func TestRestartedKubeletIsTold(t *testing.T) {
	h := newHost(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var told []string
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.config().Watch(ctx, func(p kubelet.Place, err error) {
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					told = append(told, "missing")
					return
				}
				told = append(told, fmt.Sprint(p.PID))
			})
		}()
		want := func(after time.Duration, all string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if got := strings.Join(told, " "); got != all {
				t.Errorf("told %q, want %q", got, all)
			}
		}
		want(time.Minute, "missing")
		h.start(900, proc{comm: "kubelet", cgroup: service, start: 100})
		want(11*time.Second, "missing 900")
		want(time.Minute, "missing 900")
		h.end(900, service)
		want(1100*time.Millisecond, "missing 900 missing")
		h.start(950, proc{comm: "kubelet", cgroup: service, start: 200})
		want(1100*time.Millisecond, "missing 900 missing 950")
		h.end(950, service)
		h.start(950, proc{comm: "kubelet", cgroup: service, start: 300}) // the number again
		want(1100*time.Millisecond, "missing 900 missing 950 950")
		cancel()
		<-done
	})
}
