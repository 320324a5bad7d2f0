package kernel

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// settle has what a program says of the kernel's types and functions mean this kernel's, for good.
// To load a program that is not settled takes all of the kernel's types: 10 ms, and some MB of
// garbage, for each of its instances.
func settle(prog *ebpf.ProgramSpec) error {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return fmt.Errorf("read the kernel's types: %w", err)
	}
	settled := prog.Instructions
	var relocations []*btf.CORERelocation
	var relocated []int
	for i := range settled {
		ins := &settled[i]
		if r := btf.CORERelocationMetadata(ins); r != nil {
			relocations, relocated = append(relocations, r), append(relocated, i)
		}
	}
	noLocalTypes := func(btf.Type) (btf.TypeID, error) { return 0, errors.New("types of the program's own") }
	fixups, err := btf.CORERelocate(relocations, []*btf.Spec{kernel}, prog.ByteOrder, noLocalTypes)
	if err != nil {
		return err
	}
	for n, i := range relocated {
		if err := fixups[n].Apply(&settled[i]); err != nil {
			return err
		}
		settled[i] = plain(settled[i]).WithReference(settled[i].Reference())
	}
	for i := range settled {
		ins := &settled[i]
		if !ins.IsKfuncCall() && !ins.IsConstantLoad(asm.DWord) || ins.Reference() == "" {
			continue
		}
		var fn *btf.Func
		if err := kernel.TypeByName(ins.Reference(), &fn); errors.Is(err, btf.ErrNotFound) {
			continue // a weak one: left to the loader
		} else if err != nil {
			return err
		}
		id, err := kernel.TypeID(fn)
		if err != nil {
			return err
		}
		*ins = plain(*ins)
		ins.Constant = int64(id)
	}
	return nil
}

// plain is an instruction of which nothing is left to do at a load.
func plain(ins asm.Instruction) asm.Instruction {
	left := ins.WithMetadata(asm.Metadata{})
	if name := ins.Symbol(); name != "" {
		left = left.WithSymbol(name)
	}
	if source := ins.Source(); source != nil {
		left = left.WithSource(source)
	}
	return left
}
