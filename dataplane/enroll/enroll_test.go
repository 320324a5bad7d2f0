package enroll

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEnrolmentAndReleaseKeepTheOrder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.run()
		g.expectLog()
		g.set("a", false)
		g.expectLog("0s publish []")
		g.set("a", true)
		g.expectLog("0s prepare a", "0s publish [a]")
		g.expectState("a", dataplane.CapturePending, "peers to learn")
		time.Sleep(time.Second)
		g.expectLog("250ms capture-outbound a", "500ms capture-inbound a", "500ms guard a")
		g.expectState("a", dataplane.CaptureInForce, "")

		g.set("a", false)
		g.expectState("a", dataplane.CaptureReleasing, "no more tunnels")
		time.Sleep(10 * time.Second)
		g.expectLog("1s unguard a", "1s release-inbound a", "1s publish []", "1.25s release-outbound a", "3.25s remove a")
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestNothingHappensBeforeTheFirstSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(), func(c *Config) { c.Adopted = []Adopted{{UID: "a", Published: true}} })
		g.run()
		time.Sleep(time.Hour)
		g.expectLog()
		g.expectState("a", dataplane.CapturePending, "waiting for the state of the cluster")
		g.halt()
	})
}

func TestReleaseWaitsForLiveConnections(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.edit("a", func(p *fakePod) { p.live = 3 })
		g.set("a", false)
		time.Sleep(10 * time.Minute)
		g.expectState("a", dataplane.CaptureReleasing, "go on through the agent")
		g.fake.edit("a", func(p *fakePod) { p.live = 0 })
		time.Sleep(2 * time.Second)
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestReleaseWaitsNoLongerThanMaxDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), func(c *Config) { c.MaxDrain = time.Minute })
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.edit("a", func(p *fakePod) { p.live = 1 })
		g.set("a", false)
		time.Sleep(60 * time.Second)
		g.expectState("a", dataplane.CaptureReleasing, "go on through the agent")
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestReleaseOfAllPodsHasADrainOfItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), func(c *Config) { c.MaxDrain, c.MaxDrainAll = time.Hour, 10*time.Second })
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.halt()
		g.fake.edit("a", func(p *fakePod) { p.live = 1 })
		start := time.Now()
		g.fake.cfg.MaxDrain = 10 * time.Second
		if err := g.r.ReleaseAll(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took < 10*time.Second || took > 12*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestReenrolledWhileDrainingGoesForwardFromThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.set("a", false)
		time.Sleep(100 * time.Millisecond) // unpublished, outbound still on
		g.fake.forgetLog()
		g.set("a", true)
		time.Sleep(time.Second)
		g.expectLog("1.1s publish [a]", "1.35s capture-inbound a", "1.35s guard a")

		g.fake.edit("a", func(p *fakePod) { p.live = 1 })
		g.set("a", false)
		time.Sleep(time.Minute) // draining
		g.fake.forgetLog()
		g.set("a", true)
		g.expectState("a", dataplane.CapturePending, "")
		time.Sleep(time.Second)
		g.expectLog("1m2.1s publish [a]", "1m2.35s capture-outbound a", "1m2.6s capture-inbound a", "1m2.6s guard a")
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestDeletedPodIsRemovedWithoutPauses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.forgetLog()
		g.fake.edit("a", func(p *fakePod) { p.gone, p.live = true, 5 })
		delete(g.pods, "a")
		g.publish()
		g.expectLog("1s unguard a", "1s release-inbound a", "1s publish []", "1s release-outbound a", "1s remove a")
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestNamespaceThatVanishesReleasesItsPods(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.store.Publish(dataplane.NewSnapshot(dataplane.Contents{Workloads: []dataplane.Workload{workload("a")}}))
		g.expectState("a", dataplane.CaptureReleasing, "")
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestPodRecreatedInPlaceWaitsForTheOldOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("old")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		removing := make(chan struct{})
		g.fake.during(func(_ context.Context, call, uid string) error {
			if call == "remove" {
				<-removing
			}
			return nil
		})
		g.fake.edit("old", func(p *fakePod) { p.gone = true })
		delete(g.pods, "old")
		reborn := workload("new")
		reborn.NetNS = "/run/netns/old"
		g.pods["new"], g.on["new"] = reborn, true
		g.publish()
		g.expectState("new", dataplane.CapturePending, "still in use for pod old")
		close(removing)
		time.Sleep(time.Second)
		g.expectState("new", dataplane.CaptureInForce, "")
		g.expectState("old", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestTwoPodsNeverShareANamespace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		second := workload("b")
		second.NetNS = "/run/netns/a"
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		synctest.Wait()
		g.pods["b"], g.on["b"] = second, true
		g.publish()
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.expectState("b", dataplane.CapturePending, "still in use for pod a")
		g.halt()
	})
}

func TestAdoptedRemainsLeaveTheNamespaceFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const shared = "/run/netns/a"
		g := newRig(t, newCluster(workload("a")), func(c *Config) {
			c.Adopted = []Adopted{{UID: "a", NetNS: shared}, {UID: "dead", NetNS: shared}}
		})
		g.fake.pods["dead"] = &fakePod{netns: shared, prepared: true, outbound: true}
		g.fake.during(func(context.Context, string, string) error {
			time.Sleep(10 * time.Millisecond)
			return nil
		})
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.expectState("dead", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestPodInAnotherNamespaceIsPreparedAnewAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.forgetLog()
		g.fake.edit("a", func(p *fakePod) { p.moved, p.live = true, 1 })
		w := g.pods["a"]
		w.NetNS = "/run/netns/other"
		g.pods["a"] = w
		g.publish()
		g.expectLog("1s unguard a", "1s release-inbound a", "1s publish []", "1s release-outbound a", "1s remove a", "1s prepare a", "1s publish [a]")
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestPodWhoseNetworkNamespaceIsGoneIsPreparedAnew(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a"), workload("b")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.forgetLog()
		g.fake.edit("a", func(p *fakePod) { p.moved, p.live = true, 1 })
		g.r.Vanished("a")
		g.r.Vanished("nobody")
		g.expectLog("1s unguard a", "1s release-inbound a", "1s publish [b]", "1s release-outbound a", "1s remove a", "1s prepare a", "1s publish [a b]")
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.expectState("b", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestPodThatTurnsRoundDoesNotWaitForItsRetry(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "prepare" {
				return errors.New("no certificate")
			}
			return nil
		})
		g.publish()
		g.run()
		time.Sleep(time.Minute + 500*time.Millisecond) // the next attempt is seconds away
		g.fake.forgetLog()
		g.set("a", false)
		g.expectLog("1m0.5s remove a")
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestPodWithoutNamespaceFailsWithTheAnnotationsName(t *testing.T) {
	bubble(t, func(t *testing.T) {
		nameless := workload("a")
		nameless.NetNS = ""
		g := newRig(t, newCluster(nameless, workload("b")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureFailed, dataplane.NetNSAnnotation)
		g.expectState("b", dataplane.CaptureInForce, "")
		named := workload("a")
		g.pods["a"] = named
		g.publish()
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.pods["a"] = nameless
		g.publish()
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureFailed, dataplane.NetNSAnnotation)
		delete(g.pods, "a")
		g.publish()
		g.expectState("a", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestFailingStepIsRetriedWithGrowingDelay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		var failing atomic.Bool
		failing.Store(true)
		var attempts []time.Time
		g.fake.during(func(_ context.Context, call, uid string) error {
			if call != "capture-outbound" || !failing.Load() {
				return nil
			}
			attempts = append(attempts, time.Now())
			return errors.New("attach connect4: not permitted")
		})
		g.publish()
		g.run()
		time.Sleep(5 * time.Minute)
		g.expectState("a", dataplane.CaptureFailed, "capture outbound: attach connect4: not permitted")
		synctest.Wait()
		for i := 2; i < 8; i++ {
			before, after := attempts[i-1].Sub(attempts[i-2]), attempts[i].Sub(attempts[i-1])
			if after < before/2 || after > 4*before {
				t.Errorf("delay %d is %v after %v", i, after, before)
			}
		}
		last := len(attempts) - 1
		if d := attempts[last].Sub(attempts[last-1]); d < 15*time.Second || d > 30*time.Second {
			t.Errorf("the last delay is %v, want half to all of 30s", d)
		}
		failing.Store(false)
		time.Sleep(31 * time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestHangingPodDelaysNoOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a"), workload("b")), func(c *Config) { c.Concurrency = 1 })
		release := make(chan struct{})
		g.fake.during(func(_ context.Context, call, uid string) error {
			if call == "prepare" && uid == "a" {
				<-release // deaf to its context
			}
			return nil
		})
		g.publish()
		g.run()
		time.Sleep(17 * time.Second)
		g.expectState("a", dataplane.CaptureFailed, "prepare: has not returned within 15s")
		g.expectState("b", dataplane.CaptureInForce, "")
		close(release)
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestFailedPublicationIsRetried(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		var failing atomic.Bool
		failing.Store(true)
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "publish" && failing.Load() {
				return errors.New("disk full")
			}
			return nil
		})
		g.publish()
		g.run()
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureFailed, "publish the captured pods: disk full")
		failing.Store(false)
		time.Sleep(time.Minute)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
	})
}

func TestAdoptedPodsStayPublishedOrAreRemoved(t *testing.T) {
	bubble(t, func(t *testing.T) {
		unwanted := workload("b")
		g := newRig(t, newCluster(workload("a"), unwanted), func(c *Config) {
			c.Adopted = []Adopted{
				{UID: "a", NetNS: "/run/netns/a", Published: true},
				{UID: "b", NetNS: "/run/netns/b", Published: true},
				{UID: "dead", NetNS: "/run/netns/dead", Published: true},
			}
		})
		for _, a := range g.r.cfg.Adopted {
			g.fake.pods[a.UID] = &fakePod{netns: a.NetNS, prepared: true, outbound: true, inbound: true, guard: true}
			g.fake.published = append(g.fake.published, a.UID)
		}
		g.on["b"] = false
		g.publish()
		g.run()
		synctest.Wait()
		g.fake.sortLog()
		g.expectLog("0s capture-inbound a", "0s capture-outbound a", "0s guard a", "0s prepare a", "0s publish [a]", "0s remove b", "0s remove dead")
		g.expectState("a", dataplane.CaptureInForce, "")
		g.expectState("b", dataplane.CaptureNone, "")
		g.halt()
	})
}

func TestStopLeavesEverythingInForce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.forgetLog()
		g.halt()
		g.expectLog()
		g.expectState("a", dataplane.CaptureInForce, "")

		if err := g.r.ReleaseAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.expectLog("1s unguard a", "1s release-inbound a", "1s publish []", "1.25s release-outbound a", "3.25s remove a")
		g.expectState("a", dataplane.CaptureNone, "")

		g.run() // and it can be enrolled again
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		if err := g.r.ReleaseAll(t.Context()); !errors.Is(err, errDriving) {
			t.Errorf("ReleaseAll beside Run: %v", err)
		}
		g.halt()
	})
}

func TestReleaseAllNamesWhatIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.halt()
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call == "unguard" {
				return errors.New("busy")
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := g.r.ReleaseAll(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 are left (a)") {
			t.Errorf("ReleaseAll: %v", err)
		}
		g.expectState("a", dataplane.CaptureFailed, "unguard: busy")
	})
}

func TestConfigComplaintsAreJoined(t *testing.T) {
	_, err := New(Config{Settle: -1, Concurrency: -1})
	for _, want := range []string{"node", "store", "target", "settle", "concurrency"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New: %v, want it to name %s", err, want)
		}
	}
}

func TestCapturedIsTakenBackBeforeTheReleaseBegins(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.halt()
		g.set("a", false)
		snapshot, _ := g.store.Load()
		(&driver{Reconciler: g.r}).desire(snapshot, time.Now())
		g.expectState("a", dataplane.CaptureReleasing, "guard is about to be lifted")
	})
}
