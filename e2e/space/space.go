// Package space makes network namespaces with a name, and wires them: what the clusters of
// package lab and of package cluster stand on.
package space

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// Dir is where iproute2 looks for named namespaces, so that `ip netns exec` works on ours.
const Dir = "/run/netns"

// Space is one named network namespace and a netlink socket in it.
type Space struct {
	Name  string
	Path  string
	NS    *netns.Namespace
	Inode uint64 // of the namespace: what tells its processes

	nl *netlink.Handle
}

// New makes the namespace and brings its loopback up. Close removes it.
func New(name string) (_ *Space, err error) {
	s := &Space{Name: name, Path: filepath.Join(Dir, name)}
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", Dir, err)
	}
	if err := makeNamed(s.Path); err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.NS, err = netns.Open(s.Path); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(s.Path, &st); err != nil {
		return nil, fmt.Errorf("stat network namespace %s: %w", name, err)
	}
	s.Inode = st.Ino
	err = s.NS.WithFD(func(fd int) (err error) {
		s.nl, err = netlink.NewHandleAt(vnetns.NsHandle(fd), unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", name, err)
	}
	return s, s.Up("lo")
}

// makeNamed binds a new namespace to path, as `ip netns add` does. A path that is taken is an
// error and stays as it is.
func makeNamed(path string) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(path))
		}
	}()
	if err := f.Close(); err != nil {
		return err
	}
	home, err := netns.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, home.Close()) }()
	// Do brings the thread home from wherever it has gone.
	return home.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", path, err)
		}
		return nil
	})
}

// Close is idempotent. Links of the namespace go with it, once its last process has.
func (s *Space) Close() error {
	var errs []error
	if s.nl != nil {
		s.nl.Close()
		s.nl = nil
	}
	if s.NS != nil {
		errs = append(errs, s.NS.Close())
	}
	return errors.Join(append(errs, Remove(s.Path))...)
}

// Remove undoes what New did to path; a name that is gone is no error.
func Remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Sysctl writes values by their dotted names, in order. A value whose file does not exist is an error.
func (s *Space) Sysctl(pairs ...string) error {
	return s.NS.Do(func() error {
		for i := 0; i+1 < len(pairs); i += 2 {
			file := filepath.Join("/proc/sys", strings.ReplaceAll(pairs[i], ".", "/"))
			if err := os.WriteFile(file, []byte(pairs[i+1]), 0o644); err != nil {
				return fmt.Errorf("set %s in %s: %w", pairs[i], s.Name, err)
			}
		}
		return nil
	})
}

func (s *Space) link(name string) (netlink.Link, error) {
	l, err := s.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find link %s in %s: %w", name, s.Name, err)
	}
	return l, nil
}

// Up brings a link up.
func (s *Space) Up(name string) error {
	l, err := s.link(name)
	if err != nil {
		return err
	}
	if err := s.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s in %s: %w", name, s.Name, err)
	}
	return nil
}

// Join makes a veth pair with one end in each namespace, never one in the caller's.
func (s *Space) Join(name string, peer *Space, peerName string) error {
	err := peer.NS.WithFD(func(fd int) error {
		attrs := netlink.NewLinkAttrs() // with the kernel's queue length: a qdisc would set it anyway
		attrs.Name = name
		veth := netlink.NewVeth(attrs)
		veth.PeerName = peerName
		veth.PeerNamespace = netlink.NsFd(fd)
		return s.nl.LinkAdd(veth)
	})
	if err != nil {
		return fmt.Errorf("join %s in %s with %s in %s: %w", name, s.Name, peerName, peer.Name, err)
	}
	return errors.Join(s.Up(name), peer.Up(peerName))
}

// RemoveLink removes a link, and with a veth its other end.
func (s *Space) RemoveLink(name string) error {
	l, err := s.link(name)
	if err != nil {
		return err
	}
	if err := s.nl.LinkDel(l); err != nil {
		return fmt.Errorf("remove link %s in %s: %w", name, s.Name, err)
	}
	return nil
}

// AddBridge makes a bridge that is up.
func (s *Space) AddBridge(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := s.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add bridge %s in %s: %w", name, s.Name, err)
	}
	return s.Up(name)
}

// Plug makes a link a port of a bridge.
func (s *Space) Plug(link, bridge string) error {
	port, err := s.link(link)
	if err != nil {
		return err
	}
	master, err := s.link(bridge)
	if err != nil {
		return err
	}
	if err := s.nl.LinkSetMaster(port, master); err != nil {
		return fmt.Errorf("plug %s into %s in %s: %w", link, bridge, s.Name, err)
	}
	return nil
}

// AddAddr needs no duplicate address detection: there is nobody to duplicate.
func (s *Space) AddAddr(link string, p netip.Prefix) error {
	l, err := s.link(link)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := s.nl.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add %s to %s in %s: %w", p, link, s.Name, err)
	}
	if p.Addr().Is6() {
		return s.awaitGroup(link, solicitedNode(p.Addr()))
	}
	return nil
}

// solicitedNode is the multicast group that neighbours ask for a (RFC 4291, section 2.7.1).
func solicitedNode(a netip.Addr) netip.Addr {
	group := netip.MustParseAddr("ff02::1:ff00:0").As16()
	b := a.As16()
	copy(group[13:], b[13:])
	return netip.AddrFrom16(group)
}

// groupTimeout is for a kernel worker to run.
const groupTimeout = 10 * time.Second

// awaitGroup waits until link has joined group. The kernel joins an address's group some
// time after it has taken the address, and a neighbour that asks before is not heard and
// asks again only after a second.
func (s *Space) awaitGroup(link string, group netip.Addr) error {
	want := hex.EncodeToString(group.AsSlice())
	deadline := time.Now().Add(groupTimeout)
	for {
		var joined bool
		err := s.NS.Do(func() error {
			groups, err := os.ReadFile("/proc/thread-self/net/igmp6")
			for line := range strings.Lines(string(groups)) {
				fields := strings.Fields(line) // index, device, group, users, flags, timer
				joined = joined || len(fields) > 3 && fields[1] == link && fields[2] == want
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("read the groups of %s in %s: %w", link, s.Name, err)
		}
		if joined {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s in %s did not join %s", link, s.Name, group)
		}
		time.Sleep(time.Millisecond)
	}
}

// AddRoute routes dst through link, on-link when via is the zero Addr.
func (s *Space) AddRoute(link string, dst netip.Prefix, via netip.Addr) error {
	l, err := s.link(link)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst)}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := s.nl.RouteAdd(r); err != nil {
		return fmt.Errorf("route %s via %s in %s: %w", dst, link, s.Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
