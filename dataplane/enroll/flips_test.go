package enroll

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// TestRandomFlipsKeepTheOrder flips, deletes, recreates and moves pods while calls fail and
// hang at random. The fake target checks the order at every call.
func TestRandomFlipsKeepTheOrder(t *testing.T) {
	const flips = 1000
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) { flipAtRandom(t, rand.New(rand.NewPCG(seed, 7)), flips) })
		})
	}
}

func flipAtRandom(t *testing.T, rng *rand.Rand, flips int) {
	c := newCluster()
	g := newRig(t, c, func(cfg *Config) { cfg.MaxDrain = 20 * time.Second; cfg.Concurrency = 3 })
	var failing atomic.Bool
	failing.Store(true)
	g.fake.chaos(rand.New(rand.NewPCG(rng.Uint64(), 1)), failing.Load)
	slots := make([]string, 8) // UID of the pod in each network namespace
	births := 0
	g.run()
	for range flips {
		slot := rng.IntN(len(slots))
		g.fake.mu.Lock()
		p := g.fake.podLocked(slots[slot])
		if p.live = rng.IntN(p.live + 1); p.outbound {
			p.live = rng.IntN(3)
		}
		switch uid := slots[slot]; {
		case uid == "" || rng.IntN(5) == 0: // a new pod in the same place
			p.gone = true
			delete(c.pods, uid)
			births++
			w := workload(fmt.Sprintf("p%d", births))
			w.NetNS = fmt.Sprintf("/run/netns/slot%d", slot)
			w.Starting = rng.IntN(2) == 0
			slots[slot], c.pods[w.UID], c.on[w.UID] = w.UID, w, true
		case rng.IntN(8) == 0: // its namespace is another
			p.moved = true
			w := c.pods[uid]
			w.NetNS += "x"
			c.pods[uid] = w
		case rng.IntN(8) == 0: // its addresses are others
			w := c.pods[uid]
			w.Addrs = []netip.Addr{w.Addrs[0].Next()}
			c.pods[uid] = w
		case c.pods[uid].Starting && rng.IntN(2) == 0: // something runs in it
			w := c.pods[uid]
			w.Starting = false
			c.pods[uid] = w
		default:
			c.on[uid] = !c.on[uid]
		}
		g.fake.mu.Unlock()
		c.publish()
		synctest.Wait() // a step that was taken as for a starting pod has begun
		g.fake.mu.Lock()
		for uid, w := range c.pods {
			if !w.Starting {
				g.fake.podLocked(uid).starting = false
			}
		}
		g.fake.mu.Unlock()
		time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
	}
	failing.Store(false)
	time.Sleep(10 * time.Minute)
	synctest.Wait()
	status := g.r.Status()
	for uid := range c.pods {
		if c.on[uid] {
			g.expectState(uid, dataplane.CaptureInForce, "")
			delete(status, uid)
		}
	}
	if len(status) > 0 {
		t.Errorf("left over: %v", status)
	}
	g.fake.mu.Lock()
	for uid, p := range g.fake.pods {
		if !c.on[uid] && (p.prepared || p.outbound || p.inbound || p.guard) {
			t.Errorf("%s is still in force: %+v", uid, *p)
		}
	}
	g.fake.mu.Unlock()
	g.halt()
}
