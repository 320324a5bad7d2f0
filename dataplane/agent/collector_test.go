package agent

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

func TestBusyAgentsCollectSeldom(t *testing.T) {
	p := collectorPace{percent: frugal}
	for i, step := range []struct {
		after   time.Duration
		live    uint64
		percent int
		why     string
	}{
		{10 * time.Second, 4 << 20, frugal, "it is neither, and stays"},
		{time.Second, 4 << 20, 700, "it is busy: 4 MiB grow to 32"},
		{10 * time.Second, 8 << 20, 300, "it is still, and has more"},
		{time.Second, 40 << 20, frugal, "there is no room that it does not have anyway"},
		{time.Second, 400 << 20, frugal, "nor here"},
		{time.Second, 0, 100 * roomyHeap, "nothing at all"},
		{2 * time.Minute, 4 << 20, frugal, "it rests"},
	} {
		before := p.percent
		if changed := p.cycle(step.after, step.live); changed != (before != step.percent) || p.percent != step.percent {
			t.Errorf("%d: %d %%, %v, want %d: %s", i, p.percent, changed, step.percent, step.why)
		}
	}
}

func TestAnAgentRestsOnceAfterItWasBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCollector(false)
		c.last = time.Now()
		time.Sleep(time.Second)
		calm := c.cycled(time.Now())
		if calm == nil {
			t.Fatal("nobody will look whether it is still busy")
		}
		since := time.Now()
		if at := <-calm; at.Sub(since) != restingCycle {
			t.Errorf("it rests after %v, want %v", at.Sub(since), restingCycle)
		}
		c.rest()
		if c.cycled(time.Now()) != nil { // rest's own
			t.Error("a resting agent is woken again")
		}
		time.Sleep(2 * time.Minute)
		if c.cycled(time.Now()) != nil { // the runtime's
			t.Error("an idle agent is woken by the runtime's cycles")
		}
	})
}

func TestCyclesAreToldOf(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cycles := make(chan struct{}, 1)
	watchCycles(ctx, cycles)
	for range 3 {
		runtime.GC()
		select {
		case <-cycles:
		case <-time.After(10 * time.Second):
			t.Fatal("a cycle ended and nobody was told")
		}
	}
}

func TestCgroupsBoundMemory(t *testing.T) {
	root := t.TempDir()
	write := func(path, content string) string {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("pods/memory.max", "1000\n")
	write("pods/agent/memory.max", "max\n")
	for _, test := range []struct {
		self    string
		limit   int64
		bounded bool
	}{
		{"0::/pods/agent\n", 1000, true},
		{"4:memory:/x\n0::/pods\n", 1000, true},
		{"0::/\n", 0, false},
		{"4:memory:/pods\n", 0, false},
	} {
		limit, bounded := cgroupMemory(write("self", test.self), root)
		if bounded != test.bounded || bounded && limit != test.limit {
			t.Errorf("%q: %d, %v", test.self, limit, bounded)
		}
	}
}
