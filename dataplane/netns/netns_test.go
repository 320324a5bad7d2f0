package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDoVisitsTheNamespaceAndComesHome(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home := inode(t, "/proc/thread-self/ns/net")
	want := inode(t, ns.Path())
	netnstest.Do(t, ns, func() error {
		if got := inode(t, "/proc/thread-self/ns/net"); got != want {
			t.Errorf("inside namespace %d, want %d", got, want)
		}
		return nil
	})
	if got := inode(t, "/proc/thread-self/ns/net"); got != home {
		t.Errorf("after Do in namespace %d, want %d", got, home)
	}
	boom := errors.New("boom")
	if err := ns.Do(func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Do returned %v, want the function's error", err)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestCookieTellsNamespacesApart(t *testing.T) {
	netnstest.Require(t)
	a, b := netnstest.New(t), netnstest.New(t)
	if a.Cookie() == 0 || a.Cookie() == b.Cookie() {
		t.Errorf("cookies %d and %d, want two different ones", a.Cookie(), b.Cookie())
	}
	again, err := netns.Open(a.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Cookie() != a.Cookie() {
		t.Errorf("opened again: cookie %d, want %d", again.Cookie(), a.Cookie())
	}
}

func TestNamespaceIsGoneWithItsName(t *testing.T) {
	netnstest.Require(t)
	dir := t.TempDir()
	first, second := netnstest.New(t), netnstest.New(t)
	name := filepath.Join(dir, "pod")
	if err := os.Symlink(first.Path(), name); err != nil {
		t.Fatal(err)
	}
	ns, err := netns.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if ns.Gone() {
		t.Error("gone while its name leads to it")
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if !ns.Gone() {
		t.Error("not gone without its name")
	}
	if err := os.Symlink(second.Path(), name); err != nil {
		t.Fatal(err)
	}
	if !ns.Gone() {
		t.Error("not gone though its name leads to another")
	}
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	if ns.Gone() {
		t.Error("what is closed was said to be gone")
	}
}

func TestClosedNamespaceIsUnusable(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	for range 2 {
		if err := ns.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := ns.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do after Close: %v, want os.ErrClosed", err)
	}
}

func TestDialReachesListenersOfTheNamespace(t *testing.T) {
	netnstest.Require(t)
	for _, c := range []struct{ name, listen, dial string }{
		{"v4", "127.0.0.1:7000", "127.0.0.1:7000"},
		{"v6", "[::1]:7000", "[::1]:7000"},
		{"v4 on a dual-stack listener", "[::]:7000", "127.0.0.1:7000"},
		{"v4-mapped", "127.0.0.1:7000", "[::ffff:127.0.0.1]:7000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := netnstest.New(t)
			l, err := ns.Listen(netns.ListenConfig{Addr: netip.MustParseAddrPort(c.listen)})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			conn, err := ns.Dial(t.Context(), netns.DialConfig{Remote: netip.MustParseAddrPort(c.dial)})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			peer, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			exchange(t, conn, peer)
		})
	}
}

func exchange(t *testing.T, a, b net.Conn) {
	t.Helper()
	if _, err := io.WriteString(a, "ping"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("read %q, %v", buf, err)
	}
}

func TestDialErrorsAreTheSystemCalls(t *testing.T) {
	netnstest.Require(t)
	node := netnstest.NewNode(t)
	pod := node.NewPod(t)
	for _, c := range []struct {
		name, remote string
		want         error
	}{
		{"closed port on loopback", "127.0.0.1:9", syscall.ECONNREFUSED},
		{"closed port over the veth", "10.88.0.1:9", syscall.ECONNREFUSED},
		{"closed port over the veth, v6", "[fd88:0:0:0::1]:9", syscall.ECONNREFUSED},
		{"no route", "240.0.0.1:9", syscall.ENETUNREACH},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := pod.Namespace
			if errors.Is(c.want, syscall.ENETUNREACH) {
				from = netnstest.New(t)
			}
			conn, err := from.Dial(t.Context(), netns.DialConfig{Remote: netip.MustParseAddrPort(c.remote)})
			if err == nil {
				conn.Close()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestDialHonoursItsContext(t *testing.T) {
	netnstest.Require(t)
	pod := netnstest.NewNode(t).NewPod(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	// Nobody answers ARP for this neighbour, so the connect stays pending.
	_, err := pod.Dial(ctx, netns.DialConfig{Remote: netip.MustParseAddrPort("10.88.0.77:80")})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestTransparentListenerNeedsNoAddress(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	addr := netip.MustParseAddrPort("[100::1]:15001")
	if l, err := ns.Listen(netns.ListenConfig{Addr: addr}); err == nil {
		l.Close()
		t.Error("bound a foreign address without Transparent")
	}
	l, err := ns.Listen(netns.ListenConfig{Addr: addr, Transparent: true})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestControlErrorGivesUp(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	boom := errors.New("boom")
	control := func(int) error { return boom }
	addr := netip.MustParseAddrPort("127.0.0.1:7001")
	if _, err := ns.Listen(netns.ListenConfig{Addr: addr, Control: control}); !errors.Is(err, boom) {
		t.Errorf("Listen: %v", err)
	}
	if _, err := ns.Dial(t.Context(), netns.DialConfig{Remote: addr, Control: control}); !errors.Is(err, boom) {
		t.Errorf("Dial: %v", err)
	}
}
