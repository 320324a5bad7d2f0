package kernel

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// attachUDP covers every interface that leads to a guard, and lets go of those that are gone.
func (p *Pod) attachUDP() error {
	exits, err := p.exits()
	if err != nil {
		return err
	}
	lost := *p.rec
	p.rec.UDPIfindexes = nil
	for _, e := range exits {
		p.rec.UDPIfindexes = append(p.rec.UDPIfindexes, e.inside)
	}
	lost.UDPIfindexes = slices.DeleteFunc(slices.Clone(lost.UDPIfindexes), func(i int) bool { return slices.Contains(p.rec.UDPIfindexes, i) })
	if err := p.d.ledger.save(p.rec); err != nil {
		return err
	}
	var errs []error
	for _, at := range udpPoints(&lost, p.ns) {
		errs = append(errs, p.d.detachTC(p.rec, at))
	}
	for _, at := range udpPoints(p.rec, p.ns) {
		if err := p.attachUDPAt(at); err != nil {
			errs = append(errs, fmt.Errorf("attach %s: %w", at.pin, err))
		}
	}
	return errors.Join(errs...)
}

func (p *Pod) attachUDPAt(at point) error {
	name, _, _ := strings.Cut(at.pin, "_")
	prog, err := p.d.loaded.instance(name, p.rec.Cookie)
	if err != nil {
		return err
	}
	return errors.Join(p.d.attachTC(p.rec, at, prog), prog.Close())
}

func udpPoints(r *record, ns *netns.Namespace) []point {
	var points []point
	for _, i := range r.UDPIfindexes {
		points = append(points,
			point{pin: progDivert + "_" + strconv.Itoa(i), ns: ns, ifindex: i, egress: true},
			point{pin: progReceive + "_" + strconv.Itoa(i), ns: ns, ifindex: i})
	}
	return points
}

func (d *Datapath) detachUDP(r *record, ns *netns.Namespace) error {
	var errs []error
	for _, at := range udpPoints(r, ns) {
		errs = append(errs, d.detachTC(r, at))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach UDP: %w", err)
	}
	r.UDPIfindexes = nil
	return nil
}

// checkUDP looks whether what captures UDP is all there.
func (p *Pod) checkUDP() error {
	if !p.rec.UDP {
		return nil
	}
	exits, err := p.exits()
	if err != nil {
		return err
	}
	for _, e := range exits {
		if !slices.Contains(p.rec.UDPIfindexes, e.inside) {
			return fmt.Errorf("not attached to interface %s", e.name)
		}
	}
	for _, at := range udpPoints(p.rec, p.ns) {
		if err := p.checkTC(at); err != nil {
			return fmt.Errorf("%s: %w", at.pin, err)
		}
	}
	if p.udp == nil {
		return errors.New("no sockets")
	}
	return p.checkReceivers()
}

func (p *Pod) checkReceivers() error {
	for kind, s := range p.udp.sockets() {
		cookie, err := socketCookie(s)
		if err != nil {
			return err
		}
		var registered uint64
		key := bpf.RacewayListenerKey{Netns: p.rec.Cookie, Kind: kind}
		if err := p.d.loaded.maps.Receivers.Lookup(key, &registered); err != nil {
			return fmt.Errorf("socket %d: not registered: %w", kind, err)
		}
		if registered != cookie {
			return fmt.Errorf("socket %d: another is registered in its place", kind)
		}
	}
	var registered uint64
	if err := p.d.loaded.maps.QuicMarks.Lookup(p.quicKey(p.udp.mark), &registered); err != nil {
		return fmt.Errorf("mark of the QUIC socket: not registered: %w", err)
	}
	return nil
}
