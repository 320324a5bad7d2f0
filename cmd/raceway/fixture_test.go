package main

import (
	"net/netip"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/admin/admintest"
	"github.com/raceway-mesh/raceway/dataplane/explain"
)

// The cluster that the agents of these tests speak of: web and a batch job on n1, a
// database on n2, and a namespace that is not enrolled.

func addrs(texts ...string) []netip.Addr {
	list := make([]netip.Addr, len(texts))
	for i, a := range texts {
		list[i] = netip.MustParseAddr(a)
	}
	return list
}

func identity(ns, account string) spiffe.ID {
	return spiffe.ID{TrustDomain: "cluster.local", Namespace: ns, ServiceAccount: account}
}

func ago(d time.Duration) time.Time { return now.Add(-d) }

func workloadRows(node string) []admin.Workload {
	rows := []admin.Workload{
		{Namespace: "shop", Name: "web-7d4b9c", Node: "n1", Addrs: addrs("10.1.1.2", "fd00:1::2"), Identity: identity("shop", "web"), Protocol: dataplane.ProtocolHBONE, Enrolled: true, Capture: dataplane.CaptureInForce, Since: ago(5 * time.Minute), Bypassing: 2},
		{Namespace: "shop", Name: "batch", Node: "n1", Addrs: addrs("10.1.1.3"), Identity: identity("shop", "batch"), Protocol: dataplane.ProtocolTCP, Enrolled: true, Capture: dataplane.CaptureFailed, Since: ago(42 * time.Second), Reason: "attach guard: no such device: the pod's veth is gone"},
		{Namespace: "shop", Name: "db-0", Node: "n2", Addrs: addrs("10.1.2.3", "fd00:2::3"), Identity: identity("shop", "db"), Protocol: dataplane.ProtocolHBONE, Enrolled: true, Capture: dataplane.CaptureInForce, Since: ago(26 * time.Hour)},
		{Namespace: "legacy", Name: "old", Node: "n1", Addrs: addrs("10.1.1.4"), Identity: identity("legacy", "default"), Protocol: dataplane.ProtocolTCP},
	}
	for i := range rows {
		if rows[i].Node != node { // an agent knows the capture of its own pods alone
			rows[i].Capture, rows[i].Since, rows[i].Reason, rows[i].Bypassing = dataplane.CaptureNone, time.Time{}, "", 0
		}
	}
	return rows
}

func serviceRows() []admin.Service {
	return []admin.Service{
		{Namespace: "shop", Name: "db", Addrs: addrs("10.96.0.10", "fd00:96::a"), Ports: []uint16{3306}, Endpoints: 1, Ready: 1, Captured: 1},
		{Namespace: "shop", Name: "cache", Ports: []uint16{6379, 16379}, Endpoints: 3, Ready: 2},
		{Namespace: "legacy", Name: "mail", Addrs: addrs("10.96.0.12"), Ports: []uint16{25}},
	}
}

func policyRows(pods int, allowed, denied uint64) []admin.Policy {
	return []admin.Policy{
		{Kind: "PeerAuthentication", Namespace: "shop", Name: "default", Action: "STRICT", Workloads: pods, Denied: denied / 2},
		{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "allow-web", Action: "ALLOW", Workloads: pods, Allowed: allowed},
		{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "deny-batch", Action: "DENY", DryRun: true, Workloads: pods, Denied: denied},
		{Kind: "AuthorizationPolicy", Namespace: "istio-system", Name: "deny-admin", Action: "DENY", Workloads: pods, Issues: []string{"rule 0: paths cannot be seen at L4: the rule denies every path"}},
	}
}

func certificateRows() []admin.Certificate {
	return []admin.Certificate{
		{Identity: identity("shop", "web"), State: "valid", Serial: "7be0c1", NotBefore: ago(5 * time.Minute), NotAfter: now.Add(24*time.Hour - 5*time.Minute), RefreshAt: now.Add(12 * time.Hour)},
		{Identity: identity("shop", "batch"), State: "expired", Serial: "01aa9f", NotBefore: ago(30 * time.Hour), NotAfter: ago(6 * time.Hour), RefreshAt: now.Add(30 * time.Second), Error: "sign: the CA at 127.0.0.1:15012 refused the connection: is raceway-ca running?"},
		{Identity: identity("legacy", "default"), State: "pending"},
	}
}

func peer(addr, ns, name, account string) admin.Peer {
	p := admin.Peer{Addr: netip.MustParseAddrPort(addr), Namespace: ns, Workload: name}
	if account != "" {
		p.Identity = identity(ns, account)
	}
	return p
}

func connectionRows() []admin.Connection {
	web := peer("10.1.1.2:41712", "shop", "web-7d4b9c", "web")
	return []admin.Connection{
		{ID: "n1-2", Direction: "outbound", Protocol: dataplane.ProtocolTCP, Source: web, Destination: peer("93.184.216.34:443", "", "", ""), Opened: ago(3 * time.Second), Sent: 517, Received: 4821},
		{ID: "n1-1", Direction: "outbound", Protocol: dataplane.ProtocolHBONE, Source: web, Destination: peer("10.1.2.3:3306", "shop", "db-0", "db"), Service: "db.shop.svc.cluster.local", Tunnel: netip.MustParseAddrPort("10.1.2.3:15008"), Opened: ago(90 * time.Second), Sent: 12_345_678, Received: 1_288_490_189, RTTMicros: 412, Retransmits: 1},
		{ID: "n1-3", Direction: "inbound", Protocol: dataplane.ProtocolTCP, Source: peer("10.1.1.4:50000", "legacy", "old", ""), Destination: peer("10.1.1.2:8080", "shop", "web-7d4b9c", "web"), Opened: ago(3 * time.Second), Policy: "shop/allow-web rule 0"},
	}
}

func flowRows() []admin.Flow {
	c := connectionRows()
	denied := c[2]
	denied.Sent, denied.Received, denied.Policy = 0, 0, "shop/deny-old rule 0"
	return []admin.Flow{
		{Time: ago(90 * time.Second), Event: admin.FlowOpen, Connection: c[1], Flags: "-"},
		{Time: ago(80 * time.Second), Event: admin.FlowUpdate, Connection: c[1], Duration: 10 * time.Second, Flags: "-"},
		{Time: ago(3 * time.Second), Event: admin.FlowDenied, Connection: denied, Cause: "AuthorizationPolicy shop/deny-old (DENY) rule 0 denies a peer without identity", Flags: "DENY"},
		{Time: ago(2 * time.Second), Event: admin.FlowFailed, Connection: c[0], Duration: 1532 * time.Microsecond, Cause: "connect: connection refused", Flags: "CONNECT"},
		{Time: ago(time.Second), Event: admin.FlowClose, Connection: c[1], Duration: 89*time.Second + 123456*time.Microsecond, Cause: "both ends closed", Flags: "-"},
	}
}

func findingRows(node string, failing bool) []admin.Finding {
	pod := map[string]string{"n1": "shop/web-7d4b9c", "n2": "shop/db-0"}[node]
	rows := []admin.Finding{
		{Subject: pod, Check: "programs", OK: true},
		{Subject: pod, Check: "listeners", OK: true},
		{Subject: "agent", Check: "connect hooks", OK: true},
		{Subject: "agent", Check: "discovery", OK: true},
	}
	if failing {
		rows = append(rows,
			admin.Finding{Subject: "shop/batch", Check: "rule", OK: true},
			admin.Finding{Subject: "shop/batch", Check: "sysctls", Detail: "net.ipv4.tcp_fwmark_accept is 0: something in the pod changed them; the agent puts it back within seconds, look at its log if it stays so"},
		)
	}
	return rows
}

// answerWhy explains with the real thing, over a small cluster.
func answerWhy(node string) func(admin.WhyQuery) (admin.Why, error) {
	pod := func(ns, name, node, account string, owner dataplane.Owner, a ...string) dataplane.Workload {
		return dataplane.Workload{UID: name, Name: dataplane.Name{Namespace: ns, Name: name}, Node: node, ServiceAccount: account, Owner: owner, Addrs: addrs(a...), Phase: dataplane.PodRunning, Ready: true}
	}
	snapshot := dataplane.NewSnapshot(dataplane.Contents{
		TrustDomain: "cluster.local", RootNamespace: "istio-system",
		Namespaces: []dataplane.Namespace{{Name: "shop", Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}}, {Name: "legacy"}},
		Workloads: []dataplane.Workload{
			pod("shop", "web-7d4b9c", "n1", "web", dataplane.Owner{Kind: "Deployment", Name: "web"}, "10.1.1.2"),
			pod("shop", "db-0", "n2", "db", dataplane.Owner{Kind: "StatefulSet", Name: "db"}, "10.1.2.3"),
			pod("legacy", "old", "n1", "default", dataplane.Owner{}, "10.1.1.4"),
		},
		Services: []dataplane.Service{{
			Name: dataplane.Name{Namespace: "shop", Name: "db"}, Host: "db.shop.svc.cluster.local", Addrs: addrs("10.96.0.10"),
			Ports:     []dataplane.ServicePort{{Name: "mysql", Port: 3306}},
			Endpoints: []dataplane.Endpoint{{Addr: netip.MustParseAddr("10.1.2.3"), WorkloadUID: "db-0", Node: "n2", Ready: true, Ports: map[string]uint16{"mysql": 3306}}},
		}},
		Authorizations: []dataplane.AuthorizationPolicy{{
			Name: dataplane.Name{Namespace: "shop", Name: "allow-web"}, Action: dataplane.ActionAllow,
			Rules: []dataplane.PolicyRule{{From: []dataplane.PolicySource{{Principals: []string{"cluster.local/ns/shop/sa/web"}}}}},
		}},
		Captured: map[string]bool{"web-7d4b9c": true, "db-0": true},
	})
	return func(q admin.WhyQuery) (admin.Why, error) {
		return explain.Explain(explain.Question{
			Snapshot: snapshot, Node: node, Source: q.Source, Destination: q.Destination, From: q.From,
			Capture: func(uid string) (dataplane.CaptureState, string) {
				if w := snapshot.Workload(uid); w != nil && w.Captured && w.Node == node {
					return dataplane.CaptureInForce, ""
				}
				return dataplane.CaptureNone, ""
			},
		})
	}
}

func nodeOne() *admintest.Backend {
	return &admintest.Backend{
		WorkloadRows: workloadRows("n1"), ServiceRows: serviceRows(), PolicyRows: policyRows(2, 1042, 6),
		CertificateRows: certificateRows(), ConnectionRows: connectionRows(), Findings: findingRows("n1", true),
		Recent: flowRows(), Answer: answerWhy("n1"),
		Running: admin.Version{Version: "v0.1.0", Node: "n1", Kernel: "6.18.0", Inbound: "sk_lookup"},
	}
}

func nodeTwo() *admintest.Backend {
	inbound := connectionRows()[1]
	inbound.ID, inbound.Direction, inbound.Policy = "n2-1", "inbound", "shop/allow-web rule 0"
	opened := admin.Flow{Time: ago(89 * time.Second), Event: admin.FlowOpen, Connection: inbound, Flags: "-"}
	return &admintest.Backend{
		WorkloadRows: workloadRows("n2"), ServiceRows: serviceRows(), PolicyRows: policyRows(1, 8, 0),
		CertificateRows: []admin.Certificate{{Identity: identity("shop", "db"), State: "valid", NotBefore: ago(time.Hour), NotAfter: now.Add(23 * time.Hour), RefreshAt: now.Add(11 * time.Hour)}},
		ConnectionRows:  []admin.Connection{inbound}, Findings: findingRows("n2", false),
		Recent: []admin.Flow{opened}, Answer: answerWhy("n2"),
		Running: admin.Version{Version: "v0.1.0", Node: "n2", Kernel: "6.18.0", Inbound: "tc"},
	}
}
