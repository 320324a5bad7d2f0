package netns_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

func connect(t *testing.T, ns *netns.Namespace, to net.Addr) *netns.Conn {
	t.Helper()
	c, err := ns.Connect(t.Context(), netns.DialConfig{Remote: to.(*net.TCPAddr).AddrPort()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestConnIsLikeOneOfPackageNet(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l := netnstest.Listen(t, ns, "tcp", at)
		c := connect(t, ns, l.Addr())
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		if c.LocalAddr().String() != far.RemoteAddr().String() || c.RemoteAddr().String() != l.Addr().String() {
			t.Errorf("from %v to %v, but the other end says from %v to %v", c.LocalAddr(), c.RemoteAddr(), far.RemoteAddr(), l.Addr())
		}
		if _, err := c.Write([]byte("there")); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if all, err := io.ReadAll(far); string(all) != "there" || err != nil {
			t.Errorf("the other end read %q, %v", all, err)
		}
		if err := c.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read past its deadline: %v", err)
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		waits := make(chan error, 1)
		go func() { waits <- raw.Read(func(uintptr) bool { return false }) }()
		time.Sleep(10 * time.Millisecond)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-waits; !errors.Is(err, net.ErrClosed) {
			t.Errorf("who waited when it was closed was told %v", err)
		}
		for deed, err := range map[string]error{"Close": c.Close(), "CloseWrite": c.CloseWrite(), "SetLinger": c.SetLinger(0)} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s after Close: %v", deed, err)
			}
		}
	}
}

func TestConnLingers(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	for linger, want := range map[int]error{0: syscall.ECONNRESET, -1: io.EOF} {
		l := netnstest.Listen(t, ns, "tcp", "127.0.0.1:0")
		c := connect(t, ns, l.Addr())
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		if err := errors.Join(c.SetLinger(0), c.SetLinger(linger), c.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, want) {
			t.Errorf("linger %d: the other end read %v, want %v", linger, err, want)
		}
	}
}

// The first bytes take the ACK of the handshake along, and the end goes with the last bytes: each saves a
// segment. Only a test that stands still for 200 ms sees them go by themselves, and is repeated.
func TestACKAndEndGoWithBytes(t *testing.T) {
	netnstest.Require(t)
	ns := netnstest.New(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		for _, c := range []struct {
			name           string
			deferACK, last bool
			want           uint32
		}{
			{"each by itself", false, false, 4}, // SYN, ACK, bytes, FIN
			{"the ACK with bytes", true, false, 3},
			{"the end with bytes", false, true, 3},
			{"all with bytes", true, true, 2},
		} {
			l := netnstest.Listen(t, ns, "tcp", at)
			var sent uint32
			for standing := true; standing; {
				began := time.Now()
				sent = segments(t, ns, l, c.deferACK, c.last)
				standing = time.Since(began) > 100*time.Millisecond
			}
			if sent != c.want {
				t.Errorf("%s, %s: %d segments, want %d", at, c.name, sent, c.want)
			}
		}
	}
}

// segments connects, says "bye", and returns how many segments that took.
func segments(t *testing.T, ns *netns.Namespace, l net.Listener, deferACK, last bool) uint32 {
	t.Helper()
	c, err := ns.Connect(t.Context(), netns.DialConfig{Remote: l.Addr().(*net.TCPAddr).AddrPort(), DeferACK: deferACK})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Send([]byte("bye"), last); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var info unix.TCPInfo
	if err := c.Use(func(fd int) { info, err = nonblock.TCPInfo(uintptr(fd)) }); err != nil || info.Segs_out == 0 {
		t.Fatal(info, err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if got, err := io.ReadAll(far); string(got) != "bye" || err != nil {
		t.Fatalf("the other end read %q, %v", got, err)
	}
	return info.Segs_out
}

// Sockets that are made in stock belong to the namespace, and none is kept for long.
func TestManyConnectionsLeaveNoSocketsBehind(t *testing.T) {
	netnstest.Require(t)
	before := descriptors(t)
	ns, other := netnstest.New(t), netnstest.New(t)
	l := netnstest.Listen(t, ns, "tcp", "127.0.0.1:0")
	most := 0
	for range 50 {
		if err := connect(t, ns, l.Addr()).Close(); err != nil {
			t.Fatal(err)
		}
		to := l.Addr().(*net.TCPAddr).AddrPort()
		if c, err := other.Connect(t.Context(), netns.DialConfig{Remote: to}); err == nil {
			t.Fatalf("%v reached %v, which is in another namespace", c.LocalAddr(), to)
		}
		most = max(most, descriptors(t))
	}
	if most <= before+3 {
		t.Error("there never was any in stock: this test would not notice what becomes of it")
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		n := descriptors(t)
		if n <= before+3 { // both namespaces and the listener
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors, %d before", n, before)
		}
	}
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.Connect(t.Context(), netns.DialConfig{Remote: netip.MustParseAddrPort("127.0.0.1:1")}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Connect in a closed namespace: %v", err)
	}
}

func TestClosedNamespaceKeepsNoSockets(t *testing.T) {
	netnstest.Require(t)
	before := descriptors(t)
	ns := netnstest.New(t)
	for range 3 {
		if _, err := ns.Connect(t.Context(), netns.DialConfig{Remote: netip.MustParseAddrPort("127.0.0.1:1")}); err == nil {
			t.Fatal("connected to nobody")
		}
	}
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
