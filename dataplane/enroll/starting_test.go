package enroll

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

func starting(uid string) dataplane.Workload {
	w := workload(uid)
	w.Starting = true
	return w
}

// await is Await with a time limit.
func (g *rig) await(w dataplane.Workload, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(g.Context(), limit)
	defer cancel()
	return g.r.Await(ctx, &w)
}

func (g *rig) expectInForce(w dataplane.Workload) {
	g.Helper()
	if err := g.await(w, time.Second); err != nil {
		g.Error(err)
	}
}

// started tells that something runs in the pod now.
func (g *rig) started(uid string) {
	w := g.pods[uid]
	w.Starting = false
	g.pods[uid] = w
	g.publish()
}

func TestStartingPodIsInForceWithoutPauses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(starting("a")), nil)
		g.publish()
		g.run()
		g.expectInForce(starting("a"))
		g.expectState("a", dataplane.CaptureInForce, "")
		g.fake.sortLog()
		g.expectLog("0s capture-inbound a", "0s capture-outbound a", "0s guard a", "0s prepare a", "0s publish []", "0s publish [a]")

		g.started("a")
		time.Sleep(time.Minute)
		g.expectLog()
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestStartingPodDoesNotWaitForItsPublication(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(starting("a")), nil)
		var away atomic.Bool
		away.Store(true)
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "publish" && away.Load() {
				return errors.New("the API server is away")
			}
			return nil
		})
		g.publish()
		g.run()
		g.expectInForce(starting("a"))
		g.expectState("a", dataplane.CaptureFailed, "the API server is away")

		// The same once something runs in it: nothing is done again, and nothing undone.
		g.started("a")
		time.Sleep(time.Minute)
		g.fake.mu.Lock()
		for _, call := range g.fake.log {
			if strings.HasSuffix(call, " a") && !strings.HasPrefix(call, "0s ") {
				t.Errorf("a call for a pod that is in force: %s", call)
			}
		}
		g.fake.mu.Unlock()
		g.expectInForce(workload("a"))
		away.Store(false)
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestPodThatStartedHalfWayGoesOnAtTheUsualPace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(starting("a")), func(c *Config) { c.BackoffMin = time.Minute })
		failures := 1
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "capture-inbound" && failures > 0 {
				failures--
				return errors.New("the kernel said no")
			}
			return nil
		})
		g.publish()
		g.run()
		g.expectState("a", dataplane.CaptureFailed, "the kernel said no")
		g.fake.forgetLog()
		g.fake.edit("a", func(p *fakePod) { p.starting = false }) // and so the fake insists on the pauses
		g.started("a")
		time.Sleep(time.Hour)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

// The runtime makes a pod's network anew after it failed, and the agent is asked for the pod
// before it has taken that in.
func TestAwaitMeansTheNamespaceOfNow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(starting("a")), nil)
		g.publish()
		g.run()
		g.expectInForce(starting("a"))
		next := starting("a")
		next.NetNS += "-next"
		if err := g.await(next, time.Second); err == nil {
			t.Error("in force where it never was prepared")
		}
		g.fake.edit("a", func(p *fakePod) { p.moved = true })
		g.pods["a"] = next
		g.publish()
		g.expectInForce(next)
		if err := g.await(starting("a"), time.Second); err == nil {
			t.Error("in force where it is not any more")
		}
		g.halt()
	})
}

func TestAwaitTellsWhyNot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(starting("a")), nil)
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "prepare" {
				return errors.New("no certificate: the CA is away")
			}
			return nil
		})
		g.publish()
		g.run()
		for uid, want := range map[string]string{"a": "no certificate: the CA is away", "nobody": "not known to be wanted"} {
			if err := g.await(starting(uid), time.Minute); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "shop/"+uid) {
				t.Errorf("%s: %v, want %q", uid, err, want)
			}
		}
		g.halt()
	})
}

func TestClusterThatKnowsFewerAddressesDisturbsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := starting("a")
		second := netip.MustParseAddr("fd00::1")
		w.Addrs = append(w.Addrs, second)
		g := newRig(t, newCluster(w), nil)
		g.publish()
		g.run()
		g.expectInForce(w)
		time.Sleep(time.Minute)
		g.fake.forgetLog()
		w.Starting, w.Addrs = false, w.Addrs[:1]
		g.pods["a"] = w
		g.publish()
		time.Sleep(time.Minute)
		g.expectLog()
		g.expectState("a", dataplane.CaptureInForce, "")

		// Another address than any that it was prepared with takes a new preparation.
		w.Addrs = []netip.Addr{second.Next()}
		g.fake.edit("a", func(p *fakePod) { p.starting = false })
		g.pods["a"] = w
		g.publish()
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.fake.mu.Lock()
		if !slices.Contains(g.fake.pods["a"].preparedAs, second.Next()) {
			t.Errorf("prepared with %v", g.fake.pods["a"].preparedAs)
		}
		g.fake.mu.Unlock()
		g.halt()
	})
}
