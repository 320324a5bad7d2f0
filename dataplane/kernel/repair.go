package kernel

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/raceway-mesh/raceway/bpf"
)

// part is something that capture rests on, how to see whether it is there, and how to put
// it back.
type part struct {
	name  string
	check func() error
	mend  func() error
}

// repair puts back what a check misses, and returns the checks that hold again because of it.
func repair(parts []part) (mended []string, err error) {
	var errs []error
	for _, p := range parts {
		cause := p.check()
		if cause == nil {
			continue
		}
		if err := p.mend(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w, and putting it back: %w", p.name, cause, err))
			continue
		}
		if err := p.check(); err != nil {
			errs = append(errs, fmt.Errorf("%s: put back, but: %w", p.name, err))
			continue
		}
		mended = append(mended, p.name+": "+cause.Error())
	}
	return mended, errors.Join(errs...)
}

// Repair puts the hooks of the node back if somebody detached them, and says what was missing.
func (d *Datapath) Repair() (mended []string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, nil
	}
	mended, err = repair([]part{
		{"pins", d.checkPins, d.mendPins},
		{"connect hooks", d.checkHooks, d.mendHooks},
	})
	probes, probesErr := d.repairProbes()
	direct, directErr := d.repairDirect()
	return slices.Concat(mended, probes, direct), errors.Join(err, probesErr, directErr)
}

// checkPins looks for the maps where the next agent does.
func (d *Datapath) checkPins() error {
	for _, pin := range slices.Sorted(maps.Keys(d.loaded.pinnedMaps())) {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
	}
	return nil
}

// mendPins makes the directories too: somebody may have removed all of it.
func (d *Datapath) mendPins() error {
	var errs []error
	for pin, m := range d.loaded.pinnedMaps() {
		if _, err := os.Stat(pin); err == nil {
			continue
		}
		errs = append(errs, os.MkdirAll(filepath.Dir(pin), 0o700), pinAgain(m, pin))
	}
	return errors.Join(errs...)
}

// pinAgain pins a duplicate: the map itself believes that it is pinned.
func pinAgain(m *ebpf.Map, pin string) error {
	again, err := m.Clone()
	if err != nil {
		return err
	}
	return errors.Join(again.Pin(pin), again.Close())
}

func (d *Datapath) mendHooks() error {
	for _, h := range connectHooks() {
		if _, err := d.loaded.renewHook(h, d.cfg); err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
	}
	return nil
}

// Repair puts back what should be in force for the pod and is not: its namespace belongs to
// others as well, who may flush rules or set sysctls, and its veth pair may be made anew.
// It says what was missing. A step of enrolment that was not taken yet is not taken here.
func (p *Pod) Repair() (mended []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.usable() != nil {
		return nil, nil
	}
	parts := []part{
		{"routing", p.checkRouting, p.setUpRouting},
		{"sysctls", p.checkSysctls, p.setUpRouting},
		{"entry", p.checkEntry, p.enter},
		{"listeners", p.checkListeners, p.registerAll},
		{"steering", p.checkInbound, p.attachInbound},
		{"udp", p.checkUDP, p.openUDP},
	}
	if p.rec.HostIfindex != 0 && !p.d.cfg.DisableGuard {
		// What got out while the guard was off is not older than the enrolment.
		parts = append(parts, part{"guard", p.checkGuard, p.attachGuard})
	}
	if mended, err = repair(parts); err != nil {
		err = fmt.Errorf("repair pod %s: %w", p.uid, err)
	}
	return mended, err
}

// checkEntry compares the programs' view of the pod with the record.
func (p *Pod) checkEntry() error {
	var v bpf.RacewayPod
	if err := p.d.loaded.maps.Pods.Lookup(p.rec.Cookie, &v); err != nil {
		return fmt.Errorf("the pod is not in the map: %w", err)
	}
	if v != podValue(p.rec) {
		return errors.New("the pod's entry in the map was changed")
	}
	return nil
}

func (p *Pod) enter() error {
	if err := p.d.loaded.enter(p.rec); err != nil {
		return fmt.Errorf("enter the pod: %w", err)
	}
	return nil
}

// registerAll makes the listeners known again. It cannot revive one that was destroyed.
func (p *Pod) registerAll() error {
	if err := p.registerTCP(); err != nil {
		return err
	}
	return p.registerUDP()
}
