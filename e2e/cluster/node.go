package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/e2e/cluster/node"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/space"
)

// Node is a machine of the cluster, on or off.
type Node struct {
	Name     string
	Number   int // from 1
	Addrs    []netip.Addr
	PodCIDRs []netip.Prefix

	c       *Cluster
	config  node.Config
	space   *space.Space
	process *process // the first of the node's processes
	booted  bool     // at least once
}

func nodeName(number int) string { return "node" + strconv.Itoa(number) }

func (c *Cluster) newNode(number int) (*Node, error) {
	n := &Node{Name: nodeName(number), Number: number, c: c}
	var ranges []string
	var dns []netip.Addr
	for _, p := range c.plans() {
		n.Addrs = append(n.Addrs, p.host(number))
		n.PodCIDRs = append(n.PodCIDRs, p.podCIDR(number))
		ranges = append(ranges, p.pods.String())
		dns = append(dns, p.dns)
	}
	n.config = node.Config{
		Name: n.Name, Addrs: n.Addrs, PodCIDRs: n.PodCIDRs, Dir: filepath.Join(stateDir, n.Name),
		Parts: c.parts.Dir, PauseImage: c.pauseTar(), PauseRef: pauseRef,
		APIServer: c.apiURL(), ClusterDNS: dns, PodRanges: ranges,
		ProxyMode: c.config.ProxyMode, CNI: c.config.CNI, Taints: c.config.Taints,
	}
	secrets := n.config.OnDisk("/etc/kubernetes")
	if err := os.MkdirAll(secrets, 0o700); err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(c.control.file("ca.crt"))
	if err != nil {
		return nil, err
	}
	const inNode = "/etc/kubernetes/ca.crt"
	return n, errors.Join(
		os.WriteFile(filepath.Join(secrets, "ca.crt"), ca, 0o644),
		c.control.kubelets[number-1].writeKubeconfig(filepath.Join(secrets, "kubelet.kubeconfig"), c.apiURL(), inNode),
		c.control.proxy.writeKubeconfig(filepath.Join(secrets, "kube-proxy.kubeconfig"), c.apiURL(), inNode))
}

// boot switches the node on.
func (n *Node) boot() (err error) {
	if n.space, err = space.New(name + "-" + n.Name); err != nil {
		return err
	}
	if err := n.wire(); err != nil {
		return err
	}
	if n.config.Cgroups, err = makeCgroups(n.Name); err != nil {
		return err
	}
	n.config.AwaitAPI = !n.booted
	if err := n.config.Write(); err != nil {
		return err
	}
	l := launch{
		name: n.Name, space: n.space, cgroup: unifiedDir(n.config.Cgroups),
		flags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID,
		log:   filepath.Join(stateDir, "log", n.Name+".log"),
	}
	n.process, err = l.start(n.c.bin("node"), node.StageJoin, n.config.File())
	n.booted = true
	return err
}

// wire plugs the node into the bridge and routes the pods of all other nodes.
func (n *Node) wire() error {
	control := n.c.control.space
	if err := control.Join(n.Name, n.space, "eth0"); err != nil {
		return err
	}
	if err := control.Plug(n.Name, "br0"); err != nil {
		return err
	}
	for i, p := range n.c.plans() {
		if err := n.space.AddAddr("eth0", netip.PrefixFrom(n.Addrs[i], p.nodes.Bits())); err != nil {
			return err
		}
		everywhere := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if p.nodes.Addr().Is6() {
			everywhere = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := n.space.AddRoute("eth0", everywhere, p.host(0)); err != nil {
			return err
		}
		for other := 1; other <= n.c.config.Nodes; other++ {
			if other == n.Number {
				continue
			}
			if err := n.space.AddRoute("eth0", p.podCIDR(other), p.host(other)); err != nil {
				return err
			}
		}
	}
	return nil
}

// StopNode pulls the node's plug: nothing on it is asked to end. Its disk stays.
func (c *Cluster) StopNode(n *Node) error {
	if err := n.process.kill(); err != nil {
		return err
	}
	err := removeCgroups(n.Name)
	if n.space != nil {
		// A namespace goes when the kernel comes to it. Its cable goes now: the next boot needs the name.
		err = errors.Join(err, n.c.control.space.RemoveLink(n.Name), n.space.Close())
	}
	n.space, n.process = nil, nil
	return err
}

// StartNode boots a stopped node, whether there is an API server or not.
func (c *Cluster) StartNode(n *Node) error {
	if n.process != nil {
		return fmt.Errorf("start %s: it is on", n.Name)
	}
	return n.boot()
}

// On reports whether the node is switched on.
func (n *Node) On() bool { return n.process != nil }

// Namespace is the node's network namespace. It ends when the node is switched off.
func (n *Node) Namespace() *netns.Namespace { return n.space.NS }

// Pid is the first process of the node, as this machine sees it.
func (n *Node) Pid() int { return n.process.pid }

// Disk is where this machine finds a path of the node's disk (node.Disk).
func (n *Node) Disk(path string) string { return n.config.OnDisk(path) }

// Path is where this machine finds any path of a node that is on.
func (n *Node) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.process.pid), "root", path)
}

// Command is a command that runs on the node: in all its namespaces. It is in no cgroup of the
// node, and ends with the node or with ctx.
func (n *Node) Command(ctx context.Context, command string, args ...string) *exec.Cmd {
	enter := []string{
		"--target", strconv.Itoa(n.process.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup",
		"--", command,
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = append([]string{}, node.Environment()...)
	return cmd
}

// Exec runs a command on the node to its end and returns what it wrote to both outputs.
func (n *Node) Exec(ctx context.Context, command string, args ...string) ([]byte, error) {
	out, err := n.Command(ctx, command, args...).CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("run %s on %s: %w: %s", command, n.Name, err, bytes.TrimSpace(out))
	}
	return out, nil
}

// Capture captures every packet between the node and the others, until the caller closes it
// or the node is switched off.
func (n *Node) Capture(ctx context.Context) (*lab.Capture, error) {
	return lab.NewCapture(ctx, n.c.control.space.NS, n.Name)
}

// ctr runs containerd's client on the node.
func (n *Node) ctr() string { return filepath.Join(node.PartsDir, "debian/usr/bin/ctr") }

// load gives the node an image.
func (n *Node) load(ctx context.Context, tar string) (err error) {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	cmd := n.Command(ctx, n.ctr(), "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("load %s on %s: %w: %s", filepath.Base(tar), n.Name, err, out)
	}
	return nil
}
