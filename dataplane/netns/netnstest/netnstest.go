// Package netnstest makes network namespaces for tests that need root: a node with pods
// behind veth pairs, each pod with an IPv4 and an IPv6 address and a route to the others.
//
//	      node (forwards)
//	.1 rw0 |        | rw1 .1
//	       |        |
//	.2 eth0|        |eth0 .2
//	    pod 0      pod 1        10.88.<i>.0/24, fd88:0:0:<i>::/64
//
// Everything is removed when the test ends.
package netnstest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// KernelBefore reports whether the kernel is older than a release: what that release brought
// cannot be tested.
func KernelBefore(major, minor int) bool {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		panic(err)
	}
	var have [2]int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &have[0], &have[1]); err != nil {
		panic(err)
	}
	return have[0] < major || have[0] == major && have[1] < minor
}

// Require skips the test, saying what is missing, unless it can make network namespaces
// and load BPF. With RACEWAY_REQUIRE_ROOT=1 it fails the test instead.
func Require(t testing.TB) {
	t.Helper()
	if missing := lacking(); missing != "" {
		if os.Getenv("RACEWAY_REQUIRE_ROOT") == "1" {
			t.Fatalf("RACEWAY_REQUIRE_ROOT=1, but this machine lacks %s", missing)
		}
		t.Skipf("needs %s", missing)
	}
}

func lacking() string {
	if os.Geteuid() != 0 {
		return "root"
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return "capget: " + err.Error()
	}
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			return c.name
		}
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return "a kernel with BTF (/sys/kernel/btf/vmlinux)"
	}
	return ""
}

// New makes a network namespace with its loopback up, named rw and a random suffix under
// /run/netns so that `ip netns exec` finds it while a test is being debugged.
func New(t testing.TB) *netns.Namespace {
	t.Helper()
	const dir = "/run/netns"
	path := filepath.Join(dir, "rw"+strings.ToLower(rand.Text()[:10]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount %s: %v", path, err)
		}
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
	if err := bindNew(path); err != nil {
		t.Fatalf("make network namespace %s: %v", path, err)
	}
	ns, err := netns.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	Do(t, ns, func() error {
		// Without duplicate address detection, which would hold up the first packets for
		// a second or two.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return ns
}

// bindNew makes the namespace through a visit to the current one, which brings the thread home.
func bindNew(path string) error {
	here, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	return here.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
}

// Do runs fn inside ns and fails the test on an error.
func Do(t testing.TB, ns *netns.Namespace, fn func() error) {
	t.Helper()
	if err := ns.Do(fn); err != nil {
		t.Fatalf("in %s: %v", ns.Path(), err)
	}
}

// Node is a namespace that forwards between the pods it makes.
type Node struct {
	*netns.Namespace
	pods int
}

// Pod is a namespace behind a node.
type Pod struct {
	*netns.Namespace
	V4, V6         netip.Addr
	Gateway4       netip.Addr
	HostInterface  string // the node's end of the veth pair
	HostIfindex    int
	InterfaceIndex int // of eth0
}

// Addrs are the pod's addresses, IPv4 first.
func (p *Pod) Addrs() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

// NewNode makes a node without pods.
func NewNode(t testing.TB) *Node {
	t.Helper()
	n := &Node{Namespace: New(t)}
	Do(t, n.Namespace, func() error {
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644))
	})
	return n
}

// NewPod makes a pod behind the node and connects it.
func (n *Node) NewPod(t testing.TB) *Pod {
	t.Helper()
	i := n.pods
	n.pods++
	p := &Pod{
		Namespace:     New(t),
		V4:            netip.AddrFrom4([4]byte{10, 88, byte(i), 2}),
		V6:            netip.MustParseAddr(fmt.Sprintf("fd88:0:0:%x::2", i)),
		Gateway4:      netip.AddrFrom4([4]byte{10, 88, byte(i), 1}),
		HostInterface: fmt.Sprintf("rw%d", i),
	}
	gateway6 := netip.MustParseAddr(fmt.Sprintf("fd88:0:0:%x::1", i))
	Do(t, n.Namespace, func() error { return n.plug(p) })
	Do(t, n.Namespace, func() error {
		host, err := configure(p.HostInterface, p.Gateway4, gateway6)
		p.HostIfindex = host
		return err
	})
	Do(t, p.Namespace, func() error {
		eth0, err := configure("eth0", p.V4, p.V6)
		p.InterfaceIndex = eth0
		return errors.Join(err, defaultRoute(eth0, p.Gateway4), defaultRoute(eth0, gateway6))
	})
	return p
}

func (n *Node) plug(p *Pod) error {
	return p.WithFD(func(fd int) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = p.HostInterface
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)})
	})
}

func configure(name string, v4, v6 netip.Addr) (int, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0, err
	}
	for _, a := range []struct {
		addr netip.Addr
		bits int
	}{{v4, 24}, {v6, 64}} {
		ip := &netlink.Addr{IPNet: &net.IPNet{IP: a.addr.AsSlice(), Mask: net.CIDRMask(a.bits, a.addr.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(l, ip); err != nil {
			return 0, err
		}
	}
	return l.Attrs().Index, netlink.LinkSetUp(l)
}

func defaultRoute(ifindex int, via netip.Addr) error {
	bits := via.BitLen()
	return netlink.RouteAdd(&netlink.Route{
		LinkIndex: ifindex,
		Dst:       &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
		Gw:        via.AsSlice(),
	})
}

// Listen listens in ns the way an application does, until the test ends.
func Listen(t testing.TB, ns *netns.Namespace, network, address string) net.Listener {
	t.Helper()
	var l net.Listener
	Do(t, ns, func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), network, address)
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	return l
}
