package agent

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

func udpPod(name, addr string) dataplane.Workload {
	return dataplane.Workload{
		UID: name, Name: dataplane.Name{Namespace: "shop", Name: name}, Node: "n1", Phase: dataplane.PodRunning,
		Addrs: []netip.Addr{netip.MustParseAddr(addr)},
	}
}

// The kernel is told of pods that take UDP, and of services that lead to nobody else.
func TestUDPPeers(t *testing.T) {
	takes, alsoTakes, not, clear := udpPod("takes", "10.0.0.1"), udpPod("also", "10.0.0.2"), udpPod("not", "10.0.0.3"), udpPod("clear", "10.0.0.4")
	clear.UDPClear = []dataplane.PortRange{{First: 53, Last: 53}}
	elsewhere := udpPod("elsewhere", "10.0.0.5")
	elsewhere.Network = "another"
	endpoint := func(w dataplane.Workload, ready bool) dataplane.Endpoint {
		return dataplane.Endpoint{Addr: w.Addrs[0], WorkloadUID: w.UID, Ready: ready, Ports: map[string]uint16{"dns": 53}}
	}
	service := func(name, vip string, endpoints ...dataplane.Endpoint) dataplane.Service {
		return dataplane.Service{
			Name: dataplane.Name{Namespace: "shop", Name: name}, Addrs: []netip.Addr{netip.MustParseAddr(vip)},
			UDPPorts: []dataplane.ServicePort{{Name: "dns", Port: 53}}, Endpoints: endpoints,
		}
	}
	all := map[string]bool{"takes": true, "also": true, "not": true, "clear": true, "elsewhere": true}
	udp := maps.Clone(all)
	delete(udp, "not")
	s := dataplane.NewSnapshot(dataplane.Contents{
		Workloads: []dataplane.Workload{takes, alsoTakes, not, clear, elsewhere},
		Services: []dataplane.Service{
			service("both", "10.96.0.1", endpoint(takes, true), endpoint(alsoTakes, true), endpoint(not, false)),
			service("mixed", "10.96.0.2", endpoint(takes, true), endpoint(not, true)),
			service("alone", "10.96.0.3", endpoint(clear, true)),
			service("nobody", "10.96.0.4", endpoint(takes, false)),
		},
		Captured: all, UDP: udp,
	})
	want := map[kernel.Peer]int{
		{Addr: takes.Addrs[0]}:                             0,
		{Addr: alsoTakes.Addrs[0]}:                         0,
		{Addr: clear.Addrs[0]}:                             1,
		{Addr: netip.MustParseAddr("10.96.0.1"), Port: 53}: 0,
	}
	got := make(map[kernel.Peer]int)
	for p, ports := range udpPeers(s) {
		got[p] = len(ports)
	}
	if !maps.Equal(got, want) {
		t.Errorf("peers %v, want %v", got, want)
	}
}

func TestResetKeyIsTheNodes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := resetKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	second, err := resetKey(dir)
	if err != nil || *second != *first || *first == [32]byte{} {
		t.Errorf("the next agent's key is %x, %v; want %x", second, err, first)
	}
	if info, err := os.Stat(filepath.Join(dir, resetKeyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", info, err)
	}
	if _, err := resetKey(filepath.Join(dir, resetKeyFile)); err == nil {
		t.Error("a directory that is a file was taken")
	}
}
