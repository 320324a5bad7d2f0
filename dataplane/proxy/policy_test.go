package proxy

import (
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

func denyAll(name string) dataplane.AuthorizationPolicy {
	return dataplane.AuthorizationPolicy{
		Name: dataplane.Name{Namespace: "shop", Name: name}, Action: dataplane.ActionDeny,
		Rules: []dataplane.PolicyRule{{}},
	}
}

func denyChange(c *dataplane.Contents) {
	c.Authorizations = []dataplane.AuthorizationPolicy{denyAll("deny-all")}
}

func TestPolicyChangeCutsWhatItDenies(t *testing.T) {
	w := newWorld(t)
	app, other := w.listen(w.db.addr, echo), w.listen(w.db.addr, echo)
	tunnel, plain, stays := w.dial(w.nodes[0], w.web, app), w.plain(w.nodes[1], w.db, netip.MustParseAddr("127.0.0.9"), app), w.dial(w.nodes[0], w.web, other)
	sendText(t, tunnel, "x")
	receive(t, tunnel, "x")
	sendText(t, plain, "x")
	receive(t, plain, "x")
	sendText(t, stays, "x")
	receive(t, stays, "x")
	w.publish(func(c *dataplane.Contents) {
		deny := denyAll("deny-port")
		deny.Rules = []dataplane.PolicyRule{
			{To: []dataplane.PolicyOperation{{Ports: []uint16{1}}}},
			{To: []dataplane.PolicyOperation{{Ports: []uint16{app.Port()}}}},
		}
		c.Authorizations = []dataplane.AuthorizationPolicy{deny}
	})
	wantReset(t, tunnel)
	wantReset(t, plain)
	sendText(t, stays, "still")
	receive(t, stays, "still")
	eventually(t, "two are closed", func() bool { return len(w.nodes[1].events(admin.FlowClose)) == 2 })
	for _, f := range w.nodes[1].events(admin.FlowClose) {
		if !strings.HasPrefix(f.Cause, "policy changed: shop/deny-port rule 1") || f.Flags != string(telemetry.FlagsDeny) {
			t.Errorf("flags %s, cause %q", f.Flags, f.Cause)
		}
	}
	count := w.nodes[1].telemetry.PolicyCounts(string(authz.KindAuthorization), dataplane.Name{Namespace: "shop", Name: "deny-port"}, false)
	if count.Denied != 2 {
		t.Errorf("the policy is counted as denying %d, want 2", count.Denied)
	}
}

func TestDryRunOnlyCounts(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	c := w.dial(w.nodes[0], w.web, app)
	sendText(t, c, "x")
	receive(t, c, "x")
	count := func() telemetry.PolicyCount {
		return w.nodes[1].telemetry.PolicyCounts(string(authz.KindAuthorization), dataplane.Name{Namespace: "shop", Name: "trial"}, true)
	}
	trial := denyAll("trial")
	trial.DryRun = true
	for range 3 { // it is counted once for the connection, not once for each snapshot
		w.publish(func(c *dataplane.Contents) { c.Authorizations = []dataplane.AuthorizationPolicy{trial} })
		eventually(t, "the live connection is counted", func() bool { return count().Denied == 1 })
	}
	second := w.dial(w.nodes[0], w.web, app)
	sendText(t, second, "x")
	receive(t, second, "x")
	sendText(t, c, "still")
	receive(t, c, "still")
	if got := count(); got.Denied != 2 {
		t.Errorf("counted %+v, want 2 denied", got)
	}
	inForce := w.nodes[1].telemetry.PolicyCounts(string(authz.KindAuthorization), dataplane.Name{Namespace: "shop", Name: "trial"}, false)
	if inForce != (telemetry.PolicyCount{}) {
		t.Errorf("in force it is counted as %+v: a dry run decides nothing", inForce)
	}
}

func TestStrictRefusesPlaintextAndNamesThePolicy(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	w.publish(func(c *dataplane.Contents) {
		c.Authentications = []dataplane.PeerAuthentication{{Name: dataplane.Name{Namespace: "shop", Name: "strict"}, Mode: dataplane.MTLSStrict}}
	})
	wantReset(t, w.plain(w.nodes[1], w.db, netip.MustParseAddr("127.0.0.9"), app))
	f := w.nodes[1].event(t, admin.FlowDenied)
	if f.Flags != string(telemetry.FlagsDeny) || !strings.Contains(f.Cause, "shop/strict") {
		t.Errorf("flags %s, cause %q", f.Flags, f.Cause)
	}
	tunnel := w.dial(w.nodes[0], w.web, app)
	sendText(t, tunnel, "x")
	receive(t, tunnel, "x")
}

func TestPlaintextToADataPlanePortIsRefused(t *testing.T) {
	w := newWorld(t)
	for _, port := range []uint16{dataplane.PortOutbound, dataplane.PortInbound, dataplane.PortTunnel} {
		wantReset(t, w.plain(w.nodes[1], w.db, netip.MustParseAddr("127.0.0.9"), netip.AddrPortFrom(w.db.addr, port)))
	}
	if len(w.db.apps) != 0 {
		t.Errorf("dialed %v", w.db.apps)
	}
}

// revocations is a certs.RevocationSource that a test fills.
type revocations struct {
	mu      sync.Mutex
	current *certs.Revocations
	changed chan struct{}
}

func newRevocations(t *testing.T) *revocations {
	t.Helper()
	empty, err := certs.ParseRevocations(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &revocations{current: empty, changed: make(chan struct{})}
}

func (r *revocations) Load() (*certs.Revocations, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current, r.changed
}

func (r *revocations) set(t *testing.T, crl []byte) {
	t.Helper()
	list, err := certs.ParseRevocations(crl)
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = list
	close(r.changed)
	r.changed = make(chan struct{})
}

func TestRevocationCutsLiveTunnels(t *testing.T) {
	w := newWorld(t)
	revocations := newRevocations(t)
	keeper := certstest.Run(t, certs.Config{
		Signer: w.ca, Roots: certstest.Bundle(t, w.ca), TrustDomain: trustDomain, Revocations: revocations,
	}, workloadID("web"), workloadID("db"))
	w.keeper = keeper
	node := w.newNode("node2")
	pod := newFakePod(t, "db2", w.db.addr.Next().Next().Next().String())
	w.publish(func(c *dataplane.Contents) {
		extra := pod.workload("node2")
		extra.ServiceAccount = "db"
		c.Workloads = append(c.Workloads, extra)
		c.Captured["db2"] = true
	})
	w.serve(node, pod)
	c := w.dial(w.nodes[0], w.web, w.listen(pod.addr, echo))
	sendText(t, c, "x")
	receive(t, c, "x")
	flow := node.serving("db2")[0].liveFlows()[0]
	revocations.set(t, w.ca.CRL(t, flow.tunnel.TLS.PeerCertificates[0]))
	wantReset(t, c)
	f := node.event(t, admin.FlowClose)
	if !strings.Contains(f.Cause, "revoked") {
		t.Errorf("cause %q", f.Cause)
	}
	wantReset(t, w.dial(w.nodes[0], w.web, w.listen(pod.addr, echo)))
}
