package kernel

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/bpf"
)

// lateAnswers is how long applications may take to answer what they were asked by a flow that ends
// meanwhile, without that their answers go in clear.
const lateAnswers = 2 * time.Second

// Keep has what the application at app says to client come to the agent, whoever client is: the
// flow came by the tunnel. Forget undoes it.
func (d *Datagrams) Keep(app, client netip.AddrPort) error {
	key := d.flowKey(app, client)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.ended, key)
	if err := d.flows.Put(key, d.since); err != nil {
		return fmt.Errorf("keep the flow from %v to %v: %w", client, app, err)
	}
	return nil
}

// Forget undoes Keep once the application has had time to answer: what was asked by a tunnel is not
// answered in clear because the tunnel has ended.
func (d *Datagrams) Forget(app, client netip.AddrPort) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.pruning && !d.closed {
		d.pruning = true
		time.AfterFunc(lateAnswers, d.prune)
	}
	d.ended[d.flowKey(app, client)] = monotonic()
}

func (d *Datagrams) flowKey(app, client netip.AddrPort) bpf.RacewayTuple {
	return bpf.RacewayTuple{
		Netns: d.netns,
		Local: toAddr(app.Addr()), LocalPort: app.Port(),
		Remote: toAddr(client.Addr()), RemotePort: client.Port(),
	}
}

// prune forgets the flows whose time has come, and comes back for the others.
func (d *Datagrams) prune() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return // a later agent does it, or all flows of the pod are forgotten
	}
	for key, at := range d.ended {
		if monotonic()-at < lateAnswers {
			continue
		}
		delete(d.ended, key)
		if err := ignoreMissing(d.flows.Delete(key)); err != nil {
			d.log.Error("answers of a flow that has ended still come to the agent", "error", err)
		}
	}
	if d.pruning = len(d.ended) > 0; d.pruning {
		time.AfterFunc(lateAnswers/2, d.prune)
	}
}

// ForgetOrphans forgets what earlier agents kept and did not forget, in pods whose UDP this agent
// has had for some time. None of those agents may serve UDP any more.
func (d *Datapath) ForgetOrphans() error {
	d.mu.Lock()
	pods := slices.Collect(maps.Values(d.pods))
	d.mu.Unlock()
	ours := make(map[uint64]uint64) // since when a pod is, by its cookie
	for _, p := range pods {
		if udp := p.Datagrams(); udp != nil && age(udp.since) >= lateAnswers && !udp.alone.Swap(true) {
			ours[udp.netns] = udp.since
		}
	}
	if len(ours) == 0 {
		return nil
	}
	if err := d.forgetFlows(func(cookie, since uint64) bool { return since < ours[cookie] }); err != nil {
		return fmt.Errorf("forget flows of earlier agents: %w", err)
	}
	return nil
}

// forgetFlows forgets those that gone is true of.
func (d *Datapath) forgetFlows(gone func(cookie, since uint64) bool) error {
	var found []bpf.RacewayTuple
	var key bpf.RacewayTuple
	var since uint64
	entries := d.loaded.maps.Flows.Iterate()
	for entries.Next(&key, &since) {
		if gone(key.Netns, since) {
			found = append(found, key)
		}
	}
	errs := []error{entries.Err()}
	for _, key := range found {
		errs = append(errs, ignoreMissing(d.loaded.maps.Flows.Delete(key)))
	}
	return errors.Join(errs...)
}

func (d *Datapath) forgetFlowsOf(cookie uint64) error {
	return d.forgetFlows(func(c, _ uint64) bool { return c == cookie })
}
