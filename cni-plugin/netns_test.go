package main_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// linksOf lists the interfaces of a namespace but loopback, with their IPv4 addresses.
func linksOf(t *testing.T, ns *netns.Namespace) (found []string) {
	t.Helper()
	netnstest.Do(t, ns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				if l.Attrs().Flags&net.FlagLoopback == 0 {
					found = append(found, l.Attrs().Name+" "+a.IP.String())
				}
			}
		}
		return nil
	})
	return found
}

// TestVerbsInANetworkNamespace goes the way of a sandbox: ADD, CHECK, STATUS, DEL, GC.
func TestVerbsInANetworkNamespace(t *testing.T) {
	netnstest.Require(t)
	h := newHost(t)
	h.goThrough(t, netnstest.New(t), fmt.Sprintf(`{"cniVersion":"1.1.0","name":"testnet","plugins":[{"type":%q}]}`, headPlugin), "eth0 "+headAddress)
}

// TestVerbsBehindARealPlugin does the same behind ptp, in a namespace that stands for the node.
func TestVerbsBehindARealPlugin(t *testing.T) {
	netnstest.Require(t)
	dirs := append(filepath.SplitList(os.Getenv("CNI_PATH")), "/opt/cni/bin", "/usr/lib/cni")
	i := slices.IndexFunc(dirs, func(dir string) bool {
		_, ptp := os.Stat(filepath.Join(dir, "ptp"))
		_, ipam := os.Stat(filepath.Join(dir, "host-local"))
		return errors.Join(ptp, ipam) == nil
	})
	if i < 0 {
		t.Skipf("needs the plugins ptp and host-local of containernetworking in one of %v; TestVerbsInANetworkNamespace runs without", dirs)
	}
	h := newHost(t)
	for _, name := range []string{"ptp", "host-local"} {
		must(t, os.Symlink(filepath.Join(dirs[i], name), filepath.Join(h.bin, name)))
	}
	leases := t.TempDir()
	text := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"real","plugins":[{"type":"ptp","ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.97.0.0/24"}]]}}]}`, leases)
	node, pod := netnstest.New(t), netnstest.New(t)
	netnstest.Do(t, node, func() error {
		h.goThrough(t, pod, text, "eth0 10.97.0.2")
		return nil
	})
}

func (h *host) goThrough(t *testing.T, ns *netns.Namespace, text, want string) {
	t.Helper()
	h.write(t, text)
	a := &agent{captures: true}
	h.serve(t, a)
	list, rt := h.list(t), pod("shop", "web")
	rt.NetNS = ns.Path()
	result, err := h.cni.AddNetworkList(t.Context(), list, rt)
	must(t, err)
	got, err := types100.NewResultFromResult(result)
	must(t, err)
	if len(got.IPs) == 0 || len(got.Interfaces) == 0 {
		t.Errorf("the result is %+v", got)
	}
	if links := linksOf(t, ns); !slices.Equal(links, []string{want}) {
		t.Errorf("the sandbox has %v, want %s", links, want)
	}
	if len(a.last.Addrs) == 0 || "eth0 "+a.last.Addrs[0].String() != want || a.last.NetNS != ns.Path() {
		t.Errorf("the agent heard of %+v", a.last)
	}
	must(t, h.cni.CheckNetworkList(t.Context(), list, rt))
	if list.CNIVersion == "1.1.0" {
		must(t, h.cni.GetStatusNetworkList(t.Context(), list))
		must(t, h.cni.GCNetworkList(t.Context(), list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: rt.ContainerID, IfName: rt.IfName}}}))
	}
	for range 2 {
		must(t, h.cni.DelNetworkList(t.Context(), list, rt))
	}
	if links := linksOf(t, ns); len(links) > 0 {
		t.Errorf("left in the sandbox: %v", links)
	}
	// The second DEL is of a sandbox that is gone, and of which the agent may hear again.
	if heard := a.heard(); !strings.HasPrefix(heard, "add shop/web, check shop/web, del shop/web") {
		t.Errorf("the agent heard %q", heard)
	}
}
