package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane"
)

// MaxClearPorts is how many ranges of ports a pod, or a peer, can have left alone.
const MaxClearPorts = len(bpf.RacewayClearPorts{}.Ports)

// Peer is who speaks the tunnel for UDP: a workload's address with port 0, which is every port,
// or a service's address and port.
type Peer struct {
	Addr netip.Addr
	Port uint16
}

// SetPeers says whose UDP is captured, and what each has left alone, in all pods. What an earlier
// agent said holds until then.
func (d *Datapath) SetPeers(peers map[Peer][]dataplane.PortRange) error {
	d.mu.Lock()
	yielded, closed := d.yielded, d.closed
	d.mu.Unlock()
	switch {
	case yielded:
		return fmt.Errorf("set the peers of UDP: %w", ErrYielded)
	case closed:
		return fmt.Errorf("set the peers of UDP: %w", os.ErrClosed)
	}
	d.peersMu.Lock()
	defer d.peersMu.Unlock()
	if err := d.setPeers(peers); err != nil {
		return fmt.Errorf("set the peers of UDP: %w", err)
	}
	return nil
}

func (d *Datapath) setPeers(peers map[Peer][]dataplane.PortRange) error {
	m := d.loaded.maps.Peers
	want := make(map[bpf.RacewayPeer]bpf.RacewayClearPorts, len(peers))
	for p, clear := range peers {
		ports, err := clearPorts(clear)
		if err != nil {
			return fmt.Errorf("%v: %w", p.Addr, err)
		}
		want[bpf.RacewayPeer{Addr: toAddr(p.Addr), Port: p.Port}] = ports
	}
	is := d.peers
	d.peers = nil // until all is well
	if is == nil {
		var err error
		if is, err = readPeers(m); err != nil {
			return err
		}
	}
	var errs []error
	for key := range is {
		if _, ok := want[key]; !ok {
			errs = append(errs, ignoreMissing(m.Delete(key)))
		}
	}
	for key, value := range want {
		if before, ok := is[key]; !ok || before != value {
			errs = append(errs, m.Put(key, value))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.peers = want
	return nil
}

func readPeers(m *ebpf.Map) (map[bpf.RacewayPeer]bpf.RacewayClearPorts, error) {
	peers := make(map[bpf.RacewayPeer]bpf.RacewayClearPorts)
	var key bpf.RacewayPeer
	var value bpf.RacewayClearPorts
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		peers[key] = value
	}
	return peers, entries.Err()
}

func clearPorts(ranges []dataplane.PortRange) (bpf.RacewayClearPorts, error) {
	var c bpf.RacewayClearPorts
	if len(ranges) > MaxClearPorts {
		return c, fmt.Errorf("%d ranges of UDP ports are left alone, at most %d are possible", len(ranges), MaxClearPorts)
	}
	for _, r := range ranges {
		if r.First > r.Last {
			return c, fmt.Errorf("UDP ports %d-%d are no range", r.First, r.Last)
		}
	}
	c.Count = uint32(copy(c.Ports[:], portRanges(ranges)))
	return c, nil
}

// portRanges is ranges as the programs have them. They were checked.
func portRanges(ranges []dataplane.PortRange) []bpf.RacewayPorts {
	ports := make([]bpf.RacewayPorts, len(ranges))
	for i, r := range ranges {
		ports[i] = bpf.RacewayPorts{First: r.First, Last: r.Last}
	}
	return ports
}
