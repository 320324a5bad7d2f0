package enroll

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestBrokenPodIsPreparedAnewAndKeepsItsCapture(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a"), workload("b")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.forgetLog()
		attempts := 0
		g.fake.during(func(_ context.Context, call, _ string) error {
			if call != "prepare" {
				return nil
			}
			if attempts++; attempts == 1 {
				return errors.New("the port is taken")
			}
			return nil
		})
		g.r.Broken("a", errors.New("its tunnel listener was destroyed"))
		g.r.Broken("nobody", errors.New("whatever"))
		g.expectState("a", dataplane.CaptureFailed, "the port is taken")
		g.expectState("b", dataplane.CaptureInForce, "")
		time.Sleep(time.Second)
		g.expectState("a", dataplane.CaptureInForce, "")
		g.fake.mu.Lock()
		log := g.fake.log
		g.fake.mu.Unlock()
		if len(log) != 2 || slices.ContainsFunc(log, func(call string) bool { return !strings.HasSuffix(call, "prepare a") }) {
			t.Errorf("calls %q, want two of prepare", log)
		}
		g.halt()
	})
}

func TestBrokenPodOnItsWayOutIsLeftAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, newCluster(workload("a")), nil)
		g.publish()
		g.run()
		time.Sleep(time.Second)
		g.fake.edit("a", func(p *fakePod) { p.live = 1 })
		g.set("a", false)
		time.Sleep(10 * time.Second)
		g.fake.forgetLog()
		g.r.Broken("a", errors.New("its tunnel listener was destroyed"))
		g.expectLog()
		g.expectState("a", dataplane.CaptureReleasing, "earlier ones go on")
		g.fake.edit("a", func(p *fakePod) { p.live = 0 })
		time.Sleep(10 * time.Second)
		g.halt()
	})
}
