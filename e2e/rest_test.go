package e2e

import (
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

const (
	// restingMemory is what an agent may have resident when its pods say nothing.
	restingMemory = 30 << 20
	// restingCPU is what it may take of a core: its look at whether the capture is whole.
	restingCPU = 0.01
	// rest is how long an agent is given to settle, and how long it is looked at.
	rest = 25 * time.Second
)

// A node whose pods say nothing costs next to nothing.
func TestAgentAtRest(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector takes several times the memory")
	}
	s := newShop(t, lab.Options{})
	serve(t, s.db, portEcho, echo)
	idle := open(t, s.web, s.db.AddrPort(portEcho))
	if err := idle.use(); err != nil {
		t.Fatal(err)
	}
	var started [2]uint64
	for i := range started {
		started[i] = usage(t, s.Agent(s.Node(i+1))).RSS
	}
	time.Sleep(rest)
	for i := range started {
		agent := s.Agent(s.Node(i + 1))
		before := usage(t, agent)
		time.Sleep(rest / 2)
		now := usage(t, agent)
		cpu := float64(now.User+now.System-before.User-before.System) / float64(rest/2)
		t.Logf("agent of node%d: %.1f MiB resident (%.1f when it had started), %d threads, %.4f of a core, %.1f wakeups a second",
			i+1, float64(now.RSS)/(1<<20), float64(started[i])/(1<<20), now.Threads, cpu, float64(now.Wakeups-before.Wakeups)/(rest/2).Seconds())
		if now.RSS > restingMemory {
			t.Errorf("the agent of node%d has %d bytes resident, want at most %d", i+1, now.RSS, restingMemory)
		}
		if cpu > restingCPU {
			t.Errorf("the agent of node%d takes %.3f of a core, want at most %.3f", i+1, cpu, restingCPU)
		}
	}
	if err := idle.use(); err != nil {
		t.Error("the idle connection:", err)
	}
}

func usage(t *testing.T, agent *lab.Agent) lab.Usage {
	t.Helper()
	u, err := agent.Usage()
	if err != nil {
		t.Fatal(err)
	}
	return u
}
