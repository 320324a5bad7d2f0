package main

import (
	"cmp"
	"context"

	"github.com/spf13/cobra"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

func newCertificates(c *cli) *cobra.Command {
	return newList(c, listVerb[admin.Certificate]{
		use: "certificates", aliases: []string{"certificate", "certs", "cert"},
		short: "List the agent's certificates and when they end",
		long: `List the certificates that the agent holds, one for each identity of its node's pods.

STATE is valid, expired, pending or failed. EXPIRES and REFRESH say in how long. ERROR is the
last failure to get or refresh it; a valid certificate stays in use while that is repeated.`,
		example: `  raceway certificates
  raceway certificates --agent all -o wide`,
		fetch:      func(ctx context.Context, a agent) ([]admin.Certificate, error) { return a.Certificates(ctx) },
		namespaces: func(k admin.Certificate) []string { return []string{k.Identity.Namespace} },
		compare: func(a, b admin.Certificate) int {
			return cmp.Or(cmp.Compare(a.Identity.String(), b.Identity.String()), cmp.Compare(a.Serial, b.Serial))
		},
		columns: []column[admin.Certificate]{
			{name: "IDENTITY", cell: func(k admin.Certificate) cell { return plain(k.Identity.String()) }},
			{name: "STATE", cell: stateCell},
			{name: "AGE", cell: func(k admin.Certificate) cell { return plain(c.age(k.NotBefore)) }},
			{name: "EXPIRES", cell: func(k admin.Certificate) cell { return plain(c.until(k.NotAfter)) }},
			{name: "REFRESH", cell: func(k admin.Certificate) cell { return plain(c.until(k.RefreshAt)) }},
			{name: "SERIAL", wide: true, cell: func(k admin.Certificate) cell { return plain(k.Serial) }},
			{name: "ERROR", cell: func(k admin.Certificate) cell { return cell{k.Error, toneBad} }},
		},
	})
}

func stateCell(k admin.Certificate) cell {
	switch k.State {
	case "valid":
		return cell{k.State, toneGood}
	case "pending":
		return cell{k.State, toneWarn}
	}
	return cell{k.State, toneBad}
}
