package main

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
)

func TestNodeMayImpersonateOnlyItsOwnLivePods(t *testing.T) {
	pod := func(name, account, node string, edit func(*dataplane.Workload)) dataplane.Workload {
		w := dataplane.Workload{
			UID: name, Name: dataplane.Name{Namespace: "shop", Name: name}, ServiceAccount: account, Node: node,
			Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Phase: dataplane.PodRunning,
		}
		if edit != nil {
			edit(&w)
		}
		return w
	}
	store := &dataplane.Store{}
	rule := nodeRule{store}
	id := func(account string) spiffe.ID {
		return spiffe.ID{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: account}
	}
	if err := rule.Authorize(t.Context(), istio.Caller{Node: "a"}, id("web")); !errors.Is(err, errNoSnapshot) {
		t.Errorf("before the first snapshot: %v", err)
	}
	store.Publish(dataplane.NewSnapshot(dataplane.Contents{TrustDomain: "cluster.local", Workloads: []dataplane.Workload{
		pod("web-1", "web", "a", nil),
		pod("db-1", "db", "b", nil),
		pod("job-1", "job", "a", func(w *dataplane.Workload) { w.Phase = dataplane.PodSucceeded }),
		pod("crash-1", "crash", "a", func(w *dataplane.Workload) { w.Phase = dataplane.PodFailed }),
		pod("new-1", "new", "a", func(w *dataplane.Workload) { w.Addrs, w.Phase = nil, dataplane.PodPending }),
		pod("going-1", "going", "a", func(w *dataplane.Workload) { w.Terminating = true }),
		pod("lost-1", "lost", "", nil),
	}}))
	for _, tt := range []struct {
		name, node string
		id         spiffe.ID
		granted    bool
	}{
		{"own pod", "a", id("web"), true},
		{"own pod on its way out, still draining", "a", id("going"), true},
		{"another node's pod", "a", id("db"), false},
		{"own pod, asked for by another node", "b", id("web"), false},
		{"finished pod", "a", id("job"), false},
		{"failed pod", "a", id("crash"), false},
		{"pod without an address yet", "a", id("new"), false},
		{"pod on no node, asked for by the nameless node", "", id("lost"), false},
		{"service account that no pod uses", "a", id("admin"), false},
		{"same account in another namespace", "a", spiffe.ID{TrustDomain: "cluster.local", Namespace: "bank", ServiceAccount: "web"}, false},
		{"same account in another trust domain", "a", spiffe.ID{TrustDomain: "far.example", Namespace: "shop", ServiceAccount: "web"}, false},
		{"unknown node", "c", id("web"), false},
		{"nobody", "a", spiffe.ID{}, false},
	} {
		err := rule.Authorize(t.Context(), istio.Caller{Node: tt.node}, tt.id)
		var denied *istio.DeniedError
		if tt.granted != (err == nil) || err != nil && !errors.As(err, &denied) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err != nil && tt.node != "" && !strings.Contains(err.Error(), tt.id.ServiceAccount) {
			t.Errorf("%s: %v does not name the account", tt.name, err)
		}
	}
}
