package agent

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/certs/certstest"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/dataplane/sandbox"
)

func enrolledPod(name string, pod *netnstest.Pod) dataplane.Workload {
	return dataplane.Workload{
		UID: name, Name: dataplane.Name{Namespace: "shop", Name: name}, Node: "n1", NetNS: pod.Path(), Addrs: pod.Addrs(),
		Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}, ServiceAccount: name, Phase: dataplane.PodRunning,
	}
}

// arrival is the cluster of a test: db is captured, web's network is being set up.
type arrival struct {
	a       *Agent
	web     dataplane.Workload
	db      dataplane.Workload
	stopped int
}

func (c *arrival) Started(_ context.Context, s discovery.Sandbox) (dataplane.Workload, error) {
	c.web.NetNS, c.web.Addrs, c.web.Starting = s.NetNS, s.Addrs, true
	return *c.publish().Workload(c.web.UID), nil
}

func (c *arrival) sandbox(pod *netnstest.Pod) discovery.Sandbox {
	return discovery.Sandbox{Pod: c.web.Name, UID: c.web.UID, NetNS: pod.Path(), Addrs: pod.Addrs()}
}

func (c *arrival) Stopped(dataplane.Name, string) { c.stopped++ }

func (c *arrival) publish() *dataplane.Snapshot {
	contents := shop(c.web, c.db)
	contents.Captured = map[string]bool{"db": true}
	s := dataplane.NewSnapshot(contents)
	c.a.store.Publish(s)
	return s
}

// A process that starts when Add returns is captured from its first packet on.
func TestPodIsCapturedBeforeAnythingRunsInIt(t *testing.T) {
	p, host, _ := newPods(t)
	web, db := host.NewPod(t), host.NewPod(t)
	frames := sniff(t, web.Namespace)
	c := &arrival{web: enrolledPod("web", web), db: enrolledPod("db", db)}
	c.web.NetNS, c.web.Addrs, c.web.Phase = "", nil, dataplane.PodPending
	c.a = serve(t, p, c.db)
	c.a.sandboxes = c
	within(t, "db is captured", func() bool { return c.a.reconciler.Status()["db"].State == dataplane.CaptureInForce })
	c.publish()
	server := echoServer(t, db.Namespace, netip.AddrPortFrom(db.V4, 3306))

	began := time.Now()
	s := c.sandbox(web)
	captured, err := arrivals{c.a}.Add(t.Context(), s)
	if !captured || err != nil {
		t.Fatalf("captured %v, %v", captured, err)
	}
	t.Logf("capture was in force after %v", time.Since(began))
	echoes(t, dialEcho(t, web.Namespace, server))
	if err := (arrivals{c.a}).Check(t.Context(), s); err != nil {
		t.Errorf("check: %v", err)
	}
	if again, err := (arrivals{c.a}).Add(t.Context(), s); !again || err != nil {
		t.Errorf("add of the same: %v, %v", again, err)
	}
	tunnels := 0
	for _, frame := range frames() {
		if bytes.Contains(frame, []byte("echo")) {
			t.Errorf("plaintext left the pod: %q", frame)
		}
		switch toPort(frame) {
		case dataplane.PortTunnel:
			tunnels++
		case 3306:
			t.Errorf("a segment to the application left the pod: %x", frame)
		}
	}
	if tunnels == 0 {
		t.Error("no segment of a tunnel was seen, so the absence of others proves nothing")
	}

	// It runs, and its agent goes on with it as it is.
	prepared := p.get("web")
	c.web.Starting, c.web.NetNS, c.web.Phase = false, "", dataplane.PodRunning
	c.publish()
	within(t, "web is captured", func() bool { return c.a.reconciler.Status()["web"].State == dataplane.CaptureInForce })
	if p.get("web") != prepared {
		t.Error("it was prepared anew")
	}
}

func TestAddNamesWhatItWaitsFor(t *testing.T) {
	p, host, _ := newPods(t)
	web := host.NewPod(t)
	c := &arrival{web: enrolledPod("web", web), db: enrolledPod("db", web)}
	c.db.Labels = nil
	c.a = serve(t, p)
	c.a.sandboxes = c
	s := c.sandbox(web)
	s.NetNS += "-none"
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	captured, err := arrivals{c.a}.Add(ctx, s)
	if captured || err == nil || !strings.Contains(err.Error(), "shop/web") || !strings.Contains(err.Error(), "no such file") || errors.Is(err, node.ErrNotReady) {
		t.Errorf("captured %v, %v", captured, err)
	}
	if err := (arrivals{c.a}).Check(t.Context(), s); err == nil || !strings.Contains(err.Error(), "not in force") {
		t.Errorf("check: %v", err)
	}
	if err := (arrivals{c.a}).Del(t.Context(), s); err != nil || c.stopped != 1 {
		t.Errorf("stopped %d times, %v", c.stopped, err)
	}
	// The runtime tries again, with another namespace.
	s.NetNS = web.Path()
	if captured, err := (arrivals{c.a}).Add(t.Context(), s); !captured || err != nil {
		t.Errorf("again: captured %v, %v", captured, err)
	}
}

// sniff returns what reads the frames that pass the pod's interfaces from now on.
func sniff(t *testing.T, ns *netns.Namespace) func() [][]byte {
	t.Helper()
	fd := -1
	netnstest.Do(t, ns, func() (err error) {
		protocol := int(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00) // in network byte order
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		return err
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	return func() (frames [][]byte) {
		for {
			buf := make([]byte, 64<<10)
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EAGAIN) {
				return frames
			}
			if err != nil {
				t.Fatal(err)
			}
			// lo is the way from the application to the agent.
			if at, ok := from.(*unix.SockaddrLinklayer); ok && at.Hatype != unix.ARPHRD_LOOPBACK {
				frames = append(frames, buf[:n])
			}
		}
	}
}

// toPort is the destination port of a TCP segment in IPv4 without options; 0 for others.
func toPort(frame []byte) uint16 {
	const ethernet, ip = 14, 20
	if len(frame) < ethernet+ip+4 || frame[12] != 8 || frame[13] != 0 || frame[ethernet+9] != unix.IPPROTO_TCP {
		return 0
	}
	return uint16(frame[ethernet+ip+2])<<8 | uint16(frame[ethernet+ip+3])
}

// While the CA is away, a pod whose identity has a certificate on the node starts, and
// another one waits outside instead of running without being able to talk to anybody.
func TestNewPodNeedsACertificate(t *testing.T) {
	p, host, _ := newPods(t)
	ca := certstest.New(t, "cluster.local")
	p.keeper = ca.Keeper(t)
	web, db := host.NewPod(t), host.NewPod(t)
	c := &arrival{web: enrolledPod("web", web), db: enrolledPod("db", db)}
	c.a = serve(t, p, c.db)
	c.a.sandboxes = c
	within(t, "db is captured", func() bool { return c.a.reconciler.Status()["db"].State == dataplane.CaptureInForce })
	ca.FailWith(errors.New("the CA is away"))
	c.web.ServiceAccount = "db"
	if captured, err := (arrivals{c.a}).Add(t.Context(), c.sandbox(web)); !captured || err != nil {
		t.Errorf("with the identity of db: captured %v, %v", captured, err)
	}
	late := host.NewPod(t)
	c.web = enrolledPod("late", late)
	ctx, cancel := context.WithTimeout(t.Context(), certificateWait+time.Second)
	defer cancel()
	if captured, err := (arrivals{c.a}).Add(ctx, c.sandbox(late)); captured || err == nil || !strings.Contains(err.Error(), "the CA is away") {
		t.Errorf("with an identity of its own: captured %v, %v", captured, err)
	}
}

// A pod that was there before the agent names no network namespace; it is found.
func TestPodThatWasThereIsFound(t *testing.T) {
	p, host, _ := newPods(t)
	web := host.NewPod(t)
	proc, hash := t.TempDir(), "0123456789abcdef0123456789abcdef"
	process := filepath.Join(proc, "4711")
	for name, text := range map[string]string{
		"cgroup": "0::/kubepods/pod" + hash + "/x\n", "stat": "4711 (pause) S" + strings.Repeat(" 1", 30),
	} {
		if err := errors.Join(os.MkdirAll(filepath.Join(process, "ns"), 0o700), os.WriteFile(filepath.Join(process, name), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(web.Path(), filepath.Join(process, "ns", "net")); err != nil {
		t.Fatal(err)
	}
	p.finder = sandbox.New(sandbox.Config{Proc: proc, HostNetNS: host.Path(), Fresh: time.Nanosecond})
	pod := enrolledPod("web", web)
	pod.NetNS, pod.StaticHash = "", hash
	a := serve(t, p, pod)
	within(t, "it is captured", func() bool { return a.reconciler.Status()["web"].State == dataplane.CaptureInForce })
	if p.get("web").Vanished() {
		t.Error("the path that it was found at leads elsewhere")
	}
}
