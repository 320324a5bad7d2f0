package agent

import (
	"net/netip"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
)

func TestServicesCountPodsOfTwoFamiliesOnce(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	outside := netip.MustParseAddr("192.0.2.1")
	a := new(Agent)
	a.store.Publish(dataplane.NewSnapshot(dataplane.Contents{
		Namespaces: []dataplane.Namespace{{Name: "shop"}},
		Workloads: []dataplane.Workload{{
			UID: "db", Name: dataplane.Name{Namespace: "shop", Name: "db"}, Addrs: []netip.Addr{v4, v6}, Phase: dataplane.PodRunning,
		}},
		Services: []dataplane.Service{{
			Name: dataplane.Name{Namespace: "shop", Name: "db"},
			Endpoints: []dataplane.Endpoint{
				{Addr: v4, WorkloadUID: "db", Ready: true},
				{Addr: v6, WorkloadUID: "db", Ready: true},
				{Addr: outside, Ready: false},
			},
		}},
		Captured: map[string]bool{"db": true},
	}))
	rows, err := backend{a}.Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 || rows[0].Endpoints != 2 || rows[0].Ready != 1 || rows[0].Captured != 1 {
		t.Errorf("%+v, want 2 endpoints, 1 ready, 1 captured", rows)
	}
}

func TestNothingIsAnsweredBeforeTheFirstSnapshot(t *testing.T) {
	if _, err := (backend{new(Agent)}).Services(t.Context()); err == nil {
		t.Error("services of a cluster that is not known")
	}
}
