package main

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newConnections(c *cli) *cobra.Command {
	return newList(c, listVerb[admin.Connection]{
		use: "connections", aliases: []string{"connection", "conns", "conn"},
		short: "List the live connections with their identities and bytes",
		long: `List the connections that go through the agent now.

A connection between two nodes is one row at each: outbound at the source's agent, inbound at
the destination's. SENT is what the source sent, RECEIVED what came back to it.`,
		example: `  raceway connections
  raceway connections -n shop -o wide
  watch raceway connections`,
		fetch:      func(ctx context.Context, a agent) ([]admin.Connection, error) { return a.Connections(ctx) },
		namespaces: connectionNamespaces,
		compare: func(a, b admin.Connection) int {
			return cmp.Or(a.Opened.Compare(b.Opened), cmp.Compare(a.ID, b.ID), cmp.Compare(a.Direction, b.Direction))
		},
		columns: []column[admin.Connection]{
			{name: "ID", wide: true, cell: func(n admin.Connection) cell { return plain(n.ID) }},
			{name: "DIRECTION", cell: func(n admin.Connection) cell { return plain(n.Direction) }},
			{name: "PROTOCOL", cell: func(n admin.Connection) cell { return protocolCell(n.Protocol) }},
			{name: "SOURCE", cell: func(n admin.Connection) cell { return plain(peerName(n.Source)) }},
			{name: "DESTINATION", cell: func(n admin.Connection) cell { return plain(peerPort(n.Destination)) }},
			{name: "SERVICE", cell: func(n admin.Connection) cell { return plain(serviceName(n.Service)) }},
			{name: "SENT", right: true, cell: func(n admin.Connection) cell { return plain(size(n.Sent)) }},
			{name: "RECEIVED", right: true, cell: func(n admin.Connection) cell { return plain(size(n.Received)) }},
			{name: "AGE", cell: func(n admin.Connection) cell { return plain(c.age(n.Opened)) }},
			{name: "RTT", wide: true, right: true, cell: func(n admin.Connection) cell { return plain(rtt(n.RTTMicros)) }},
			{name: "RETRANSMITS", wide: true, right: true, cell: func(n admin.Connection) cell { return plain(strconv.FormatUint(uint64(n.Retransmits), 10)) }},
			{name: "SOURCE IDENTITY", cell: func(n admin.Connection) cell { return plain(principal(n.Source.Identity)) }},
			{name: "DESTINATION IDENTITY", cell: func(n admin.Connection) cell { return plain(principal(n.Destination.Identity)) }},
			{name: "SOURCE ADDRESS", wide: true, cell: func(n admin.Connection) cell { return plain(addrPort(n.Source.Addr)) }},
			{name: "DESTINATION ADDRESS", wide: true, cell: func(n admin.Connection) cell { return plain(addrPort(n.Destination.Addr)) }},
			{name: "TUNNEL", wide: true, cell: func(n admin.Connection) cell { return plain(addrPort(n.Tunnel)) }},
			{name: "TRANSPORT", wide: true, cell: func(n admin.Connection) cell { return plain(n.Transport) }},
			{name: "POLICY", wide: true, cell: func(n admin.Connection) cell { return plain(n.Policy) }},
		},
	})
}

func connectionNamespaces(n admin.Connection) []string {
	return []string{n.Source.Namespace, n.Destination.Namespace}
}

// peerName is the workload, or the address of what is none.
func peerName(p admin.Peer) string {
	if p.Workload == "" {
		return addrPort(p.Addr)
	}
	if p.Namespace == "" {
		return p.Workload
	}
	return p.Namespace + "/" + p.Workload
}

// peerPort adds the port that is asked for.
func peerPort(p admin.Peer) string {
	if p.Workload == "" {
		return addrPort(p.Addr)
	}
	return fmt.Sprintf("%s:%d", peerName(p), p.Addr.Port())
}

// serviceName writes a service's host, db.shop.svc.cluster.local, as other names are
// written. A host of another form stays as it is.
func serviceName(host string) string {
	labels := strings.SplitN(host, ".", 4)
	if len(labels) < 3 || labels[2] != "svc" {
		return host
	}
	return labels[1] + "/" + labels[0]
}

func rtt(micros uint32) string {
	if micros == 0 {
		return ""
	}
	return (time.Duration(micros) * time.Microsecond).String()
}
