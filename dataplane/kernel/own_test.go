package kernel_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// The agent's own traffic passes the guard whatever the kernel makes of it.
func TestGuardPassesTheAgentsTraffic(t *testing.T) {
	netnstest.Require(t)
	payload := make([]byte, 4<<20)
	if _, err := rand.Read(payload); err != nil {
		t.Fatal(err)
	}
	for _, m := range modes()[:2] {
		for _, fam := range families() {
			t.Run(m.name+"/"+fam.name, func(t *testing.T) {
				f := enrolled(t, m)
				at := netip.AddrPortFrom(fam.of(f.db), 3306)
				server := netnstest.Listen(t, f.db.Namespace, "tcp", at.String())
				for _, c := range []struct {
					name string
					send func(t *testing.T, conn *net.TCPConn)
				}{
					{"write and close", func(t *testing.T, conn *net.TCPConn) { write(t, conn, payload) }},
					{"sendfile", func(t *testing.T, conn *net.TCPConn) { sendfile(t, conn, payload) }},
					{"splice", func(t *testing.T, conn *net.TCPConn) { splice(t, f, conn, payload) }},
					{"data in the FIN", func(t *testing.T, conn *net.TCPConn) {
						control(t, conn, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_CORK, 1) })
						write(t, conn, payload[:100])
					}},
				} {
					t.Run(c.name, func(t *testing.T) {
						conn, err := f.pod.DialTunnel(t.Context(), at)
						if err != nil {
							t.Fatal(err)
						}
						received := collect(accept(t, server))
						c.send(t, conn)
						if err := conn.Close(); err != nil {
							t.Fatal(err)
						}
						want := payload
						if c.name == "data in the FIN" {
							want = payload[:100]
						}
						if got := <-received; !bytes.Equal(got, want) {
							t.Errorf("%d bytes arrived, want %d equal ones", len(got), len(want))
						}
					})
				}
				if n := f.counter(t, "guard", "dropped_payload") + f.counter(t, "guard", "dropped_connect"); n != 0 {
					t.Errorf("the guard dropped %d packets", n)
				}
			})
		}
	}
}

func write(t *testing.T, conn net.Conn, payload []byte) {
	t.Helper()
	if err := conn.SetWriteDeadline(time.Now().Add(4 * patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(payload); err != nil {
		t.Fatal(err)
	}
}

// collect reads to the end.
func collect(conn net.Conn) <-chan []byte {
	done := make(chan []byte, 1)
	go func() {
		_ = conn.SetReadDeadline(time.Now().Add(4 * patience))
		data, _ := io.ReadAll(conn) // what is missing shows
		done <- data
	}()
	return done
}

func sendfile(t *testing.T, conn *net.TCPConn, payload []byte) {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	ok := func(_ int, err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(file.Write(payload))
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ReadFrom(file); err != nil {
		t.Fatal(err)
	}
}

// splice sends what arrives on another connection, as the proxy does.
func splice(t *testing.T, f *fixture, conn *net.TCPConn, payload []byte) {
	t.Helper()
	app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 1))
	captured := accept(t, f.pod.Outbound())
	go func() {
		_, _ = app.Write(payload) // what is missing shows at the other end
		_ = app.Close()
	}()
	raw, err := captured.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var from net.Conn // package net splices between its own
	var failure error
	err = raw.Control(func(fd uintptr) {
		var copied int
		if copied, failure = unix.Dup(int(fd)); failure != nil {
			return
		}
		file := os.NewFile(uintptr(copied), "captured")
		defer file.Close()
		from, failure = net.FileConn(file)
	})
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := conn.ReadFrom(from); err != nil {
		t.Fatal(err)
	}
}

// A socket that was closed with data unsent is an orphan: no process has it, and the
// kernel sends the rest, retransmits included, on its own.
func TestGuardPassesOrphansAndRetransmits(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	at := netip.AddrPortFrom(f.db.V4, 3306)
	server := netnstest.Listen(t, f.db.Namespace, "tcp", at.String())
	conn, err := f.pod.DialTunnel(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	peer := accept(t, server)
	payload := make([]byte, 64<<10)
	if _, err := rand.Read(payload); err != nil {
		t.Fatal(err)
	}
	// Nobody reads it before it is closed.
	if err := conn.SetWriteBuffer(4 * len(payload)); err != nil {
		t.Fatal(err)
	}
	before := retransmits(t, f)
	linkState(t, f, f.db.HostInterface, false)
	write(t, conn, payload)
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for retransmits(t, f) == before {
		if time.Now().After(deadline) {
			t.Fatal("no retransmission happened")
		}
		time.Sleep(20 * time.Millisecond)
	}
	linkState(t, f, f.db.HostInterface, true)
	if got := <-collect(peer); !bytes.Equal(got, payload) {
		t.Errorf("%d bytes arrived, want %d equal ones", len(got), len(payload))
	}
	if n := f.counter(t, "guard", "dropped_payload"); n != 0 {
		t.Errorf("the guard dropped %d packets", n)
	}
}

func linkState(t *testing.T, f *fixture, name string, up bool) {
	t.Helper()
	netnstest.Do(t, f.node.Namespace, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if up {
			return netlink.LinkSetUp(l)
		}
		return netlink.LinkSetDown(l)
	})
}

// retransmits reads Tcp RetransSegs of the enrolled pod.
func retransmits(t *testing.T, f *fixture) int {
	t.Helper()
	n := -1
	netnstest.Do(t, f.web.Namespace, func() error {
		data, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var tcp [][]string
		for line := range strings.Lines(string(data)) {
			if strings.HasPrefix(line, "Tcp:") {
				tcp = append(tcp, strings.Fields(line))
			}
		}
		for i, name := range tcp[0] {
			if name == "RetransSegs" {
				n, err = strconv.Atoi(tcp[1][i])
			}
		}
		return err
	})
	return n
}

// What a captured client gets as an answer comes from a socket that was accepted and never
// marked itself.
func TestGuardPassesAnswersOfAcceptedConnections(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	payload := make([]byte, 1<<20)
	for port, l := range map[uint16]net.Listener{8080: f.pod.Inbound(), 15008: f.pod.Tunnel()} {
		client := dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V4, port))
		received := collect(client)
		in := accept(t, l)
		write(t, in, payload)
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		if got := <-received; len(got) != len(payload) {
			t.Errorf("port %d: %d bytes arrived, want %d", port, len(got), len(payload))
		}
	}
}

// A port that the client uses for the application itself, captured or direct, is not taken
// for the agent's connection, even when it is asked for.
func TestDialAppAvoidsTheClientsOwnPorts(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	at := netip.AddrPortFrom(f.web.V4, 8080)
	server := netnstest.Listen(t, f.web.Namespace, "tcp", at.String())
	connect := func(port uint16) netip.AddrPort {
		client := netip.AddrPortFrom(f.db.V4, port)
		fd := socket(t, f.db.Namespace, unix.AF_INET, unix.IPPROTO_TCP)
		if err := unix.Bind(fd, sockaddr(unix.AF_INET, client)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, sockaddr(unix.AF_INET, at)); err != nil {
			t.Fatal(err)
		}
		return client
	}
	direct := connect(40000)
	accept(t, server)
	f.enrol(t)
	captured := connect(40001)
	accept(t, f.pod.Inbound())
	free := netip.AddrPortFrom(f.db.V4, 40002)
	for range 8 {
		for _, client := range []netip.AddrPort{direct, captured, free} {
			conn, err := f.pod.DialApp(t.Context(), client, at, false)
			if err != nil {
				t.Fatalf("for %v: %v", client, err)
			}
			app := accept(t, server)
			got := addrPort(app.RemoteAddr())
			if client == free && got != free {
				t.Errorf("connected from %v, want the client's own %v", got, free)
			}
			if client != free && (got.Addr() != client.Addr() || got.Port() >= 32768) {
				t.Errorf("connected from %v for %v, want one that clients do not choose", got, client)
			}
			for _, c := range []net.Conn{conn, app} {
				_ = c.(interface{ SetLinger(sec int) error }).SetLinger(0) // no TIME_WAIT, the port is needed again
				_ = c.Close()
			}
		}
	}
}

// A pod that connects to a service may get itself as the endpoint.
func TestDialAppReachesThePodFromItself(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, fam := range families() {
			at := netip.AddrPortFrom(fam.of(f.web), 8080)
			server := netnstest.Listen(t, f.web.Namespace, "tcp", at.String())
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			conn, err := f.pod.DialApp(ctx, netip.AddrPortFrom(fam.of(f.web), 40000), at, false)
			if err != nil {
				t.Fatalf("%s: %v", fam.name, err)
			}
			defer conn.Close()
			app := accept(t, server)
			if got := addrPort(app.RemoteAddr()).Addr(); got != fam.of(f.web) {
				t.Errorf("%s: connected from %v, want %v", fam.name, got, fam.of(f.web))
			}
			send(t, conn, app, "to myself")
		}
	})
}

func TestDialAppToForeignAddressFails(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, modes()[0])
	conn, err := f.pod.DialApp(t.Context(), netip.AddrPortFrom(f.db.V4, 40000), netip.AddrPortFrom(f.db.V4, 80), false)
	if err == nil {
		conn.Close()
		t.Error("dialed an address that is not the pod's as its application")
	}
}
