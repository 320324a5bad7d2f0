package kernel

import (
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// Nothing of a settled program is left to be looked up in the kernel's types.
func TestSettledProgramNeedsNoTypes(t *testing.T) {
	if _, err := btf.LoadKernelSpec(); err != nil {
		t.Skip(err)
	}
	if netnstest.KernelBefore(6, 2) {
		t.Skip("bpf_rdonly_cast is in Linux since 6.2")
	}
	spec, err := bpf.LoadRaceway()
	if err != nil {
		t.Fatal(err)
	}
	divert := spec.Programs[progDivert]
	left := func() (n int) {
		for i := range divert.Instructions {
			ins := &divert.Instructions[i]
			if btf.CORERelocationMetadata(ins) != nil || ins.IsKfuncCall() && ins.Constant == -1 {
				n++
			}
		}
		return n
	}
	if left() == 0 {
		t.Fatal("nothing is to be looked up: the test proves nothing")
	}
	if err := settle(divert); err != nil {
		t.Fatal(err)
	}
	if n := left(); n > 0 {
		t.Errorf("%d instructions are not settled", n)
	}
}
