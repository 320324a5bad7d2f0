package main

import (
	"cmp"
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newWorkloads(c *cli) *cobra.Command {
	return newList(c, listVerb[admin.Workload]{
		use: "workloads", aliases: []string{"workload", "wl", "pods", "pod"},
		short: "List the pods, how each is reached, and how far its capture is",
		long: `List the pods that the agent knows.

PROTOCOL is how others reach the pod now: HBONE through a tunnel, TCP in clear. CAPTURE is
none, pending, captured, failed or releasing, and SINCE when; it is known of the pods of the
agent's own node, and - for enrolled pods of others (--agent all asks those agents, too). OLD
counts connections that are older than the capture and go on in clear, OLD UDP such sockets.`,
		example: `  raceway workloads
  raceway workloads -n shop -o wide
  raceway workloads --agent all -o json | jq '.[] | select(.capture == "failed")'`,
		fetch:      func(ctx context.Context, a agent) ([]admin.Workload, error) { return a.Workloads(ctx) },
		namespaces: func(w admin.Workload) []string { return []string{w.Namespace} },
		compare:    compareWorkloads,
		merge:      mergeWorkloads,
		columns: []column[admin.Workload]{
			{name: "NAMESPACE", cell: func(w admin.Workload) cell { return plain(w.Namespace) }},
			{name: "NAME", cell: func(w admin.Workload) cell { return plain(w.Name) }},
			{name: "NODE", cell: func(w admin.Workload) cell { return plain(w.Node) }},
			{name: "ADDRESS", cell: func(w admin.Workload) cell {
				if c.flags.output == formatWide {
					return plain(joinAddrs(w.Addrs))
				}
				return plain(first(w.Addrs))
			}},
			{name: "PROTOCOL", cell: func(w admin.Workload) cell { return protocolCell(w.Protocol) }},
			{name: "CAPTURE", cell: captureCell},
			{name: "SINCE", cell: func(w admin.Workload) cell { return plain(c.age(w.Since)) }},
			{name: "OLD", right: true, wide: true, cell: func(w admin.Workload) cell { return plain(strconv.Itoa(w.Bypassing)) }},
			{name: "OLD UDP", right: true, wide: true, cell: func(w admin.Workload) cell { return plain(strconv.Itoa(w.OlderUDP)) }},
			{name: "IDENTITY", wide: true, cell: func(w admin.Workload) cell { return plain(w.Identity.String()) }},
			{name: "REASON", cell: func(w admin.Workload) cell { return plain(w.Reason) }},
		},
	})
}

func compareWorkloads(a, b admin.Workload) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Node, b.Node))
}

// mergeWorkloads keeps, of the rows that several agents have of one pod, that of its own
// node, which alone knows its capture. Rows come sorted.
func mergeWorkloads(all []tagged[admin.Workload]) []admin.Workload {
	merged := []admin.Workload{}
	for _, t := range all {
		last := len(merged) - 1
		if last < 0 || compareWorkloads(merged[last], t.row) != 0 {
			merged = append(merged, t.row)
			continue
		}
		if merged[last].Capture == dataplane.CaptureNone && t.row.Capture != dataplane.CaptureNone {
			merged[last] = t.row
		}
	}
	return merged
}

func protocolCell(p dataplane.Protocol) cell {
	if p == dataplane.ProtocolHBONE || p == dataplane.ProtocolHBONEUDP {
		return cell{string(p), toneGood}
	}
	return plain(string(p))
}

func captureCell(w admin.Workload) cell {
	c := plain(w.Capture.String())
	switch w.Capture {
	case dataplane.CaptureInForce:
		c.tone = toneGood
	case dataplane.CaptureFailed:
		c.tone = toneBad
	case dataplane.CapturePending, dataplane.CaptureReleasing:
		c.tone = toneWarn
	case dataplane.CaptureNone:
		if w.Enrolled { // on another node, or about to be taken up
			c.text = "-"
		}
	}
	return c
}
