package kernel_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// refused tries a connection that must not come about.
func refused(t *testing.T, from *netns.Namespace, to netip.AddrPort) {
	t.Helper()
	conn, err := tryDial(t, from, to, patience)
	if err == nil {
		t.Errorf("%v: connected from %v", to, conn.LocalAddr())
	} else if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v: %v, want connection refused", to, err)
	}
}

// unanswered is the same where TC redirects: it can only drop.
func unanswered(t *testing.T, m mode, from *netns.Namespace, to netip.AddrPort) {
	t.Helper()
	if m.inbound == kernel.InboundSKLookup {
		refused(t, from, to)
		return
	}
	conn, err := tryDial(t, from, to, 200*time.Millisecond)
	if err == nil {
		t.Errorf("%v: connected from %v", to, conn.LocalAddr())
	} else if !isTimeout(err) {
		t.Errorf("%v: %v, want a timeout", to, err)
	}
}

func TestDeadAgentFailsClosedAndTheNextAdopts(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		db := listenOn(t, f.db, netip.AddrPortFrom(f.db.V4, 3306))
		older := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		olderPeer := accept(t, db)
		f.enrol(t)
		captured := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		proxied := accept(t, f.pod.Outbound())
		if err := proxied.Close(); err != nil { // as the death of the agent does
			t.Fatal(err)
		}
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		for _, fam := range families() {
			refused(t, f.web.Namespace, netip.AddrPortFrom(fam.of(f.db), 3306))
			unanswered(t, m, f.db.Namespace, netip.AddrPortFrom(fam.of(f.web), 8080))
			unanswered(t, m, f.db.Namespace, netip.AddrPortFrom(fam.of(f.web), 15008))
		}
		if _, err := captured.Read(make([]byte, 1)); err == nil {
			t.Error("a captured connection outlived its proxy")
		}
		send(t, older, olderPeer, "older connections do not care")

		f.open(t)
		adopted := f.dp.Adopted()
		if len(adopted) != 1 || adopted[0].UID != "web" || adopted[0].NetNS != f.web.Path() || !slices.Equal(adopted[0].Addrs, f.web.Addrs()) {
			t.Fatalf("adopted %+v", adopted)
		}
		f.openPod(t)
		if len(f.dp.Adopted()) != 0 {
			t.Error("an open pod is still listed as adopted")
		}
		assertCaptured(t, f)
		if got := f.pod.Bypassing(); got != 1 {
			t.Errorf("%d connections bypass, want 1", got)
		}
		send(t, olderPeer, older, "nor do they now")
	})
}

// assertCaptured proves that the pod is captured without switching anything on.
func assertCaptured(t *testing.T, f *fixture) {
	t.Helper()
	for _, finding := range f.pod.Check(t.Context()) {
		if !finding.OK {
			t.Errorf("check %s: %s", finding.Check, finding.Detail)
		}
	}
	app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V6, 3306))
	send(t, app, accept(t, f.pod.Outbound()), "out")
	client := dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V4, 8080))
	in := accept(t, f.pod.Inbound())
	send(t, client, in, "in")
	send(t, in, client, "and back")
	peer := dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V6, 15008))
	send(t, peer, accept(t, f.pod.Tunnel()), "tunnel")
	conn, err := f.pod.DialDirect(t.Context(), netip.AddrPortFrom(f.db.V4, 9))
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("direct dial to a closed port: %v, want connection refused", err)
	}
}

func TestAnotherInboundAndTCModeTakesOver(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	for _, m := range slices.Backward(modes()) {
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		f.cfg.Inbound, f.cfg.TC = m.inbound, m.tc
		f.open(t)
		f.openPod(t)
		assertCaptured(t, f)
	}
	before := leftovers(t, f)
	tcx := strings.Contains(before, "host tcx 1\n") && !strings.Contains(before, "clsact")
	if !strings.Contains(before, "sk_lookup 1\n") || tcx == netnstest.KernelBefore(6, 6) {
		t.Errorf("in force after the last change:\n%s", before)
	}
}

func TestMapsOfAnotherLayoutAreReplaced(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		db := listenOn(t, f.db, netip.AddrPortFrom(f.db.V4, 3306))
		older := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		olderPeer := accept(t, db)
		f.enrol(t)
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		pretendOlderLayout(t, f)

		f.open(t)
		refused(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		f.openPod(t)
		assertCaptured(t, f)
		send(t, older, olderPeer, "older connections were carried over")
		layouts, err := filepath.Glob(filepath.Join(pinDir(f), "layout-*"))
		if err != nil || len(layouts) != 1 {
			t.Errorf("layouts left: %v, %v", layouts, err)
		}
	})
}

// pinDir is where the pins of the fixture are, whichever BPF file system there is.
func pinDir(f *fixture) string {
	if _, err := os.Stat(f.cfg.Dir); err == nil {
		return f.cfg.Dir
	}
	return strings.Replace(f.cfg.Dir, "/sys/fs/bpf", "/run/raceway/bpffs", 1)
}

func pretendOlderLayout(t *testing.T, f *fixture) {
	t.Helper()
	layouts, err := filepath.Glob(filepath.Join(pinDir(f), "layout-*"))
	if err != nil || len(layouts) != 1 {
		t.Fatalf("layouts: %v, %v", layouts, err)
	}
	if err := os.Rename(layouts[0], filepath.Join(pinDir(f), "layout-0")); err != nil {
		t.Fatal(err)
	}
	records, err := filepath.Glob(filepath.Join(f.cfg.StateDir, "pods", "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records: %v, %v", records, err)
	}
	data, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err := json.Unmarshal(data, &record); err != nil {
		t.Fatal(err)
	}
	record["layout"] = "0"
	if data, err = json.Marshal(record); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(records[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// leftovers describes all that enrolment touches, as the kernel sees it.
func leftovers(t *testing.T, f *fixture) string {
	t.Helper()
	var b strings.Builder
	netnstest.Do(t, f.web.Namespace, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			// The kernel adds its own when an interface gets ready.
			routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Protocol == unix.RTPROT_KERNEL })
			fmt.Fprintf(&b, "family %d: rules %v, %d routes\n", family, rules, len(routes))
		}
		for _, name := range []string{"net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"} {
			value, err := os.ReadFile("/proc/sys/" + name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s %s", name, value)
		}
		return errors.Join(describeTC(&b, "lo", 1), describeTC(&b, "pod", f.web.InterfaceIndex))
	})
	netnstest.Do(t, f.node.Namespace, func() error { return describeTC(&b, "host", f.web.HostIfindex) })
	err := f.web.WithFD(func(fd int) error {
		result, err := link.QueryPrograms(link.QueryOptions{Target: fd, Attach: ebpf.AttachSkLookup})
		if err == nil {
			fmt.Fprintf(&b, "sk_lookup %d\n", len(result.Programs))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func describeTC(b *strings.Builder, name string, ifindex int) error {
	if !netnstest.KernelBefore(6, 6) {
		result, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return err
		}
		fmt.Fprintf(b, "%s tcx %d\n", name, len(result.Programs))
	}
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return err
	}
	qdiscs, err := netlink.QdiscList(l)
	if err != nil {
		return err
	}
	for _, q := range qdiscs {
		fmt.Fprintf(b, "%s qdisc %s\n", name, q.Type())
	}
	return nil
}

func TestRemoveLeavesNothing(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		before := leftovers(t, f)
		fds := openFDs(t)
		for range 2 { // and again
			f.enrol(t)
			if during := leftovers(t, f); during == before {
				t.Fatal("enrolment cannot be seen, so its absence proves nothing")
			}
			if err := f.pod.Remove(); err != nil {
				t.Fatal(err)
			}
			if after := leftovers(t, f); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		}
		if got := openFDs(t); got != fds {
			t.Errorf("%d descriptors are open, %d were before", got, fds)
		}
		for _, pattern := range []string{filepath.Join(pinDir(f), "pods", "*"), filepath.Join(f.cfg.StateDir, "pods", "*")} {
			if files, err := filepath.Glob(pattern); err != nil || len(files) > 0 {
				t.Errorf("left behind: %v %v", files, err)
			}
		}
		// An application is on its own again.
		db := listenOn(t, f.db, netip.AddrPortFrom(f.db.V4, 3306))
		send(t, dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306)), accept(t, db), "plain")
	})
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestRemoveRestoresSysctlsThatWereSet(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	const name = "/proc/sys/net/ipv4/fwmark_reflect"
	netnstest.Do(t, f.web.Namespace, func() error { return os.WriteFile(name, []byte("1"), 0o644) })
	f.enrol(t)
	if err := f.dp.Close(); err != nil { // the previous value must survive the agent
		t.Fatal(err)
	}
	f.open(t)
	f.openPod(t)
	if err := f.pod.Remove(); err != nil {
		t.Fatal(err)
	}
	netnstest.Do(t, f.web.Namespace, func() error {
		value, err := os.ReadFile(name)
		if strings.TrimSpace(string(value)) != "1" {
			t.Errorf("fwmark_reflect is %s", value)
		}
		return err
	})
}

func TestReleaseInStepsAndEnrolAgain(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		draining := accept(t, f.pod.Outbound())
		for _, step := range []func() error{f.pod.Unguard, f.pod.ReleaseInbound, f.pod.ReleaseOutbound} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		db := listenOn(t, f.db, netip.AddrPortFrom(f.db.V4, 3306))
		web := listenOn(t, f.web, netip.AddrPortFrom(f.web.V4, 8080))
		send(t, dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306)), accept(t, db), "plain out")
		send(t, dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V4, 8080)), accept(t, web), "plain in")
		send(t, app, draining, "captured connections live on")
		for _, step := range []func() error{f.pod.CaptureOutbound, f.pod.CaptureInbound, func() error { return f.pod.Guard(t.Context()) }} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		assertCaptured(t, f)
		if got := f.pod.Bypassing(); got != 2 {
			t.Errorf("%d connections bypass, want the two plain ones", got)
		}
	})
}

func TestPodWhoseNamespaceVanishedIsReleased(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		gone := f.node.NewPod(t)
		if _, err := f.dp.OpenPod(kernel.PodConfig{UID: "gone", NetNS: gone.Path(), Addrs: gone.Addrs()}); err != nil {
			t.Fatal(err)
		}
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		if err := gone.Close(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(gone.Path(), unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		f.open(t)
		if err := f.dp.RemoveAdopted("gone"); err != nil {
			t.Fatal(err)
		}
		if got := f.dp.Adopted(); len(got) != 0 {
			t.Errorf("still adopted: %v", got)
		}
		if pins, _ := filepath.Glob(filepath.Join(pinDir(f), "pods", "*")); len(pins) > 0 {
			t.Errorf("pins left: %v", pins)
		}
	})
}

func TestPodOpensOnce(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	f.openPod(t)
	for _, uid := range []string{"web", "other"} {
		if p, err := f.dp.OpenPod(kernel.PodConfig{UID: uid, NetNS: f.web.Path(), Addrs: f.web.Addrs()}); err == nil {
			p.Close()
			t.Errorf("opened the namespace a second time, as %s", uid)
		}
	}
	if err := f.pod.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.pod.CaptureOutbound(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("capture of a closed pod: %v", err)
	}
	f.openPod(t)
}

func TestSecondAgentIsRefused(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	otherState := f.cfg
	otherState.StateDir = t.TempDir()
	otherPins := f.cfg
	otherPins.Dir += "-other"
	for name, cfg := range map[string]kernel.Config{"both directories": f.cfg, "the pins": otherState, "the records": otherPins} {
		dp, err := kernel.Open(cfg)
		if err == nil {
			t.Errorf("two agents share %s", name)
			dp.Close()
		} else if !strings.Contains(err.Error(), "another agent") {
			t.Errorf("sharing %s: %v", name, err)
		}
	}
}

// A state directory that knows nothing of the pods in force is no reason to let them go.
func TestLostStateKeepsPodsClosed(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	if err := f.dp.Close(); err != nil {
		t.Fatal(err)
	}
	lost := f.cfg
	lost.StateDir = t.TempDir()
	if dp, err := kernel.Open(lost); err == nil {
		t.Error("opened without the records of a pod in force")
		dp.Close()
	} else if !strings.Contains(err.Error(), "1 pods are captured") {
		t.Error(err)
	}
	at := netip.AddrPortFrom(f.db.V4, 8080)
	refused(t, f.web.Namespace, at)
	f.open(t)
	f.openPod(t)
	dial(t, f.web.Namespace, at)
	accept(t, f.pod.Outbound())
}

func TestCheckNamesWhatIsWrong(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, c := range []struct {
			check    string
			sabotage func() error
		}{
			{"sysctls", func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_fwmark_accept", []byte("0"), 0o644) }},
			{"routing", func() error { return exec.Command("ip", "rule", "del", "lookup", "15001").Run() }},
			{"listeners", func() error { return f.pod.Inbound().Close() }},
		} {
			netnstest.Do(t, f.web.Namespace, c.sabotage)
			var failed []string
			for _, finding := range f.pod.Check(t.Context()) {
				if !finding.OK {
					failed = append(failed, finding.Check)
				}
			}
			if !slices.Contains(failed, c.check) {
				t.Errorf("broke %s, found %v", c.check, failed)
			}
		}
	})
}
