package kernel_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// commands runs them one after the other.
func commands(lines ...string) func() error {
	return func() error {
		for _, line := range lines {
			fields := strings.Fields(line)
			if out, err := exec.Command(fields[0], fields[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", line, err, out)
			}
		}
		return nil
	}
}

// detach takes every pinned link below dir away from what it is attached to, as
// `bpftool link detach` does: the pins stay.
func detach(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return nil // a map
		}
		return errors.Join(l.Detach(), l.Close())
	})
}

func TestRepairPutsBackWhatIsMissing(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		if mended, err := f.repair(); mended != "" || err != nil {
			t.Fatalf("repaired a sound pod: %s %v", mended, err)
		}
		for _, s := range sabotages(t, f, m) {
			netnstest.Do(t, s.in, s.do)
			mended, err := f.repair()
			if err != nil || !strings.Contains(mended, s.check) {
				t.Errorf("broke %s, repaired %q: %v", s.check, mended, err)
			}
			assertCaptured(t, f)
		}
	})
}

// sabotage is something done behind the agent's back, and the check that it breaks.
type sabotage struct {
	check string
	in    *netns.Namespace
	do    func() error
}

func sabotages(t *testing.T, f *fixture, m mode) []sabotage {
	pod, host := f.web.Namespace, f.node.Namespace
	layouts, err := filepath.Glob(filepath.Join(pinDir(f), "layout-*"))
	if err != nil || len(layouts) != 1 {
		t.Fatalf("layouts %v: %v", layouts, err)
	}
	list := []sabotage{
		{"routing", pod, commands("ip rule del lookup 15001")},
		{"routing", pod, commands("ip -6 rule del lookup 15001")},
		{"routing", pod, commands("ip route flush table 15001", "ip -6 route flush table 15001")},
		{"sysctls", pod, func() error { return os.WriteFile("/proc/sys/net/ipv4/fwmark_reflect", []byte("0"), 0o644) }},
		{"connect hooks", host, func() error { return detach(layouts[0]) }},
	}
	list = append(list, sabotage{"pins", host, func() error { return os.RemoveAll(pinDir(f)) }})
	pins := func() error { return detach(filepath.Join(pinDir(f), "pods")) }
	if m.inbound == kernel.InboundSKLookup || m.tc == kernel.TCX {
		list = append(list, sabotage{"steering", host, pins})
	}
	if m.tc == kernel.TCX {
		list = append(list, sabotage{"guard", host, pins})
	} else {
		list = append(list, sabotage{"guard", host, commands("tc qdisc del dev " + f.web.HostInterface + " clsact")})
	}
	return list
}

// repair repairs what belongs to the node and then the pod.
func (f *fixture) repair() (string, error) {
	ours, err := f.dp.Repair()
	pods, podErr := f.pod.Repair()
	return strings.Join(append(ours, pods...), "; "), errors.Join(err, podErr)
}

func TestNextAgentAttachesWhatWasDetached(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	if err := f.dp.Close(); err != nil {
		t.Fatal(err)
	}
	if err := detach(pinDir(f)); err != nil {
		t.Fatal(err)
	}
	f.open(t)
	f.enrol(t)
	assertCaptured(t, f)
}
