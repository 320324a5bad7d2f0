package kernel_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// agentConfig is handed to this test binary run as an agent; see TestMain.
type agentConfig struct {
	Config kernel.Config
	Pod    kernel.PodConfig
	Peers  []netip.Addr // whose UDP is captured, if any
}

// runAgent enrols a pod in a private mount namespace, like that of `ip netns exec`, and
// waits to be killed.
func runAgent(data string) error {
	var cfg agentConfig
	if err := json.Unmarshal([]byte(data), &cfg); err != nil {
		return err
	}
	cfg.Config.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""),
		unix.Unmount("/sys", unix.MNT_DETACH),
		unix.Mount("sysfs", "/sys", "sysfs", 0, ""),
	); err != nil {
		return fmt.Errorf("replace /sys: %w", err)
	}
	dp, err := kernel.Open(cfg.Config)
	if err != nil {
		return err
	}
	pod, err := dp.OpenPod(cfg.Pod)
	if err != nil {
		return err
	}
	if err := errors.Join(pod.CaptureOutbound(), pod.CaptureInbound()); err != nil {
		return err
	}
	if err := captureUDP(dp, pod, cfg.Peers); err != nil {
		return err
	}
	fmt.Println("ready")
	select {}
}

func captureUDP(dp *kernel.Datapath, pod *kernel.Pod, addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	peers := make(map[kernel.Peer][]dataplane.PortRange)
	for _, a := range addrs {
		peers[kernel.Peer{Addr: a}] = []dataplane.PortRange{{First: 5, Last: 5}} // that of a wire's sentinel
	}
	return errors.Join(dp.SetPeers(peers), pod.CaptureUDP(kernel.UDPConfig{}))
}

func TestAgentKilledInPrivateMountNamespaceFailsClosed(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		if err := f.dp.Unload(); err != nil { // the agent comes first, and mounts
			t.Fatal(err)
		}
		cfg := f.cfg
		cfg.Log = nil
		agentCfg := agentConfig{Config: cfg, Pod: kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()}}
		if m.inbound == kernel.InboundSKLookup {
			agentCfg.Peers = f.db.Addrs()
		}
		data, err := json.Marshal(agentCfg)
		if err != nil {
			t.Fatal(err)
		}
		agent := exec.CommandContext(t.Context(), "/proc/self/exe")
		agent.Env = append(os.Environ(), "RACEWAY_TEST_AGENT="+string(data))
		agent.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		agent.Stderr = os.Stderr
		out, err := agent.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		_ = agent.Process.Kill()
		_ = agent.Wait()
		if err != nil || line != "ready\n" {
			t.Fatalf("agent said %q, %v", line, err)
		}
		refused(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		if len(agentCfg.Peers) > 0 {
			w := watch(t, f)
			for _, fam := range families() {
				say(t, bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0)), at(fam.of(f.db), 53), "spoken to nobody")
			}
			if w.arrives(t, "spoken to nobody") {
				t.Error("UDP to a peer is in clear when the agent is killed")
			}
		}

		f.open(t)
		f.openPod(t)
		if err := f.pod.Guard(t.Context()); err != nil {
			t.Fatal(err)
		}
		assertCaptured(t, f)
	})
}
