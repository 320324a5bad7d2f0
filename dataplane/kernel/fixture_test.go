package kernel_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestMain(m *testing.M) {
	if cfg, ok := os.LookupEnv("RACEWAY_TEST_AGENT"); ok {
		fmt.Fprintln(os.Stderr, runAgent(cfg))
		os.Exit(1)
	}
	if os.Getenv("RACEWAY_TEST_DIALLER") != "" {
		fmt.Fprintln(os.Stderr, runDialler())
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// patience bounds what must happen; nothing waits that long when all is well.
const patience = 5 * time.Second

// fixture is a node with an enrolled pod and a plain one:
//
//	web (enrolled) ── guard ── node ── db (plain)
type fixture struct {
	node    *netnstest.Node
	web, db *netnstest.Pod
	cfg     kernel.Config
	dp      *kernel.Datapath
	pod     *kernel.Pod
}

type mode struct {
	name    string
	inbound kernel.InboundMode
	tc      kernel.TCMode
}

// modes are those that this kernel has: tcx is in Linux since 6.6.
func modes() []mode {
	all := []mode{
		{"sk_lookup+tcx", kernel.InboundSKLookup, kernel.TCX},
		{"sk_lookup+clsact", kernel.InboundSKLookup, kernel.TCClsact},
		{"tc+tcx", kernel.InboundTC, kernel.TCX},
		{"tc+clsact", kernel.InboundTC, kernel.TCClsact},
	}
	if netnstest.KernelBefore(6, 6) {
		return slices.DeleteFunc(all, func(m mode) bool { return m.tc == kernel.TCX })
	}
	return all
}

func inAllModes(t *testing.T, test func(t *testing.T, m mode)) {
	netnstest.Require(t)
	for _, m := range modes() {
		t.Run(m.name, func(t *testing.T) { test(t, m) })
	}
}

// newFixture loads the data plane; the pod is neither open nor enrolled.
func newFixture(t testing.TB, m mode) *fixture {
	t.Helper()
	node := netnstest.NewNode(t)
	f := &fixture{node: node, web: node.NewPod(t), db: node.NewPod(t)}
	f.cfg = kernel.Config{
		Dir:       "/sys/fs/bpf/raceway-test-" + strings.ToLower(rand.Text()[:10]),
		StateDir:  t.TempDir(),
		HostNetNS: node.Path(),
		Inbound:   m.inbound,
		TC:        m.tc,
		Log:       slog.New(slog.DiscardHandler),
	}
	f.open(t)
	t.Cleanup(func() {
		if err := f.dp.Unload(); err != nil {
			t.Errorf("Unload: %v", err)
		}
		if _, err := os.Stat(pinDir(f)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("pins are left in %s: %v", pinDir(f), err)
		}
	})
	return f
}

func (f *fixture) open(t testing.TB) {
	t.Helper()
	var err error
	if f.dp, err = kernel.Open(f.cfg); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) openPod(t testing.TB) {
	t.Helper()
	var err error
	f.pod, err = f.dp.OpenPod(kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()})
	if err != nil {
		t.Fatal(err)
	}
}

// enrol goes all the way to a guarded pod.
func (f *fixture) enrol(t testing.TB) {
	t.Helper()
	f.openPod(t)
	for _, step := range []func() error{
		f.pod.CaptureOutbound,
		f.pod.CaptureInbound,
		func() error { return f.pod.Guard(t.Context()) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

func enrolled(t testing.TB, m mode) *fixture {
	t.Helper()
	f := newFixture(t, m)
	f.enrol(t)
	return f
}

// counter returns the value of one counter.
func (f *fixture) counter(t *testing.T, hook, reason string) uint64 {
	t.Helper()
	counters, err := f.dp.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range counters {
		if c.Hook == hook && c.Reason == reason {
			return c.Value
		}
	}
	t.Fatalf("there is no counter %s %s", hook, reason)
	return 0
}

// dial connects as an application would.
func dial(t testing.TB, ns *netns.Namespace, remote netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := tryDial(t, ns, remote, patience)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func tryDial(t testing.TB, ns *netns.Namespace, remote netip.AddrPort, bound time.Duration) (*net.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	conn, err := ns.Dial(ctx, netns.DialConfig{Remote: remote})
	if err == nil {
		t.Cleanup(func() { _ = conn.Close() })
	}
	return conn, err
}

func accept(t testing.TB, l net.Listener) net.Conn {
	t.Helper()
	if err := l.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// send writes text to a and expects it at b.
func send(t *testing.T, a, b net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(a, text); err != nil {
		t.Fatal(err)
	}
	receive(t, b, text)
}

func receive(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != text {
		t.Fatalf("received %q, %v; want %q", buf, err, text)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &ne) && ne.Timeout())
}

// family is one way to spell the addresses of a pod.
type family struct {
	name string
	of   func(p *netnstest.Pod) netip.Addr
}

func families() []family {
	return []family{
		{"v4", func(p *netnstest.Pod) netip.Addr { return p.V4 }},
		{"v6", func(p *netnstest.Pod) netip.Addr { return p.V6 }},
	}
}

func listenOn(t testing.TB, p *netnstest.Pod, at netip.AddrPort) net.Listener {
	t.Helper()
	return netnstest.Listen(t, p.Namespace, "tcp", at.String())
}
