package kernel

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/raceway-mesh/raceway/bpf"
)

// Keep has what the application at app says to client come to the agent, whoever client is: the
// flow came by the tunnel. Forget undoes it.
func (d *Datagrams) Keep(app, client netip.AddrPort) error {
	if err := d.flows.Put(d.flowKey(app, client), uint64(monotonic())); err != nil {
		return fmt.Errorf("keep the flow from %v to %v: %w", client, app, err)
	}
	return nil
}

// Forget ends what Keep began.
func (d *Datagrams) Forget(app, client netip.AddrPort) error {
	if err := ignoreMissing(d.flows.Delete(d.flowKey(app, client))); err != nil {
		return fmt.Errorf("forget the flow from %v to %v: %w", client, app, err)
	}
	return nil
}

func (d *Datagrams) flowKey(app, client netip.AddrPort) bpf.RacewayTuple {
	return bpf.RacewayTuple{
		Netns: d.netns,
		Local: toAddr(app.Addr()), LocalPort: app.Port(),
		Remote: toAddr(client.Addr()), RemotePort: client.Port(),
	}
}

// forgetFlows forgets those of a pod.
func (d *Datapath) forgetFlows(cookie uint64) error {
	var gone []bpf.RacewayTuple
	var key bpf.RacewayTuple
	var since uint64
	entries := d.loaded.maps.Flows.Iterate()
	for entries.Next(&key, &since) {
		if key.Netns == cookie {
			gone = append(gone, key)
		}
	}
	errs := []error{entries.Err()}
	for _, key := range gone {
		errs = append(errs, ignoreMissing(d.loaded.maps.Flows.Delete(key)))
	}
	return errors.Join(errs...)
}
