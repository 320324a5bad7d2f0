// Package e2e tests the real programs, raceway-agent and raceway-ca, on a cluster of network
// namespaces (package lab). Every test has a lab of its own:
//
//	pods of node1 ── node1 ── fabric ── node2 ── pods of node2
//	                             └── control (raceway-ca)
package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// binDir holds the programs under test. It is set once, before the tests run.
var binDir string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	// Where there is no compiler they were built before.
	if binDir = os.Getenv("RACEWAY_PROGRAMS"); binDir != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "raceway-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	if os.Geteuid() == 0 {
		if err := build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	binDir = dir
	return m.Run()
}

func build(dir string) error {
	return lab.Build(context.Background(), lab.BuildOptions{Dir: dir, Race: raceEnabled}, "raceway-agent", "raceway-ca", "raceway")
}

// cluster is a lab and what most tests need of it.
type cluster struct {
	*lab.Lab
	t *testing.T
}

// newCluster makes two nodes; what it leaves behind, or an agent that died by itself, fails
// the test.
func newCluster(t *testing.T, opts lab.Options) *cluster {
	t.Helper()
	netnstest.Require(t)
	opts.BinDir = binDir
	l, err := lab.New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{Lab: l, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			c.dumpLogs()
		}
		if err := l.Close(); err != nil {
			t.Error("close the lab:", err)
		}
		for _, left := range l.Leftovers() {
			t.Error("left behind:", left)
		}
	})
	return c
}

// logsEnv names a directory that keeps the whole logs of a failed test's agents.
const logsEnv = "RACEWAY_E2E_LOGS"

// dumpLogs shows the end of every agent's log, or keeps them whole if it is told where.
func (c *cluster) dumpLogs() {
	dir := os.Getenv(logsEnv)
	for _, n := range c.Nodes() {
		a := c.Agent(n)
		switch {
		case a == nil:
		case dir == "":
			c.t.Logf("%s: %s", n.Name, a.LogTail())
		default:
			if err := os.Rename(a.Log, filepath.Join(dir, c.Name()+"-"+filepath.Base(a.Log))); err != nil {
				c.t.Error("keep a log:", err)
			}
		}
	}
}

// start starts the CA and the agents.
func (c *cluster) start(args ...string) {
	c.t.Helper()
	if err := c.StartMesh(c.t.Context(), args...); err != nil {
		c.t.Fatal(err)
	}
}

// pod adds a pod of namespace "shop" whose service account and app label are its name.
func (c *cluster) pod(name string, node int) *lab.Pod {
	c.t.Helper()
	p, err := c.AddPod(lab.PodSpec{Namespace: "shop", Name: name, Node: node, ServiceAccount: name})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// label sets the mode of namespace "shop" and waits until it is in force for every pod.
func (c *cluster) label(mode string) {
	c.t.Helper()
	if err := c.LabelNamespace("shop", mode); err != nil {
		c.t.Fatal(err)
	}
	if mode == dataplane.ModeAmbient {
		c.await(dataplane.CaptureInForce)
		c.awaitProtocol(dataplane.ProtocolHBONE)
		return
	}
	c.awaitProtocol(dataplane.ProtocolTCP)
}

func (c *cluster) await(state dataplane.CaptureState) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer cancel()
	if err := c.WaitCapture(ctx, state, c.Pods()...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) awaitProtocol(protocol dataplane.Protocol) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer cancel()
	if err := c.WaitProtocol(ctx, protocol, c.Pods()...); err != nil {
		c.t.Fatal(err)
	}
}

// eachFamily runs a test on IPv4 and on IPv6.
func eachFamily(t *testing.T, test func(t *testing.T, opts lab.Options)) {
	for name, v6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) { test(t, lab.Options{IPv6: v6}) })
	}
}

// eachFamilyInFull is eachFamily for upgrades and flips of labels, which take long: with -short it is
// IPv6 alone, as e2e/kube has them on IPv4.
func eachFamilyInFull(t *testing.T, test func(t *testing.T, opts lab.Options)) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		if testing.Short() && !opts.IPv6 {
			t.Skip("with -short on IPv6 alone")
		}
		test(t, opts)
	})
}
