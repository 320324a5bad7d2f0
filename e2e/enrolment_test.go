package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Labels say what is captured: the namespace's, a pod's over it, never a pod on its node's
// network.
func TestLabelsDecideWhatIsCaptured(t *testing.T) {
	c := newCluster(t, lab.Options{})
	canary, other := c.pod("canary", 1), c.pod("other", 2)
	third := c.pod("third", 2) // tells when the namespace's label has taken effect
	host, err := c.AddPod(lab.PodSpec{Namespace: "shop", Name: "host", Node: 2, HostNetwork: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range []*lab.Pod{canary, other, third, host} {
		serve(t, pod, portEcho, echo)
	}
	bare := c.trace(host)
	c.start()

	if err := c.LabelPod(canary, dataplane.ModeAmbient); err != nil {
		t.Fatal(err)
	}
	c.awaitState(dataplane.CaptureInForce, canary)
	c.awaitWay(dataplane.ProtocolHBONE, canary)
	c.wantStates(map[*lab.Pod]dataplane.CaptureState{other: dataplane.CaptureNone, host: dataplane.CaptureNone})
	c.allTalk(canary, other, host)

	if err := c.LabelPod(other, dataplane.ModeNone); err != nil {
		t.Fatal(err)
	}
	c.enrol(canary, third)
	c.wantStates(map[*lab.Pod]dataplane.CaptureState{other: dataplane.CaptureNone, host: dataplane.CaptureNone})
	c.allTalk(canary, other, third, host)
	if now := c.trace(host); now != bare {
		t.Errorf("the node's network was\n%s\nand is\n%s", bare, now)
	}

	if err := c.LabelPod(other, ""); err != nil {
		t.Fatal(err)
	}
	c.awaitState(dataplane.CaptureInForce, other)
	if err := c.LabelPod(canary, dataplane.ModeNone); err != nil {
		t.Fatal(err)
	}
	c.awaitState(dataplane.CaptureNone, canary)
	c.allTalk(canary, other, third, host)
}

// wantStates compares what the agents say now.
func (c *cluster) wantStates(want map[*lab.Pod]dataplane.CaptureState) {
	c.t.Helper()
	for pod, state := range want {
		if w, err := c.workload(pod); err != nil || w.Capture != state {
			c.t.Errorf("%s is %s (%s), want %s; %v", pod, w.Capture, w.Reason, state, err)
		}
	}
}

// allTalk lets each pod talk to each other one.
func (c *cluster) allTalk(pods ...*lab.Pod) {
	c.t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if from == to {
				continue
			}
			if err := ask(c.t.Context(), from, to.AddrPort(portEcho), nonce()); err != nil {
				c.t.Errorf("%s to %s: %v", from, to, err)
			}
		}
	}
}

// trace is what can be seen of us in a pod's namespace and on the node's end of its link:
// rules, routes, links, traffic control, sockets that listen, and every network sysctl.
func (c *cluster) trace(p *lab.Pod) string {
	c.t.Helper()
	var all strings.Builder
	run := func(h *lab.Host, command string, args ...string) {
		out, err := h.Exec(c.t.Context(), command, args...)
		if err != nil {
			c.t.Fatalf("%s %v: %v: %s", command, args, err, out)
		}
		fmt.Fprintf(&all, "# %s %s\n%s", command, strings.Join(args, " "), out)
	}
	run(p.Host, "ip", "-4", "rule")
	run(p.Host, "ip", "-6", "rule")
	run(p.Host, "ip", "-4", "route", "show", "table", "all")
	run(p.Host, "ip", "-6", "route", "show", "table", "all")
	run(p.Host, "ip", "-details", "link")
	run(p.Host, "tc", "qdisc")
	run(p.Host, "tc", "filter", "show", "dev", "lo", "ingress")
	run(p.Host, "sysctl", "--all", "--ignore", "--pattern", `^net\.ipv[46]\..*(fwmark|forward|rp_filter|route_localnet|nonlocal)`)
	if p.HostEnd() != "" {
		run(p.Host, "ss", "-Hltn")
		run(p.Host, "tc", "filter", "show", "dev", "eth0", "ingress")
		run(p.Node.Host, "ip", "-details", "link", "show", "dev", p.HostEnd())
		run(p.Node.Host, "tc", "qdisc", "show", "dev", p.HostEnd())
		run(p.Node.Host, "tc", "filter", "show", "dev", p.HostEnd(), "ingress")
	}
	return all.String()
}

// A released pod is as it was, and so is what agents have pinned.
func TestReleaseLeavesNothing(t *testing.T) {
	eachVariant(t, func(t *testing.T, v variant) {
		c := newCluster(t, v.opts)
		web, db := c.pod("web", 1), c.pod("db", 2)
		serve(t, db, portEcho, echo)
		if err := web.Sysctl("net.ipv4.fwmark_reflect", "1"); err != nil { // somebody else's choice
			t.Fatal(err)
		}
		c.start(append([]string{"--grace", "100ms"}, v.args...)...)
		before, pins := c.trace(web)+c.trace(db), c.Pins()
		c.enrol(web, db)
		c.allTalkTo(db, web)
		if during := c.trace(web) + c.trace(db); during == before {
			t.Error("nothing is to be seen of the capture: this test would not see what is left of it")
		}
		if err := c.LabelNamespace("shop", ""); err != nil {
			t.Fatal(err)
		}
		c.awaitState(dataplane.CaptureNone, web, db)
		if after := c.trace(web) + c.trace(db); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		if now := c.Pins(); !slices.Equal(now, pins) {
			t.Errorf("pinned before: %q, after: %q", pins, now)
		}
		c.allTalkTo(db, web)
	})
}

func (c *cluster) allTalkTo(to *lab.Pod, from ...*lab.Pod) {
	c.t.Helper()
	for _, pod := range from {
		for _, addr := range to.Addrs {
			if err := ask(c.t.Context(), pod, netip.AddrPortFrom(addr, portEcho), nonce()); err != nil {
				c.t.Errorf("%s to %s: %v", pod, addr, err)
			}
		}
	}
}

// Connections from before the enrolment go on in both directions, whichever end is enrolled,
// and are shown for what they are.
func TestOlderConnectionsGoOn(t *testing.T) {
	eachVariant(t, func(t *testing.T, v variant) {
		c := newCluster(t, v.opts)
		web, db, plain := c.pod("web", 1), c.pod("db", 2), c.podIn("outside", "plain", 2)
		for _, pod := range []*lab.Pod{web, db, plain} {
			serve(t, pod, portEcho, echo)
		}
		c.start(v.args...)
		older := map[string]steady{
			"between two pods that get captured": open(t, web, db.AddrPort(portEcho)),
			"of a client that gets captured":     open(t, web, plain.AddrPort(portEcho)),
			"of a server that gets captured":     open(t, plain, db.AddrPort(portEcho)),
		}
		c.enrol(web, db)
		for name, s := range older {
			if err := s.use(); err != nil {
				t.Errorf("a connection %s: %v", name, err)
			}
		}
		for pod, want := range map[*lab.Pod]int{web: 2, db: 2} {
			if w, err := c.workload(pod); err != nil || w.Bypassing != want {
				t.Errorf("%s: %d connections are shown as older than the enrolment, want %d; %v", pod, w.Bypassing, want, err)
			}
		}
		if err := c.LabelNamespace("shop", ""); err != nil {
			t.Fatal(err)
		}
		c.awaitState(dataplane.CaptureNone, web, db)
		for name, s := range older {
			if err := s.use(); err != nil {
				t.Errorf("after the release, a connection %s: %v", name, err)
			}
		}
	})
}

// Pods and namespaces go without a word; the agent and the other pods do not mind.
func TestWhatGoesAwayIsReleased(t *testing.T) {
	c := newCluster(t, lab.Options{})
	web, db := c.pod("web", 1), c.pod("db", 2)
	removed, vanished := c.pod("removed", 1), c.pod("vanished", 1)
	for _, pod := range []*lab.Pod{db, removed, vanished} {
		serve(t, pod, portEcho, echo)
	}
	c.start()
	pins := c.Pins()
	c.enrol(web, db, removed, vanished)
	lasting := open(t, web, db.AddrPort(portEcho))
	open(t, web, removed.AddrPort(portEcho)) // is live while its pod goes
	open(t, vanished, db.AddrPort(portEcho))

	cookies := []string{fmt.Sprint(removed.Namespace().Cookie()), fmt.Sprint(vanished.Namespace().Cookie())} // pins are named after them
	if pins := strings.Join(c.Pins(), " "); !strings.Contains(pins, cookies[0]) || !strings.Contains(pins, cookies[1]) {
		t.Fatalf("nothing is pinned for the pods: %s", pins)
	}
	if err := c.RemovePod(removed); err != nil {
		t.Fatal(err)
	}
	if err := c.VanishPod(vanished); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no pins of the pods that are gone", func() error {
		for _, pin := range c.Pins() {
			if strings.Contains(pin, cookies[0]) || strings.Contains(pin, cookies[1]) {
				return fmt.Errorf("%s is pinned", pin)
			}
		}
		return nil
	})
	if w, err := c.workload(vanished); err != nil || w.Capture == dataplane.CaptureInForce {
		t.Errorf("%s is said to be %s; %v", vanished, w.Capture, err)
	}
	if err := lasting.use(); err != nil {
		t.Error("the connection of another pod:", err)
	}
	if err := ask(t.Context(), web, db.AddrPort(portEcho), nonce()); err != nil {
		t.Error(err)
	}
	if err := c.RemovePod(vanished); err != nil {
		t.Fatal(err)
	}

	// The Kubernetes namespace goes, and its label with it.
	if err := c.DeleteFile("namespace-shop.yaml"); err != nil {
		t.Fatal(err)
	}
	if err := lasting.Close(); err != nil {
		t.Error(err)
	}
	c.awaitState(dataplane.CaptureNone, web, db)
	if now := c.Pins(); !slices.Equal(now, pins) {
		t.Errorf("pinned before: %q, after: %q", pins, now)
	}
	if err := ask(t.Context(), web, db.AddrPort(portEcho), nonce()); err != nil {
		t.Error(err)
	}
}

// A pod that cannot be captured says why, and is captured once the reason is gone.
func TestCaptureWaitsAndSaysWhy(t *testing.T) {
	c := newCluster(t, lab.Options{})
	web, db := c.pod("web", 1), c.pod("db", 2)
	serve(t, db, portEcho, echo)
	c.start()
	file := filepath.Join(c.ClusterDir(), "pod-shop-db.yaml")
	right, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c.apply(filepath.Base(file), strings.ReplaceAll(string(right), db.NetNS(), db.NetNS()+"-not"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := c.CA().Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.LabelNamespace("shop", dataplane.ModeAmbient); err != nil {
		t.Fatal(err)
	}
	c.awaitReason(db, dataplane.CaptureFailed, db.NetNS()+"-not")
	c.awaitReason(web, dataplane.CaptureFailed, "certificate", c.CA().Addr.String())
	if err := ask(t.Context(), web, db.AddrPort(portEcho), nonce()); err != nil {
		t.Error("between pods that could not be captured:", err)
	}

	if _, err := c.StartCA(ctx); err != nil {
		t.Fatal(err)
	}
	c.awaitState(dataplane.CaptureInForce, web)
	c.apply(filepath.Base(file), string(right))
	c.awaitState(dataplane.CaptureInForce, db)
	c.awaitWay(dataplane.ProtocolHBONE, web, db)
	if err := ask(t.Context(), web, db.AddrPort(portEcho), nonce()); err != nil {
		t.Error(err)
	}
}

// awaitReason waits until p is in a state with a reason that has all words.
func (c *cluster) awaitReason(p *lab.Pod, state dataplane.CaptureState, words ...string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("%s %s because of %q", p, state, words), func() error {
		w, err := c.workload(p)
		if err != nil {
			return err
		}
		for _, word := range words {
			if w.Capture != state || !strings.Contains(w.Reason, word) {
				return fmt.Errorf("it is %s (%s)", w.Capture, w.Reason)
			}
		}
		return nil
	})
}
