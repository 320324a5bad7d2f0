package report

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// target is what the mesh wants to reach, as a ratio to another path of the same run, or as
// an amount.
type target struct {
	what             string
	workload, metric string
	path, than       string // scenarios; without the second the amount itself
	atLeast          bool   // or else at most
	want, aim        float64
}

func targets() []target {
	all := []target{
		{"across nodes, bulk, 1 stream", "bulk-1", "CPU total", "hbone-cross", "relay-tls", false, 0.93, 0.75},
		{"across nodes, bulk, 8 streams", "bulk-8", "throughput", "hbone-cross", "relay-tls", true, 1, 0},
		{"across nodes, new connections", "connect", "rate", "hbone-cross", "relay-plain", true, 1.4, 1.8},
		{"same node, bulk, 1 stream", "bulk-1", "throughput", "kernel-same", "plain-same", true, 0.95, 0},
		{"same node, bulk, 8 streams", "bulk-8", "throughput", "kernel-same", "plain-same", true, 0.95, 0},
		{"same node, 1 KiB, 1 connection", "exchange-1", "p50", "kernel-same", "plain-same", false, 1.05, 0},
		{"same node, 1 KiB, 32 connections", "exchange-32", "p50", "kernel-same", "plain-same", false, 1.05, 0},
		{"agent at rest", MemoryWorkload, "RSS at rest", "hbone-cross", "", false, 30, 0},
		{"idle connection, client's side", IdleWorkload, "RSS client", "hbone-cross", "", false, 6, 2.5},
		{"idle connection, server's side", IdleWorkload, "RSS server", "hbone-cross", "", false, 6, 2.5},
	}
	for _, load := range []struct{ what, workload string }{
		{"1 KiB, 1 connection", "exchange-1"}, {"1 KiB, 32 connections", "exchange-32"}, {"1 KiB, fixed rate", "paced"},
	} {
		all = append(all,
			target{"across nodes, " + load.what, load.workload, "p50", "hbone-cross", "relay-tls", false, 1, 0},
			target{"across nodes, " + load.what, load.workload, "p99", "hbone-cross", "haproxy", false, 1, 0})
	}
	return all
}

// Workloads that are of no load, but of memory first.
const (
	MemoryWorkload = "proxy memory"
	IdleWorkload   = "idle"
	FlowsWorkload  = "flows"
	PodsWorkload   = "pods"
)

// WriteTargets writes what was reached, for the targets whose both sides were measured.
func (r *Report) WriteTargets(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0) // its Flush tells of errors
	for _, t := range targets() {
		ratios, unit := r.ratios(t)
		if len(ratios) == 0 {
			continue
		}
		amount := short(median(ratios)) + " " + unit
		if t.than != "" {
			amount = fmt.Sprintf("%.2f × %s", median(ratios), t.than)
		}
		fmt.Fprintf(w, "%s\t%s %s\t(%s to %s)\t%s\n", //nolint:errcheck // see above
			t.what, amount, t.metric, short(slices.Min(ratios)), short(slices.Max(ratios)), t.verdict(median(ratios)))
	}
	return w.Flush()
}

// ratios are those of each round, whose two sides ran under like conditions.
func (r *Report) ratios(t target) (ratios []float64, unit string) {
	ours := r.Find(t.path, t.workload, t.metric)
	if ours == nil || t.than == "" {
		if ours == nil {
			return nil, ""
		}
		return ours.Rounds, ours.Unit
	}
	theirs := r.Find(t.than, t.workload, t.metric)
	if theirs == nil {
		return nil, ""
	}
	for i := range min(len(ours.Rounds), len(theirs.Rounds)) {
		if theirs.Rounds[i] != 0 {
			ratios = append(ratios, ours.Rounds[i]/theirs.Rounds[i])
		}
	}
	return ratios, ours.Unit
}

func (t target) verdict(got float64) string {
	sign, met := "≤", got <= t.want
	if t.atLeast {
		sign, met = "≥", got >= t.want
	}
	text := fmt.Sprintf("target %s %v", sign, t.want)
	if t.aim != 0 {
		text += fmt.Sprintf(", aim %v", t.aim)
	}
	if !met {
		text += ": missed"
	}
	return text
}
