package kernel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// quiet is how long Guard waits before it lists connections: a connect() that had passed
// its hook when the hook was switched on has its socket in the kernel's tables by then.
const quiet = 100 * time.Millisecond

// Guard notes which connections are older than the capture and attaches the guard to the
// host's end of every veth pair of the pod: from then on no other plaintext TCP leaves it.
// Call it when outbound and inbound capture are on. Once noted, connections are not looked
// for again, whatever became of the guard: those made since are none of the older ones.
func (p *Pod) Guard(ctx context.Context) error {
	if err := p.guard(ctx); err != nil {
		return fmt.Errorf("guard pod %s: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) guard(ctx context.Context) error {
	if p.d.cfg.DisableGuard {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return err
	}
	if p.rec.HostIfindex == 0 {
		select {
		case <-time.After(quiet):
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := p.noteOlder(); err != nil {
			return err
		}
	}
	defer p.noteForce()
	return p.attachGuard()
}

// attachGuard also updates what is attached, and lets go of pairs that the pod lost. It
// writes to the record first: an interface there means that older connections are noted.
func (p *Pod) attachGuard() error {
	exits, err := p.exits()
	if err != nil {
		return err
	}
	lost := p.rec.MoreIfindexes
	p.rec.HostIfindex, p.rec.MoreIfindexes = exits[0].host, nil
	for _, e := range exits[1:] {
		p.rec.MoreIfindexes = append(p.rec.MoreIfindexes, e.host)
	}
	lost = slices.DeleteFunc(slices.Clone(lost), func(i int) bool { return slices.Contains(p.rec.MoreIfindexes, i) })
	if err := p.d.ledger.save(p.rec); err != nil {
		return err
	}
	var errs []error
	for _, i := range lost {
		errs = append(errs, p.d.detachTC(p.rec, p.d.furtherGuard(i)))
	}
	for _, at := range p.d.guardPoints(p.rec) {
		if err := p.attachGuardAt(at); err != nil {
			errs = append(errs, fmt.Errorf("attach to interface %d of %s: %w", at.ifindex, p.d.host.Path(), err))
		}
	}
	return errors.Join(errs...)
}

func (p *Pod) attachGuardAt(at point) error {
	name := progGuard
	if at.pin != pinGuard {
		name = progGuardMore
	}
	prog, err := p.d.loaded.instance(name, p.rec.Cookie)
	if err != nil {
		return err
	}
	return errors.Join(p.d.attachTC(p.rec, at, prog), prog.Close())
}

// renewGuard puts this agent's program in the place of an earlier agent's.
func (p *Pod) renewGuard() error {
	if p.rec.HostIfindex == 0 {
		return nil
	}
	if err := p.attachGuard(); err != nil {
		return fmt.Errorf("renew the guard: %w", err)
	}
	return nil
}

// guardPoints are the host's ends of the pod's veth pairs, first that of its address.
func (d *Datapath) guardPoints(r *record) []point {
	if r.HostIfindex == 0 {
		return nil
	}
	points := []point{{pin: pinGuard, ns: d.host, ifindex: r.HostIfindex}}
	for _, i := range r.MoreIfindexes {
		points = append(points, d.furtherGuard(i))
	}
	return points
}

func (d *Datapath) furtherGuard(ifindex int) point {
	return point{pin: pinGuard + "_" + strconv.Itoa(ifindex), ns: d.host, ifindex: ifindex}
}

// Unguard lets the pod speak in clear again.
func (p *Pod) Unguard() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return fmt.Errorf("unguard pod %s: %w", p.uid, err)
	}
	err := errors.Join(p.d.detachGuard(p.rec), p.d.forgetOlder(p.rec.Cookie), p.d.ledger.save(p.rec))
	p.noteForce()
	if err != nil {
		return fmt.Errorf("unguard pod %s: %w", p.uid, err)
	}
	clear(p.older)
	return nil
}

func (d *Datapath) detachGuard(r *record) error {
	var errs []error
	for _, at := range d.guardPoints(r) {
		errs = append(errs, d.detachTC(r, at))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach the guard: %w", err)
	}
	r.HostIfindex, r.MoreIfindexes = 0, nil
	return nil
}
