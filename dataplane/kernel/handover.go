package kernel

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
)

// How one agent's Datapath hands over to another's, while connections come in:
//
//	old: serves ── Yield ── accepts, dials ─────────────────────── Close
//	new:                    Open ── OpenPod, pod by pod ── serves
//
// Each OpenPod puts its listeners in the place of the old ones, in the map that both agents
// share: a connection reaches one or the other, and never nobody. Those that the old agent
// has accepted go on, as the guard of either knows the sockets of both.

var (
	// ErrInUse is Open's when another Datapath has the state directory or the pins.
	ErrInUse = errors.New("another agent that uses it is running")
	// ErrYielded is the answer to whoever wants to change what belongs to a successor.
	ErrYielded = errors.New("another agent has taken the node over")
)

// Yield gives what is in force to another Datapath, for Open to take. Open pods go on to
// accept and to dial; nothing of their capture can be changed from here any more.
func (d *Datapath) Yield() error {
	d.mu.Lock()
	d.closed, d.yielded = true, true
	pods := slices.Collect(maps.Values(d.pods))
	d.mu.Unlock()
	for _, p := range pods {
		p.mu.Lock() // what is under way comes to its end
		p.yielded = true
		p.mu.Unlock()
	}
	return d.unlock()
}

// Reclaim brings the listeners of a Datapath that has yielded back, because its successor is
// gone. It changes nothing else: Open another one to serve on. It fails with ErrInUse when
// there is yet another successor.
func (d *Datapath) Reclaim() (err error) {
	d.mu.Lock()
	pods := slices.Collect(maps.Values(d.pods))
	d.mu.Unlock()
	defer func() { err = errors.Join(err, d.unlock()) }()
	for _, dir := range []string{d.cfg.StateDir, d.dir} {
		if err := d.lock(dir); err != nil {
			return err
		}
	}
	var errs []error
	for _, p := range pods {
		p.mu.Lock()
		if !p.closed {
			errs = append(errs, p.registerAll())
		}
		p.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (d *Datapath) unlock() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, l := range d.locks {
		errs = append(errs, l.Close())
	}
	d.locks = nil // Close has nothing to unlock then
	return errors.Join(errs...)
}

// usable says why nothing of the pod can be changed, if so.
func (p *Pod) usable() error {
	switch {
	case p.closed:
		return os.ErrClosed
	case p.yielded:
		return ErrYielded
	}
	return nil
}

// Loadable tries whether the kernel takes the programs. It leaves nothing behind: for an
// agent that asks another one to go on what it can do itself.
func Loadable() error {
	l, err := newLoaded()
	if err != nil {
		return err
	}
	if err := l.build("", nil); err != nil {
		return errors.Join(err, l.close())
	}
	for _, name := range []string{progGuard, progGuardMore} {
		prog, err := l.instance(name, 0)
		if err != nil {
			return errors.Join(fmt.Errorf("try program %s: %w", name, err), l.close())
		}
		_ = prog.Close() // it was never attached
	}
	return l.close()
}
