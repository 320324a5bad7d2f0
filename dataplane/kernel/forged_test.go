package kernel_test

import (
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// markRedirect is the mark that the pod's routing rule sends to lo. Whoever has CAP_NET_RAW
// can set it, and take it off.
const markRedirect = 0x72610

// forge plays a connection with remote to itself: the mark takes it to the agent's listener,
// and without the mark it looks like one that went out by eth0.
func forge(t *testing.T, f *fixture, remote netip.AddrPort) (app *net.TCPConn, agents net.Conn) {
	t.Helper()
	app = dialMarked(t, f, remote, markRedirect)
	agents = accept(t, f.pod.Outbound())
	setMark(t, app, 0)
	return app, agents
}

// says injects a segment with the addresses of a connection, and reports what the guard let out.
func (w *wire) says(t *testing.T, local, remote netip.AddrPort, flags func(*layers.TCP)) bool {
	t.Helper()
	segment := &layers.TCP{SrcPort: layers.TCPPort(local.Port()), DstPort: layers.TCPPort(remote.Port()), DataOffset: 5}
	flags(segment)
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(w.ip4(layers.IPProtocolTCP)), segment, gopacket.Payload(nonce))
	return w.arrives(t, nonce)
}

func (f *fixture) capture(t *testing.T) {
	t.Helper()
	for _, step := range []func() error{f.pod.CaptureOutbound, f.pod.CaptureInbound, func() error { return f.pod.Guard(t.Context()) }} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestForgedConnectionsAreNotOlderOnes(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		f.openPod(t)
		remote := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.db.V4, port) }
		held, _ := forge(t, f, remote(1))
		left, agents := forge(t, f, remote(2)) // in CLOSE_WAIT, its peer in FIN_WAIT2
		if err := agents.Close(); err != nil {
			t.Fatal(err)
		}
		// What the agent's end says is not heard, so nothing tells that it came by lo.
		deaf, agents := forge(t, f, remote(3))
		deafen(t, deaf)
		abort(t, agents)
		// Here it is what has been heard that tells.
		heard, agents := forge(t, f, remote(4))
		send(t, agents, heard, "by lo")
		deafen(t, heard)
		abort(t, agents)
		f.capture(t)
		if got := f.pod.Bypassing(); got != 0 {
			t.Errorf("%d forged connections bypass", got)
		}
		w := newWire(t, f.node, f.web, f.db)
		for _, app := range []*net.TCPConn{held, left, deaf, heard} {
			local, to := addrPort(app.LocalAddr()), addrPort(app.RemoteAddr())
			if w.says(t, local, to, ack) || w.says(t, local, to, syn) {
				t.Errorf("what looks like %v -> %v got out", local, to)
			}
		}
	})
}

// abort leaves nothing of a connection.
func abort(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.(interface{ SetLinger(sec int) error }).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
}

// deafen makes a socket drop all that it receives; no capability is needed for that.
func deafen(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	control(t, conn, deafenFD)
}

func deafenFD(fd int) error {
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
}

// opening starts a connection that is not answered, as long as it drops what it receives.
func opening(t *testing.T, f *fixture, remote netip.AddrPort, deaf bool) (fd int, local netip.AddrPort) {
	t.Helper()
	netnstest.Do(t, f.web.Namespace, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if deaf {
			if err := deafenFD(fd); err != nil {
				return err
			}
		}
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(remote.Port()), Addr: remote.Addr().As4()})
		if err != unix.EINPROGRESS {
			t.Errorf("connect: %v", err)
		}
		return nil
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := sa.(*unix.SockaddrInet4)
	return fd, netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port))
}

func TestOnlyConnectionsThatWereOpeningMayOpen(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		at := netip.AddrPortFrom(f.db.V4, 3306)
		db := listenOn(t, f.db, at)
		complete := dial(t, f.web.Namespace, at)
		accept(t, db)
		fd, local := opening(t, f, at, true)
		f.openPod(t)
		if err := f.pod.CaptureOutbound(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(150 * time.Millisecond) // a connect() that began before has had its time
		// This one was captured, and is made to look as if it were not.
		late, _ := opening(t, f, netip.AddrPortFrom(f.db.V4, 3307), true)
		if err := unix.SetsockoptInt(late, unix.SOL_SOCKET, unix.SO_MARK, 0); err != nil {
			t.Fatal(err)
		}
		f.capture(t)
		if bypassing, opening := f.pod.Bypassing(), f.pod.Opening(); bypassing != 2 || opening != 1 {
			t.Errorf("%d connections bypass, %d of them are opening; want 2 and 1", bypassing, opening)
		}
		w := newWire(t, f.node, f.web, f.db)
		if w.says(t, addrPort(complete.LocalAddr()), at, syn) {
			t.Error("a SYN passed for a connection that was complete")
		}
		if !w.says(t, local, at, syn) {
			t.Error("a connection that was opening may not open")
		}
		// Once it is answered it has no more SYNs to send.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the opening connection completes", func() bool {
			if err := f.pod.Prune(); err != nil {
				t.Fatal(err)
			}
			return f.pod.Opening() == 0
		})
		if got := f.pod.Bypassing(); got != 2 {
			t.Errorf("%d connections bypass once both are complete, want 2", got)
		}
		if w.says(t, local, at, syn) {
			t.Error("a SYN passed for a connection that has been answered")
		}
	})
}

// A tuple must not stay open for a captured connection that took it over.
func TestCapturedConnectionDoesNotKeepAnOldTupleAlive(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		at := netip.AddrPortFrom(f.db.V4, 3306)
		db := listenOn(t, f.db, at)
		older := dial(t, f.web.Namespace, at)
		accept(t, db)
		f.enrol(t)
		local := addrPort(older.LocalAddr())
		_ = older.SetLinger(0)
		_ = older.Close()
		again := dialWith(t, f.web.Namespace, netns.DialConfig{Remote: at, Local: local})
		accept(t, f.pod.Outbound())
		setMark(t, again, 0)
		if err := f.pod.Prune(); err != nil {
			t.Fatal(err)
		}
		if got := f.pod.Bypassing(); got != 0 {
			t.Errorf("%d connections bypass", got)
		}
	})
}

// An agent with another layout of the maps takes the noted connections over as they are. A
// new list would have what was forged since.
func TestNewLayoutAdmitsNothingNew(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		at := netip.AddrPortFrom(f.db.V4, 3306)
		db := listenOn(t, f.db, at)
		older := dial(t, f.web.Namespace, at)
		peer := accept(t, db)
		other := dial(t, f.web.Namespace, at)
		accept(t, db)
		f.enrol(t)
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		strike(t, f, addrPort(other.LocalAddr()).Port())
		pretendOlderLayout(t, f)
		f.open(t)
		f.openPod(t)
		if got := f.pod.Bypassing(); got != 1 {
			t.Errorf("%d connections bypass, want the one that was noted", got)
		}
		send(t, older, peer, "noted")
		if newWire(t, f.node, f.web, f.db).says(t, addrPort(other.LocalAddr()), at, ack) {
			t.Error("a connection that was not noted got out")
		}
	})
}

// strike takes the connections from a port off the map of older ones.
func strike(t *testing.T, f *fixture, port uint16) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(pinDir(f), "layout-*", "established"))
	if err != nil || len(paths) != 1 {
		t.Fatalf("maps %v: %v", paths, err)
	}
	older, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer older.Close()
	var key bpf.RacewayTuple
	var stage bpf.RacewayStage
	for entries := older.Iterate(); entries.Next(&key, &stage); {
		if key.LocalPort != port {
			continue
		}
		if err := older.Delete(key); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no connection from port %d is noted", port)
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}
