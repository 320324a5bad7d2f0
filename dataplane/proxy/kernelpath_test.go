package proxy

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/route"
)

// kernelServes is a KernelPath with endpoints that the kernel serves.
type kernelServes []netip.AddrPort

func (k kernelServes) Offer(string, netip.AddrPort) []netip.AddrPort { return k }

// Connections that come to the proxy although the kernel serves some of a service's endpoints
// are for the others, as long as there are any.
func TestEndpointsThatTheKernelServesAreLeftToIt(t *testing.T) {
	here, there := netip.MustParseAddrPort("10.1.0.2:80"), netip.MustParseAddrPort("10.2.0.2:80")
	c := dataplane.Contents{TrustDomain: "cluster.local"}
	svc := dataplane.Service{Name: dataplane.Name{Namespace: "shop", Name: "db"}, Addrs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Ports: []dataplane.ServicePort{{Port: 80}}}
	for _, at := range []netip.AddrPort{here, there} {
		c.Workloads = append(c.Workloads, dataplane.Workload{UID: at.String(), Addrs: []netip.Addr{at.Addr()}, Phase: dataplane.PodRunning})
		svc.Endpoints = append(svc.Endpoints, dataplane.Endpoint{Addr: at.Addr(), Ready: true, Serving: true, Ports: map[string]uint16{"": 80}})
	}
	c.Services = []dataplane.Service{svc}
	var store dataplane.Store
	store.Publish(dataplane.NewSnapshot(c))
	for _, test := range []struct {
		name   string
		kernel KernelPath
		left   []netip.AddrPort
	}{
		{"no kernel path", nil, nil},
		{"none of them", kernelServes{}, nil},
		{"one of them", kernelServes{here}, []netip.AddrPort{here}},
		{"all of them", kernelServes{here, there}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &servedPod{Proxy: &Proxy{cfg: Config{Store: &store, KernelPath: test.kernel}}}
			if left := s.leftToKernel(route.Flow{Dst: netip.MustParseAddrPort("10.96.0.1:80")}); !slices.Equal(left, test.left) {
				t.Errorf("left to the kernel: %v, want %v", left, test.left)
			}
		})
	}
}
