package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newFlows(c *cli) *cobra.Command {
	follow := false
	cmd := &cobra.Command{
		Use: "flows", Aliases: []string{"flow"},
		Short: "Show connections as they open, move bytes, close, fail or are denied",
		Long: `Show the recent flow records of the agent, oldest first; with -f go on with new ones until
interrupted.

EVENT is open, update (every few seconds of a long connection), close, denied or failed; CAUSE
says why it closed, failed or was denied, and by which policy. In JSON each record is one line.`,
		Example: `  raceway flows
  raceway flows -f -n shop
  raceway flows -f -o json | jq 'select(.event == "denied")'`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agents, err := c.agents(cmd.Context())
			if err != nil {
				return err
			}
			p := newFlowPrinter(c, len(agents) > 1)
			if follow {
				return p.follow(cmd.Context(), agents)
			}
			return p.recent(cmd.Context(), agents)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new records until interrupted")
	return cmd
}

// flowPrinter writes records one by one, as they come.
type flowPrinter struct {
	c       *cli
	several bool
	columns []column[tagged[admin.Flow]]

	mu     sync.Mutex
	layout *layout
}

func newFlowPrinter(c *cli, several bool) *flowPrinter {
	columns := tagColumns(c.flowColumns())
	if !several {
		columns = columns[1:]
	}
	columns = visible(columns, c.flags.output == formatWide)
	return &flowPrinter{c: c, several: several, columns: columns, layout: newLayout(columns, c.color)}
}

func (c *cli) flowColumns() []column[admin.Flow] {
	return []column[admin.Flow]{
		{name: "TIME", width: 12, cell: func(f admin.Flow) cell { return plain(c.timeOfDay(f.Time)) }},
		{name: "EVENT", width: 6, cell: eventCell},
		{name: "ID", wide: true, cell: func(f admin.Flow) cell { return plain(f.ID) }},
		{name: "DIRECTION", wide: true, cell: func(f admin.Flow) cell { return plain(f.Direction) }},
		{name: "PROTOCOL", cell: func(f admin.Flow) cell { return protocolCell(f.Protocol) }},
		{name: "SOURCE", width: 24, cell: func(f admin.Flow) cell { return plain(peerName(f.Source)) }},
		{name: "DESTINATION", width: 24, cell: func(f admin.Flow) cell { return plain(peerPort(f.Destination)) }},
		{name: "SENT", width: 7, right: true, cell: func(f admin.Flow) cell { return plain(size(f.Sent)) }},
		{name: "RECEIVED", right: true, cell: func(f admin.Flow) cell { return plain(size(f.Received)) }},
		{name: "DURATION", right: true, cell: func(f admin.Flow) cell { return plain(flowDuration(f.Duration)) }},
		{name: "RTT", wide: true, right: true, cell: func(f admin.Flow) cell { return plain(rtt(f.RTTMicros)) }},
		{name: "RETRANSMITS", wide: true, right: true, cell: func(f admin.Flow) cell { return plain(strconv.FormatUint(uint64(f.Retransmits), 10)) }},
		{name: "FLAGS", cell: func(f admin.Flow) cell { return plain(f.Flags) }},
		{name: "POLICY", wide: true, cell: func(f admin.Flow) cell { return plain(f.Policy) }},
		{name: "CAUSE", cell: func(f admin.Flow) cell { return plain(f.Cause) }},
	}
}

func (c *cli) timeOfDay(t time.Time) string {
	if c.flags.output == formatWide {
		return t.In(c.zone).Format("2006-01-02T15:04:05.000Z07:00")
	}
	return t.In(c.zone).Format("15:04:05.000")
}

// flowDuration keeps three digits or so.
func flowDuration(d time.Duration) string {
	switch {
	case d == 0:
		return ""
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

func eventCell(f admin.Flow) cell {
	c := plain(string(f.Event))
	switch f.Event {
	case admin.FlowDenied, admin.FlowFailed:
		c.tone = toneBad
	case admin.FlowOpen:
		c.tone = toneGood
	case admin.FlowUpdate, admin.FlowClose, admin.FlowLost:
	}
	return c
}

func (p *flowPrinter) wanted(f admin.Flow) bool {
	n := p.c.flags.namespace
	return n == "" || slices.Contains(connectionNamespaces(f.Connection), n)
}

// recent prints what the agents remember, in the order of time.
func (p *flowPrinter) recent(ctx context.Context, agents []agent) error {
	all, err := rows(ask(ctx, agents, func(ctx context.Context, a agent) ([]admin.Flow, error) {
		var flows []admin.Flow
		err := a.Flows(ctx, false, func(f admin.Flow) error {
			flows = append(flows, f)
			return nil
		})
		return flows, err
	}))
	slices.SortStableFunc(all, func(a, b tagged[admin.Flow]) int {
		return cmp.Or(a.row.Time.Compare(b.row.Time), cmp.Compare(a.agent, b.agent))
	})
	all = slices.DeleteFunc(all, func(t tagged[admin.Flow]) bool { return !p.wanted(t.row) })
	p.layout.fit(header(p.columns))
	for _, t := range all {
		p.layout.fit(cells(p.columns, t))
	}
	if err := p.start(); err != nil {
		return err
	}
	for _, t := range all {
		if err := p.print(t); err != nil {
			return err
		}
	}
	return err
}

// follow prints until interrupted; an agent that ends its stream leaves the others going.
func (p *flowPrinter) follow(ctx context.Context, agents []agent) error {
	for i, col := range p.columns {
		p.layout.widths[i] = col.width
	}
	if err := p.start(); err != nil {
		return err
	}
	answers := ask(ctx, agents, func(ctx context.Context, a agent) (struct{}, error) {
		err := a.Flows(ctx, true, func(f admin.Flow) error {
			if !p.wanted(f) {
				return nil
			}
			return p.print(tagged[admin.Flow]{agent: a.name, row: f})
		})
		if err != nil && p.several {
			p.warn(a, err)
		}
		return struct{}{}, err
	})
	if !p.several {
		return answers[0].err
	}
	ended := slices.DeleteFunc(answers, func(a answer[struct{}]) bool { return a.err == nil })
	if len(ended) > 0 {
		return fmt.Errorf("%d of %d agents ended their stream before the end", len(ended), len(agents))
	}
	return nil
}

// warn says at once that an agent is out, as the others go on.
func (p *flowPrinter) warn(a agent, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = fmt.Fprintf(p.c.errOut, "raceway: agent %s: %v\n", a.name, err) // nowhere left to report to
}

// start writes the header.
func (p *flowPrinter) start() error {
	if p.c.flags.noHeaders || p.c.flags.output.forPrograms() {
		return nil
	}
	line := header(p.columns)
	p.layout.fit(line)
	return p.layout.write(p.c.out, line)
}

func (p *flowPrinter) print(t tagged[admin.Flow]) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.c.flags.output.forPrograms() {
		if p.several {
			return p.c.writeRecord(t)
		}
		return p.c.writeRecord(t.row)
	}
	line := cells(p.columns, t)
	p.layout.fit(line)
	return p.layout.write(p.c.out, line)
}
