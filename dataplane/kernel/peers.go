package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

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
	missing := make(map[bpf.RacewayPeer]bpf.RacewayClearPorts, len(peers))
	for p, clear := range peers {
		ports, err := clearPorts(clear)
		if err != nil {
			return fmt.Errorf("%v: %w", p.Addr, err)
		}
		missing[bpf.RacewayPeer{Addr: toAddr(p.Addr), Port: p.Port}] = ports
	}
	var gone []bpf.RacewayPeer
	var key bpf.RacewayPeer
	var value bpf.RacewayClearPorts
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		switch want, ok := missing[key]; {
		case !ok:
			gone = append(gone, key)
		case want == value:
			delete(missing, key)
		}
	}
	errs := []error{entries.Err()}
	for _, key := range gone {
		errs = append(errs, ignoreMissing(m.Delete(key)))
	}
	for key, value := range missing {
		errs = append(errs, m.Put(key, value))
	}
	return errors.Join(errs...)
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
