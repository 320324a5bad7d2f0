package kernel_test

import (
	"context"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// A pod with CAP_NET_ADMIN rewrites, on its own eth0, the address of what the agent says in
// clear to somebody else, so that it would reach a peer:
//
//	agent ── to third ── [eth0: third -> db] ── guard ── db
func TestGuardDropsTheAgentsPacketsWhenThePodReroutesThem(t *testing.T) {
	if netnstest.KernelBefore(6, 6) {
		t.Skip("the pod interferes with tcx, which is in Linux since 6.6")
	}
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		third := f.node.NewPod(t)
		f.enrol(t)
		for _, fam := range families() {
			direct := func(bound time.Duration) error {
				ctx, cancel := context.WithTimeout(t.Context(), bound)
				defer cancel()
				conn, err := f.pod.DialDirect(ctx, netip.AddrPortFrom(fam.of(third), 80))
				if err == nil {
					err = conn.Close()
				}
				return err
			}
			listenOn(t, third, netip.AddrPortFrom(fam.of(third), 80))
			listenOn(t, f.db, netip.AddrPortFrom(fam.of(f.db), 80))
			if err := direct(patience); err != nil {
				t.Fatalf("%s: before the pod interferes: %v", fam.name, err)
			}
			before := f.counter(t, "guard", "dropped_connect")
			rewriteDestination(t, f.web, fam.of(third), fam.of(f.db))
			err := direct(500 * time.Millisecond)
			if f.counter(t, "guard", "dropped_connect") == before {
				t.Errorf("%s: the guard dropped nothing; the dial ended with %v", fam.name, err)
			}
		}
	})
}

// rewriteDestination changes one word of a destination address in what leaves the pod, the
// one in which the pods of a node differ.
func rewriteDestination(t *testing.T, p *netnstest.Pod, from, to netip.Addr) {
	t.Helper()
	offset, at := int32(30), 0 // of the destination in an Ethernet frame with IPv4
	if from.Is6() {
		offset, at = 42, 4
	}
	word := func(a netip.Addr) int64 { return int64(binary.NativeEndian.Uint32(a.AsSlice()[at:])) }
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, offset), asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -8), asm.Mov.Imm(asm.R4, 4),
		asm.FnSkbLoadBytes.Call(),
		asm.LoadMem(asm.R7, asm.R10, -8, asm.Word),
		asm.LoadImm(asm.R8, word(from), asm.DWord),
		asm.JNE.Reg(asm.R7, asm.R8, "out"),
		asm.LoadImm(asm.R8, word(to), asm.DWord),
		asm.StoreMem(asm.R10, -8, asm.R8, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, offset), asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -8), asm.Mov.Imm(asm.R4, 4), asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), // TCX_NEXT
		asm.Return(),
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: program})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = prog.Close() })
	netnstest.Do(t, p.Namespace, func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: p.InterfaceIndex, Program: prog, Attach: ebpf.AttachTCXEgress})
		if err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
		return err
	})
}

func TestHostsNamespaceIsNoPods(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	_, err := f.dp.OpenPod(kernel.PodConfig{UID: "host", NetNS: f.node.Path(), Addrs: []netip.Addr{f.web.Gateway4}})
	if err == nil || !strings.Contains(err.Error(), "host's") {
		t.Errorf("OpenPod = %v", err)
	}
	if adopted := f.dp.Adopted(); len(adopted) > 0 {
		t.Errorf("%v is left", adopted)
	}
}
