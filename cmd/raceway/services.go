package main

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newServices(c *cli) *cobra.Command {
	return newList(c, listVerb[admin.Service]{
		use: "services", aliases: []string{"service", "svc"},
		short: "List the services and what is behind them",
		long: `List the services that the agent knows.

READY is how many of a service's endpoints are ready, CAPTURED how many are reached through
a tunnel.`,
		example: `  raceway services
  raceway services -n shop -o yaml`,
		fetch:      func(ctx context.Context, a agent) ([]admin.Service, error) { return a.Services(ctx) },
		namespaces: func(s admin.Service) []string { return []string{s.Namespace} },
		compare:    compareServices,
		merge:      mergeServices,
		columns: []column[admin.Service]{
			{name: "NAMESPACE", cell: func(s admin.Service) cell { return plain(s.Namespace) }},
			{name: "NAME", cell: func(s admin.Service) cell { return plain(s.Name) }},
			{name: "ADDRESS", cell: func(s admin.Service) cell {
				switch {
				case len(s.Addrs) == 0:
					return plain("headless")
				case c.flags.output == formatWide:
					return plain(joinAddrs(s.Addrs))
				}
				return plain(first(s.Addrs))
			}},
			{name: "PORTS", cell: func(s admin.Service) cell { return plain(joinPorts(s.Ports)) }},
			{name: "READY", cell: func(s admin.Service) cell { return readyCell(s) }},
			{name: "CAPTURED", cell: func(s admin.Service) cell { return plain(fmt.Sprintf("%d/%d", s.Captured, s.Endpoints)) }},
		},
	})
}

func compareServices(a, b admin.Service) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// mergeServices keeps one row of each service: agents see the same cluster.
func mergeServices(all []tagged[admin.Service]) []admin.Service {
	merged := []admin.Service{}
	for _, t := range all {
		if last := len(merged) - 1; last < 0 || compareServices(merged[last], t.row) != 0 {
			merged = append(merged, t.row)
		}
	}
	return merged
}

func readyCell(s admin.Service) cell {
	c := plain(fmt.Sprintf("%d/%d", s.Ready, s.Endpoints))
	if s.Ready == 0 {
		c.tone = toneBad
	}
	return c
}

func joinPorts(ports []uint16) string {
	texts := make([]string, len(ports))
	for i, p := range ports {
		texts[i] = strconv.Itoa(int(p))
	}
	return strings.Join(texts, ",")
}
