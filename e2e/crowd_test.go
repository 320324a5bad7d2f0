package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/e2e/lab/labtest"
)

// crowd is how many pods share the node.
const crowd = 200

// 200 pods on one node are captured and released, and nothing of it is left.
func TestEnrol200Pods(t *testing.T) {
	node := newCrowd(t)
	idle, pins := node.usage(), node.Pins()
	took := node.enrol()
	full := node.usage()
	t.Logf("captured %d pods in %v; the agent has %d MiB and %d descriptors more", crowd, took, (full.RSS-idle.RSS)>>20, full.FDs-idle.FDs)
	if full.FDs < idle.FDs+crowd {
		t.Errorf("%d descriptors for %d pods: were they captured?", full.FDs-idle.FDs, crowd)
	}
	node.check()
	t.Logf("released them in %v", node.release())
	if now := node.Pins(); !slices.Equal(now, pins) {
		t.Errorf("%d pins before, %d after", len(pins), len(now))
	}
	if left := node.usage(); left.FDs > idle.FDs+crowd/10 {
		t.Errorf("the agent had %d descriptors before and has %d after", idle.FDs, left.FDs)
	}
}

// BenchmarkEnrol200Pods measures what 200 pods cost an agent.
func BenchmarkEnrol200Pods(b *testing.B) {
	node := newCrowd(b)
	idle := node.usage()
	var in, out time.Duration
	var full lab.Usage
	b.ResetTimer()
	for range b.N {
		in += node.enrol()
		full = node.usage()
		out += node.release()
	}
	b.StopTimer()
	perPod := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(b.N) / crowd }
	b.ReportMetric(perPod(in), "ms/enrol")
	b.ReportMetric(perPod(out), "ms/release")
	b.ReportMetric(float64(full.RSS-min(full.RSS, idle.RSS))/1024/crowd, "KiB/pod")
	b.ReportMetric(float64(full.FDs-idle.FDs)/crowd, "fds/pod")
}

// crowdedNode is one node with all those pods.
type crowdedNode struct {
	*lab.Lab
	t testing.TB
}

func newCrowd(t testing.TB) *crowdedNode {
	c := &crowdedNode{labtest.New(t, lab.Options{Nodes: 1, BinDir: binDir, Log: slog.New(slog.DiscardHandler)}), t}
	for i := range crowd {
		name := fmt.Sprintf("pod%d", i)
		if _, err := c.AddPod(lab.PodSpec{Namespace: "shop", Name: name, ServiceAccount: fmt.Sprintf("account%d", i%20)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.StartMesh(t.Context(), "--grace", "100ms"); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *crowdedNode) usage() lab.Usage {
	c.t.Helper()
	usage, err := c.Agent(c.Node(1)).Usage()
	if err != nil {
		c.t.Fatal(err)
	}
	return usage
}

// enrol and release return how long it took.
func (c *crowdedNode) enrol() time.Duration {
	return c.label(dataplane.ModeAmbient, dataplane.CaptureInForce)
}
func (c *crowdedNode) release() time.Duration { return c.label("", dataplane.CaptureNone) }

func (c *crowdedNode) label(mode string, state dataplane.CaptureState) time.Duration {
	c.t.Helper()
	started := time.Now()
	if err := c.LabelNamespace("shop", mode); err != nil {
		c.t.Fatal(err)
	}
	client := c.Agent(c.Node(1)).Client()
	defer client.Close()
	for {
		late, err := lateComers(c.t.Context(), client, state)
		if err == nil && len(late) == 0 {
			return time.Since(started)
		}
		if time.Since(started) > 3*patience {
			c.t.Fatalf("%d of %d pods are not %s, such as %+v; %v", len(late), crowd, state, late[:min(1, len(late))], err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// lateComers are the pods that are not in a state yet.
func lateComers(ctx context.Context, client *admin.Client, state dataplane.CaptureState) ([]admin.Workload, error) {
	workloads, err := client.Workloads(ctx)
	if err != nil {
		return nil, err
	}
	enrolled := state == dataplane.CaptureInForce
	return slices.DeleteFunc(workloads, func(w admin.Workload) bool { return w.Enrolled == enrolled && w.Capture == state }), nil
}

// check lets the agent look at every pod, with a synthetic connection each.
func (c *crowdedNode) check() {
	c.t.Helper()
	client := c.Agent(c.Node(1)).Client()
	defer client.Close()
	findings, err := client.Check(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	subjects := make(map[string]bool)
	for _, f := range findings {
		subjects[f.Subject] = true
		if !f.OK {
			c.t.Errorf("%s: %s: %s", f.Subject, f.Check, f.Detail)
		}
	}
	if len(subjects) < crowd {
		c.t.Errorf("only %d subjects were checked", len(subjects))
	}
}
