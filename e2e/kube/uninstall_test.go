package kube

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/e2e/cluster"
)

// TestUninstallationLeavesNothing has clients that ask all the time, and fail at nothing.
func TestUninstallationLeavesNothing(t *testing.T) {
	w := onMesh(t)
	const ns = "leaving"
	w.busy(t, ns)
	lives := w.lives(t, ns)
	loop, hold := w.unharmed(t, ns, "loop", count{}), w.unharmed(t, ns, "hold", count{})
	w.uninstall(t)
	for _, n := range w.Nodes() {
		w.clean(t, n)
	}
	w.unharmed(t, ns, "loop", loop)
	w.unharmed(t, ns, "hold", hold)
	if now := w.lives(t, ns); fmt.Sprint(now) != fmt.Sprint(lives) {
		t.Errorf("pods have changed: %v, now %v", lives, now)
	}
	w.run(t, ns, pod{name: "late", node: 2, args: []string{"serve"}, probes: true})
}

// TestANodeThatWasOffHeals uninstalls while a node is off: no new pod of it may have to wait
// for an agent that never comes.
func TestANodeThatWasOffHeals(t *testing.T) {
	slow(t)
	w := onMesh(t)
	const ns = "switched-off"
	w.busy(t, ns)
	n := w.Node(2)
	if err := w.StopNode(n); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "wait", "--for=condition=Ready=Unknown", "node/"+n.Name, "--timeout=90s")
	w.uninstall(t)
	w.clean(t, w.Node(1))
	if err := w.StartNode(n); err != nil {
		t.Fatal(err)
	}
	if err := w.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.run(t, ns, pod{name: "late", node: 2, args: []string{"serve"}, probes: true})
	w.clean(t, n)
}

func (w *world) uninstall(t *testing.T) {
	t.Helper()
	w.runHelm(t, "uninstall", "raceway", "-n", system, "--wait", "--timeout", "3m")
	w.installed = false
}

// clean wants nothing of Raceway on a node but empty directories, which were mounted into the
// agent's pod and cannot be removed from there, and no word of it on the node's pods.
func (w *world) clean(t *testing.T, n *cluster.Node) {
	t.Helper()
	eventually(t, "nothing is left on "+n.Name, func() error {
		return errors.Join(w.filesLeft(n), w.programsLeft(t, n), filtersLeft(n), w.wordsLeft(t, n))
	})
}

func (w *world) filesLeft(n *cluster.Node) error {
	var errs []error
	for _, pattern := range []string{"/sys/fs/bpf/raceway*", "/run/raceway/*", "/opt/cni/bin/raceway*", "/etc/cni/net.d/*raceway*", "/var/lib/raceway/*"} {
		found, err := filepath.Glob(n.Path(pattern))
		if err != nil {
			errs = append(errs, err)
		}
		for _, f := range found {
			errs = append(errs, fmt.Errorf("there is still %s", strings.TrimPrefix(f, n.Path("/"))))
		}
	}
	configs, err := filepath.Glob(n.Path("/etc/cni/net.d/*"))
	if err != nil {
		errs = append(errs, err)
	}
	for _, c := range configs {
		if content, err := os.ReadFile(c); err == nil && strings.Contains(string(content), "raceway") {
			errs = append(errs, fmt.Errorf("%s still names the plugin: %s", filepath.Base(c), content))
		}
	}
	return errors.Join(errs...)
}

// programsLeft looks for BPF links in the network namespaces and cgroups of a node. Links are
// numbered for the whole machine, so they are told by where they are.
func (w *world) programsLeft(t *testing.T, n *cluster.Node) error {
	t.Helper()
	out, err := n.Exec(t.Context(), "bpftool", "link", "show")
	if err != nil {
		return err
	}
	places, err := placesOf(n)
	if err != nil {
		return err
	}
	var errs []error
	for _, at := range regexp.MustCompile(`(?m)(?:netns_ino|cgroup_id) (\d+).*$`).FindAllStringSubmatch(string(out), -1) {
		inode, err := strconv.ParseUint(at[1], 10, 64)
		if err != nil {
			return err
		}
		if places[inode] {
			errs = append(errs, fmt.Errorf("there is still a BPF link: %s", at[0]))
		}
	}
	return errors.Join(errs...)
}

// filtersLeft looks for programs on the interfaces of a node and its pods, which bpftool does
// not show for namespaces.
func filtersLeft(n *cluster.Node) error {
	var errs []error
	for space := range networksOf(n) {
		ns, err := netns.Open(space)
		if err != nil {
			continue // it has just gone
		}
		errs = append(errs, ns.Do(func() error {
			links, err := net.Interfaces()
			for _, l := range links {
				for _, hook := range []uint32{unix.BPF_TCX_INGRESS, unix.BPF_TCX_EGRESS} {
					if count := attached(l.Index, hook); count > 0 {
						err = errors.Join(err, fmt.Errorf("%d programs are still attached to %s (%s)", count, l.Name, space))
					}
				}
			}
			return err
		}))
		errs = append(errs, ns.Close())
	}
	return errors.Join(errs...)
}

// attached counts the programs at a TCX hook; a kernel without TCX has none.
func attached(ifindex int, hook uint32) uint32 {
	// The head of union bpf_attr for BPF_PROG_QUERY.
	attr := struct {
		ifindex, hook, queryFlags, attachFlags uint32
		ids                                    uint64
		count, pad                             uint32
		attachFlagsOf, linkIDs, linkFlags      uint64
		revision                               uint64
	}{ifindex: uint32(ifindex), hook: hook}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 && errno != unix.ENOSPC {
		return 0
	}
	return attr.count
}

// networksOf are the network namespaces of a node's processes: a path by which to open each,
// and its inode.
func networksOf(n *cluster.Node) map[string]uint64 {
	found := make(map[string]uint64)
	known := make(map[uint64]bool)
	spaces, _ := filepath.Glob(n.Path("/proc/[0-9]*/ns/net")) // the pattern is good
	for _, path := range spaces {
		if inode := inodeOf(path); inode != 0 && !known[inode] {
			known[inode], found[path] = true, inode
		}
	}
	return found
}

// inodeOf is 0 when path is not there.
func inodeOf(path string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	return st.Ino
}

// placesOf are the inodes of the network namespaces and cgroups of all processes of a node.
func placesOf(n *cluster.Node) (map[uint64]bool, error) {
	places := make(map[uint64]bool)
	for _, inode := range networksOf(n) {
		places[inode] = true
	}
	err := filepath.WalkDir(n.Path("/sys/fs/cgroup/unified"), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			places[inodeOf(path)] = true
		}
		return nil
	})
	return places, err
}

// wordsLeft looks for annotations on the pods of a node.
func (w *world) wordsLeft(t *testing.T, n *cluster.Node) error {
	t.Helper()
	pods, err := w.client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods.Items {
		for key, value := range p.Annotations {
			if strings.HasPrefix(key, "raceway.dev/") && p.Namespace != system {
				errs = append(errs, fmt.Errorf("pod %s/%s still has annotation %s=%s", p.Namespace, p.Name, key, value))
			}
		}
	}
	return errors.Join(errs...)
}
