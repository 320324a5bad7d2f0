package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// otherVersion builds an agent whose maps have another layout.
var otherVersion = sync.OnceValues(func() (string, error) {
	layout, err := filepath.Abs("../bpf/include/maps.h")
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(layout)
	if err != nil {
		return "", err
	}
	changed := filepath.Join(binDir, "maps.h")
	if err := os.WriteFile(changed, append(text, "\n/* another version */\n"...), 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{layout: changed}})
	if err != nil {
		return "", err
	}
	file := filepath.Join(binDir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		return "", err
	}
	program := filepath.Join(binDir, "other-raceway-agent")
	args := []string{"build", "-overlay", file, "-o", program}
	if raceEnabled {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../cmd/raceway-agent")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build another version: %w\n%s", err, out)
	}
	return program, nil
})

// upgrade is two pods on two nodes under load, of which no connection may fail.
type upgrade struct {
	*cluster
	client, server *lab.Pod
	target         netip.AddrPort
	traffic        *load
	v1, v2         string // programs
}

// drainTimeout is how long an agent that was told to end lets its connections live.
const drainTimeout = 2 * time.Second

func newUpgrade(t *testing.T, opts lab.Options) *upgrade {
	u := prepareUpgrade(t, opts)
	u.start("--drain-timeout=" + drainTimeout.String())
	u.label(dataplane.ModeAmbient)
	u.traffic = startLoad(t, 4, u.client, u.target)
	return u
}

// prepareUpgrade starts no agent.
func prepareUpgrade(t *testing.T, opts lab.Options) *upgrade {
	c := newCluster(t, opts)
	v2, err := otherVersion()
	if err != nil {
		t.Fatal(err)
	}
	u := &upgrade{cluster: c, client: c.pod("web", 1), server: c.pod("db", 2), v1: filepath.Join(binDir, "raceway-agent"), v2: v2}
	u.target = u.server.AddrPort(3306)
	serve(t, u.server, u.target.Port(), echo)
	return u
}

// begin starts an agent beside the one of n, with args after its.
func (c *cluster) begin(n *lab.Node, program string, args ...string) (old, successor *lab.Agent) {
	c.t.Helper()
	old = c.Agent(n)
	successor, err := old.Succeed(program, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return old, successor
}

// hand has an agent of that program take n over, and returns the one before it.
func (c *cluster) hand(n *lab.Node, program string, args ...string) (old *lab.Agent) {
	c.t.Helper()
	old, successor := c.begin(n, program, args...)
	if err := successor.AwaitSuccession(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	return old
}

// replace is hand, and settle later the end of the one before it.
func (c *cluster) replace(n *lab.Node, program string, settle time.Duration, args ...string) {
	c.t.Helper()
	old := c.hand(n, program, args...)
	time.Sleep(settle)
	if err := old.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	if err := old.Wait(c.t.Context()); err != nil {
		c.t.Errorf("the old agent: %v", err)
	}
}

// served wants that connections are made, and that none has failed.
func (u *upgrade) served() {
	u.t.Helper()
	before := u.traffic.count.Load()
	eventually(u.t, "connections go on", func() error {
		if n := u.traffic.count.Load() - before; n < 40 {
			return fmt.Errorf("%d connections were made", n)
		}
		return nil
	})
}

// spared wants that no connection has failed since the load began.
func (u *upgrade) spared() {
	u.t.Helper()
	for _, err := range u.traffic.stop() {
		u.t.Error("a connection failed:", err)
	}
	u.t.Logf("%d connections were made", u.traffic.count.Load())
	for _, n := range u.Nodes() {
		checkAgent(u.t, u.Agent(n))
	}
}

// An upgrade and its rollback, node by node, to an agent of another layout and back: no new
// connection fails, and those that are open live on until their agent's drain ends.
func TestUpgradeRefusesNobody(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		u := newUpgrade(t, opts)
		for round, program := range []string{u.v2, u.v1, u.v1} {
			for _, n := range u.Nodes() {
				lasting := open(t, u.client, u.target)
				if err := lasting.use(); err != nil {
					t.Fatal(err)
				}
				old := u.hand(n, program)
				u.served()
				if err := lasting.use(); err != nil {
					t.Fatalf("round %d, %s: a connection of before the handover: %v", round, n.Name, err)
				}
				if round > 0 { // its peers are told to open no more streams
					time.Sleep(3 * time.Second / 2)
				}
				if err := lasting.use(); err != nil {
					t.Fatalf("round %d, %s: a connection of before, once the old agent accepts no more: %v", round, n.Name, err)
				}
				if !old.Running() {
					t.Errorf("round %d, %s: the old agent ended by itself", round, n.Name)
				}
				if err := old.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				told := time.Now()
				time.Sleep(drainTimeout / 4)
				if err := lasting.use(); err != nil {
					t.Errorf("round %d, %s: a connection of before the handover, while its agent drains: %v", round, n.Name, err)
				}
				_ = lasting.SetReadDeadline(time.Now().Add(10 * time.Second)) // an error shows next
				if _, err := lasting.Read(make([]byte, 1)); !isReset(err) || time.Since(told) < drainTimeout/2 {
					t.Errorf("round %d, %s: it ended with %v after %v, want a reset after the drain", round, n.Name, err, time.Since(told))
				}
				if err := old.Wait(t.Context()); err != nil {
					t.Errorf("the old agent: %v", err)
				}
			}
			u.served()
		}
		u.spared()
	})
}

// Pods that come and go while the node changes hands are captured and released by the agent
// that has it in the end.
func TestPodsChangeDuringAnUpgrade(t *testing.T) {
	u := newUpgrade(t, lab.Options{})
	n := u.Node(2)
	_, successor := u.begin(n, u.v2)
	late := u.pod("late", 2)
	if err := u.RemovePod(u.pod("gone", 2)); err != nil {
		t.Fatal(err)
	}
	serve(t, late, 3306, echo)
	if err := successor.AwaitSuccession(t.Context()); err != nil {
		t.Fatal(err)
	}
	u.await(dataplane.CaptureInForce)
	if err := ask(t.Context(), u.client, late.AddrPort(3306), nonce()); err != nil {
		t.Error(err)
	}
	u.spared()
}

// A successor that ends before its time, whenever that is, leaves the node to the old agent,
// or to one of its own kind that starts next.
func TestNodeIsTakenBackFromADeadSuccessor(t *testing.T) {
	u := newUpgrade(t, lab.Options{})
	n := u.Node(2)
	old := u.Agent(n)
	lasting := open(t, u.client, u.target)
	for _, after := range []time.Duration{50, 300, 500, 700, 900, 1200, 3000} {
		after *= time.Millisecond
		_, successor := u.begin(n, u.v2)
		time.Sleep(after)
		if err := successor.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := old.AwaitSuccession(t.Context()); err != nil {
			t.Fatalf("killed after %v: %v", after, err)
		}
		if err := lasting.use(); err != nil {
			t.Fatalf("killed after %v: a connection of before: %v", after, err)
		}
		u.served()
	}
	for _, err := range u.traffic.stop() {
		if !isReset(err) {
			t.Error("a connection failed otherwise than with a reset:", err)
		}
	}
	checkAgent(t, old)
	if err := ask(t.Context(), u.client, u.target, nonce()); err != nil {
		t.Error(err)
	}
}

// A successor that is told to end gives the node back, and nobody notices.
func TestNodeIsGivenBack(t *testing.T) {
	u := newUpgrade(t, lab.Options{})
	for _, n := range u.Nodes() {
		old := u.hand(n, u.v2)
		u.served()
		if err := u.Agent(n).Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := old.AwaitSuccession(t.Context()); err != nil {
			t.Fatal(err)
		}
		u.served()
	}
	u.spared()
}

// Without --takeover a second agent does what it always did: it ends and says why.
func TestSecondAgentIsRefused(t *testing.T) {
	c := newCluster(t, lab.Options{Nodes: 1})
	c.start("--takeover=false")
	_, successor := c.begin(c.Node(1), filepath.Join(binDir, "raceway-agent"))
	<-successor.Done()
	text, err := os.ReadFile(successor.Log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "a running agent has this socket") {
		t.Errorf("it does not say why it ended: %s", text)
	}
}
