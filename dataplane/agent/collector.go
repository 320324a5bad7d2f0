package agent

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"
)

// What an agent holds is a few megabytes, so that Go's collector, which by itself runs each
// time that the heap has doubled, would run several times a second while connections come and
// go, and each of its cycles takes CPU time from what is on its way. So a busy agent has a
// heap that is roomier than that, and one at rest has not.
const (
	// roomyHeap is what a busy agent's heap may come to between two cycles.
	roomyHeap = 32 << 20
	// busyCycle and restingCycle are the times between two cycles that tell which of the two
	// an agent is; in between it stays what it was. To look after 200 pods that say nothing
	// makes half a megabyte a second. The runtime itself makes a cycle every two minutes.
	busyCycle, restingCycle = 5 * time.Second, 20 * time.Second
	// frugal is Go's own pace.
	frugal = 100
)

// collector adapts the pace of Go's garbage collector to what the agent does.
type collector struct {
	paced  bool // by us; else by GOGC
	before int  // GOGC as it was
	cycles chan struct{}
	last   time.Time // when a cycle ended
	pace   collectorPace

	counted   uint64 // cycles, when quiet was asked
	countedAt time.Time
}

func newCollector(paced bool) *collector {
	c := &collector{paced: paced, cycles: make(chan struct{}, 1), pace: collectorPace{percent: frugal}}
	if paced {
		c.before = debug.SetGCPercent(frugal)
	}
	return c
}

func (c *collector) restore() {
	if c.paced {
		debug.SetGCPercent(c.before)
	}
}

// watch has cycles told of until ctx ends.
func (c *collector) watch(ctx context.Context) {
	c.last = time.Now()
	if c.paced {
		watchCycles(ctx, c.cycles)
	}
}

// cycled adapts the pace, and returns a time at which the agent rests unless another cycle ended
// before; nil when it did already. The runtime would leave the garbage of a burst for two minutes.
func (c *collector) cycled(now time.Time) (calm <-chan time.Time) {
	after := now.Sub(c.last)
	changed := c.pace.cycle(after, liveHeap())
	c.last = now
	switch {
	case !changed:
	case c.pace.percent == frugal:
		c.rest()
	default:
		debug.SetGCPercent(c.pace.percent)
	}
	if after >= restingCycle {
		return nil
	}
	return time.After(restingCycle)
}

// quiet reports whether no cycle ended for a while.
func (c *collector) quiet(now time.Time) bool {
	cycles := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(cycles)
	n := cycles[0].Value.Uint64()
	if n != c.counted {
		c.counted, c.countedAt = n, now
	}
	return now.Sub(c.countedAt) >= busyCycle
}

// rest gives back what the heap does not use.
func (c *collector) rest() {
	c.pace.percent = frugal
	if c.paced {
		debug.SetGCPercent(frugal)
	}
	debug.FreeOSMemory()
	c.last = time.Time{} // it made a cycle, which tells nothing
}

// collectorPace is by how many percent the heap grows until it is collected.
type collectorPace struct{ percent int }

// cycle takes in that one ended so long after the one before, with that much in use, and
// reports whether the pace is another now.
func (p *collectorPace) cycle(after time.Duration, live uint64) (changed bool) {
	before := p.percent
	switch {
	case after >= restingCycle:
		p.percent = frugal
	case after <= busyCycle || before != frugal:
		p.percent = max(frugal, int(100*(roomyHeap-min(roomyHeap, live))/max(1, live)))
	}
	return p.percent != before
}

func liveHeap() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// watchCycles tells of each cycle's end, until ctx ends. The runtime tells nobody but the
// finalizers of what nobody uses.
func watchCycles(ctx context.Context, told chan<- struct{}) {
	type unused struct{ told chan<- struct{} }
	var ended func(u *unused)
	ended = func(u *unused) {
		if ctx.Err() != nil {
			return
		}
		select {
		case u.told <- struct{}{}:
		default:
		}
		runtime.SetFinalizer(u, ended)
	}
	runtime.SetFinalizer(&unused{told}, ended)
}

// boundMemory has the collector work harder before the agent comes to the end of what its
// cgroup may have, as it would be killed there. A tenth and 16 MiB are for what Go does not
// count.
func (a *Agent) boundMemory(context.Context) error {
	if !a.cfg.BoundMemory {
		return nil
	}
	limit, bounded := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup")
	if !bounded {
		return nil
	}
	const uncounted = 16 << 20
	soft := max(limit/10*9-uncounted, limit/2)
	a.cfg.Log.Info("memory is bounded", "cgroup", limit, "heap and stacks", soft)
	debug.SetMemoryLimit(soft)
	return nil
}

// cgroupMemory is the least bound on the memory of the process's cgroup and those above it,
// as far as they can be seen.
func cgroupMemory(self, root string) (limit int64, bounded bool) {
	content, err := os.ReadFile(self)
	if err != nil {
		return 0, false
	}
	limit = math.MaxInt64
	for line := range strings.Lines(string(content)) {
		path, unified := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !unified {
			continue
		}
		for ; ; path = filepath.Dir(path) {
			text, err := os.ReadFile(filepath.Join(root, path, "memory.max"))
			if n, bad := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && bad == nil {
				limit, bounded = min(limit, n), true
			}
			if path == "/" || path == "." {
				break
			}
		}
	}
	return limit, bounded
}
