package perf

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf/report"
)

const (
	// crowd is the namespace of pods that do nothing but be in the mesh.
	crowd = "crowd"
	// capturedPoll is between two looks at how many are captured.
	capturedPoll = 20 * time.Millisecond
)

// pods measures what pods that are in the mesh and say nothing cost the agent of their node, and
// how fast all of them get in when their namespace is labelled. Each has an identity of its own,
// so that each needs a certificate.
func (st *site) pods(ctx context.Context, found *report.Report) error {
	n := st.config.Pods
	for i := range n {
		if _, err := st.lab.AddPod(lab.PodSpec{
			Namespace: crowd, Name: fmt.Sprintf("pod-%d", i), ServiceAccount: fmt.Sprintf("account-%d", i), Node: 1,
		}); err != nil {
			return err
		}
	}
	if err := st.settle(ctx); err != nil {
		return err
	}
	before, err := st.held(ctx)
	if err != nil {
		return err
	}
	cpu, err := st.usage()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := st.lab.LabelNamespace(crowd, dataplane.ModeAmbient); err != nil {
		return err
	}
	if err := st.awaitCrowd(ctx); err != nil {
		return err
	}
	took := time.Since(start)
	spent, err := st.usage()
	if err != nil {
		return err
	}
	if err := st.settle(ctx); err != nil {
		return err
	}
	after, err := st.held(ctx)
	if err != nil {
		return err
	}
	add := func(metric, unit string, value float64) {
		found.Add(st.scenario.Name, report.PodsWorkload, metric, unit, value)
	}
	each := func(after, before uint64) float64 { return (float64(after) - float64(before)) / float64(n) / 1000 }
	own, was := after["client"], before["client"]
	add("pods", "captured", float64(n))
	add("rate", "1/s", float64(n)/took.Seconds())
	add("CPU proxies", "µs each", micros(spent.minus(cpu).Proxies)/float64(n))
	add("RSS", "kB each", each(own.rss, was.rss))
	add("Go memory", "kB each", each(own.heap, was.heap))
	return nil
}

// awaitCrowd waits until the capture of all of them is in force.
func (st *site) awaitCrowd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	agent := st.lab.Agent(st.lab.Node(1)).Client()
	defer agent.Close()
	for {
		workloads, err := agent.Workloads(ctx)
		if err != nil {
			return err
		}
		late := slices.DeleteFunc(workloads, func(w admin.Workload) bool {
			return w.Namespace != crowd || w.Capture == dataplane.CaptureInForce
		})
		if len(late) == 0 {
			return nil
		}
		select {
		case <-time.After(capturedPoll):
		case <-ctx.Done():
			return fmt.Errorf("wait for %d pods to be captured: %d are not, %s is %s (%s): %w",
				st.config.Pods, len(late), late[0].Name, late[0].Capture, late[0].Reason, ctx.Err())
		}
	}
}
