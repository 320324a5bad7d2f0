package main_test

import (
	"errors"
	"io/fs"
	"net"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

const headAddress = "10.99.0.2"

// headResult has an address of the host beside the pod's, as bridges report it.
func headResult(sandbox string) *types100.Result {
	inside, outside := 1, 0
	mask := net.CIDRMask(24, 32)
	return &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: "br0"}, {Name: "eth0", Sandbox: sandbox}},
		IPs: []*types100.IPConfig{
			{Interface: &outside, Address: net.IPNet{IP: net.ParseIP("10.99.0.1"), Mask: mask}},
			{Interface: &inside, Address: net.IPNet{IP: net.ParseIP(headAddress), Mask: mask}, Gateway: net.ParseIP("10.99.0.1")},
			{Interface: &inside, Address: net.IPNet{IP: net.ParseIP("fd99::2"), Mask: net.CIDRMask(64, 128)}},
		},
	}
}

// inside runs fn in a network namespace, and not at all when it does not exist.
func inside(path string, fn func() error) error {
	ns, err := netns.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

// makeLink makes a pair of interfaces with both ends in the sandbox, as not every kernel has
// dummy ones.
func makeLink(path, name string) error {
	return inside(path, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(headAddress + "/24")
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
	})
}

func removeLink(path, name string) error {
	return inside(path, func() error {
		link, err := netlink.LinkByName(name)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return nil
		}
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
}
