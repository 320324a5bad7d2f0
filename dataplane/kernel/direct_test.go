package kernel_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// direct is a node with two enrolled pods, whose connections go by the kernel where allowed:
//
//	web (enrolled) ── guard ── node ── guard ── db (enrolled)
//	                            └── other (plain)
type direct struct {
	*fixture
	server     *kernel.Pod
	other      *netnstest.Pod
	generation uint64
	events     *directLog
}

func newDirect(t testing.TB, m mode) *direct {
	t.Helper()
	f := &direct{fixture: enrolled(t, m)}
	if err := f.dp.Direct(); err != nil {
		t.Fatal(err)
	}
	f.other = f.node.NewPod(t)
	f.server = f.enrolAs(t, "db", f.db)
	f.revoke(t)
	f.events = follow(t, f.dp)
	return f
}

func (f *direct) enrolAs(t testing.TB, uid string, in *netnstest.Pod) *kernel.Pod {
	t.Helper()
	pod, err := f.dp.OpenPod(kernel.PodConfig{UID: uid, NetNS: in.Path(), Addrs: in.Addrs()})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []func() error{pod.CaptureOutbound, pod.CaptureInbound, func() error { return pod.Guard(t.Context()) }} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	return pod
}

func (f *direct) revoke(t testing.TB) {
	t.Helper()
	var err error
	if f.generation, err = f.dp.Revoke(); err != nil {
		t.Fatal(err)
	}
}

// allow lets web reach a destination at endpoints of db, out of total.
func (f *direct) allow(t testing.TB, destination netip.AddrPort, total int, at ...netip.AddrPort) {
	t.Helper()
	a := kernel.Allowance{Generation: f.generation, Total: total}
	for _, e := range at {
		a.Local = append(a.Local, kernel.Endpoint{UID: "db", At: e})
	}
	if err := f.dp.Allow("web", destination, a); err != nil {
		t.Fatal(err)
	}
}

// serve has db listen at an address of its own, which web may reach by the kernel.
func (f *direct) serve(t testing.TB, addr netip.Addr) (to netip.AddrPort, l net.Listener) {
	t.Helper()
	to = at(addr, 8080)
	l = listenOn(t, f.db, to)
	f.allow(t, to, 1, to)
	return to, l
}

// directLog keeps the events of a data plane.
type directLog struct {
	mu   sync.Mutex
	seen []kernel.DirectConnection
}

func follow(t testing.TB, dp *kernel.Datapath) *directLog {
	t.Helper()
	l := &directLog{}
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	following.Go(func() {
		err := dp.FollowDirect(ctx, func(c kernel.DirectConnection) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.seen = append(l.seen, c)
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); following.Wait() })
	return l
}

// next waits for an event about the connection from that address.
func (l *directLog) next(t testing.TB, from netip.AddrPort, event kernel.DirectEvent) kernel.DirectConnection {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		l.mu.Lock()
		at := slices.IndexFunc(l.seen, func(c kernel.DirectConnection) bool { return c.From == from && c.Event == event })
		if at >= 0 {
			c := l.seen[at]
			l.seen = slices.Delete(l.seen, at, at+1)
			l.mu.Unlock()
			return c
		}
		l.mu.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	t.Fatalf("there was no event %d of %s among %+v", event, from, l.seen)
	return kernel.DirectConnection{}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// pair connects web to destination and accepts at the listener, which is db's own.
func (f *direct) pair(t testing.TB, l net.Listener, destination netip.AddrPort) (client *net.TCPConn, server net.Conn) {
	t.Helper()
	client = dial(t, f.web.Namespace, destination)
	return client, accept(t, l)
}

func TestAllowedConnectionGoesByTheKernel(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newDirect(t, m)
		for _, fam := range families() {
			t.Run(fam.name, func(t *testing.T) {
				to, l := f.serve(t, fam.of(f.db))
				client, server := f.pair(t, l, to)
				send(t, client, server, "request")
				send(t, server, client, "an answer")
				from := addrPort(client.LocalAddr())
				if got := addrPort(server.RemoteAddr()); got != from {
					t.Errorf("the server sees %s, the client is %s", got, from)
				}
				opened := f.events.next(t, from, kernel.DirectOpened)
				if opened.Client != "web" || opened.Server != "db" || opened.To != to || opened.Asked != to {
					t.Errorf("opened: %+v", opened)
				}
				if live, err := f.dp.DirectConnections(); err != nil || len(live) != 1 || live[0].ID != opened.ID || live[0].Sent != 7 || live[0].Received != 9 {
					t.Errorf("live connections are %+v, %v", live, err)
				}
				_ = client.CloseWrite()
				_, _ = io.ReadAll(server)
				_ = server.Close()
				_, _ = io.ReadAll(client)
				_ = client.Close()
				closed := f.events.next(t, from, kernel.DirectClosed)
				if closed.ID != opened.ID || closed.Sent != 7 || closed.Received != 9 || !closed.Clean || closed.Err != nil {
					t.Errorf("closed: %+v", closed)
				}
			})
		}
	})
}

func TestBytesAreCountedWhoeverClosesFirst(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	for _, test := range []struct {
		name  string
		end   func(client *net.TCPConn, server *net.TCPConn)
		clean bool
	}{
		{"client", func(client, server *net.TCPConn) {
			_ = client.CloseWrite()
			_, _ = io.ReadAll(server)
			_ = server.Close()
			_, _ = io.ReadAll(client)
			_ = client.Close()
		}, true},
		{"server", func(client, server *net.TCPConn) {
			_ = server.CloseWrite()
			_, _ = io.ReadAll(client)
			_ = client.Close()
			_, _ = io.ReadAll(server)
			_ = server.Close()
		}, true},
		{"client resets", func(client, server *net.TCPConn) {
			_ = client.SetLinger(0)
			_ = client.Close()
			_, _ = io.ReadAll(server)
			_ = server.Close()
		}, false},
		{"server resets", func(client, server *net.TCPConn) {
			_ = server.SetLinger(0)
			_ = server.Close()
			_, _ = io.ReadAll(client)
			_ = client.Close()
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, server := f.pair(t, l, to)
			send(t, client, server, "hello")
			send(t, server, client, "good day")
			from := addrPort(client.LocalAddr())
			test.end(client, server.(*net.TCPConn))
			c := f.events.next(t, from, kernel.DirectClosed)
			if c.Sent != 5 || c.Received != 8 || c.Clean != test.clean {
				t.Errorf("%d sent, %d received, clean %v, error %v; want 5, 8, %v", c.Sent, c.Received, c.Clean, c.Err, test.clean)
			}
		})
	}
}

// service is an address that no interface has.
func service(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.MustParseAddr("10.96.0.10")
	}
	return netip.MustParseAddr("fd00:96::10")
}

func TestApplicationSeesTheServiceThatItAskedFor(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	for _, fam := range families() {
		t.Run(fam.name, func(t *testing.T) {
			vip, to := at(service(fam.of(f.db)), 80), at(fam.of(f.db), 8080)
			l := listenOn(t, f.db, to)
			f.allow(t, vip, 1, to)
			client, server := f.pair(t, l, vip)
			send(t, client, server, "to the service")
			raw, err := client.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var sa unix.Sockaddr
			if err := raw.Control(func(fd uintptr) { sa, err = unix.Getpeername(int(fd)) }); err != nil {
				t.Fatal(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := ofSockaddr(t, sa); got != vip {
				t.Errorf("getpeername says %s, want %s", got, vip)
			}
			if got := addrPort(server.RemoteAddr()); got != addrPort(client.LocalAddr()) {
				t.Errorf("the server sees %s, the client is %s", got, client.LocalAddr())
			}
			c := f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectOpened)
			if c.Asked != vip || c.To != to {
				t.Errorf("opened: %+v", c)
			}
		})
	}
}

func ofSockaddr(t *testing.T, sa unix.Sockaddr) netip.AddrPort {
	t.Helper()
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	t.Fatalf("a socket address of type %T", sa)
	return netip.AddrPort{}
}

func TestEndpointsOfOthersAreLeftToTheAgent(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	vip, to := at(service(f.db.V4), 80), at(f.db.V4, 8080)
	l := listenOn(t, f.db, to)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	f.allow(t, vip, 4, to)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for {
			conn, err := f.pod.Outbound().AcceptConn()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	before := f.counter(t, "connect", "direct")
	const all = 400
	for range all {
		if conn, err := tryDial(t, f.web.Namespace, vip, patience); err == nil {
			_ = conn.Close()
		}
	}
	_ = f.pod.Outbound().SetDeadline(time.Unix(1, 0))
	<-drained
	if n := f.counter(t, "connect", "direct") - before; n < all/8 || n > all*3/8 {
		t.Errorf("%d of %d connections went to the one of four endpoints that is here", n, all)
	}
}

// toAgent makes sure that a connection comes to the agent's listener.
func (f *direct) toAgent(t testing.TB, destination netip.AddrPort) {
	t.Helper()
	client := dial(t, f.web.Namespace, destination)
	conn := accept(t, f.pod.Outbound())
	if got := addrPort(conn.LocalAddr()); got != destination {
		t.Errorf("the agent got a connection to %s, want %s", got, destination)
	}
	_ = client.Close()
}

func TestWhatIsNotAllowedAnyMoreGoesThroughTheAgent(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	f.pair(t, l, to)
	f.toAgent(t, at(f.db.V4, 8081))
	f.revoke(t)
	f.toAgent(t, to)
	f.allow(t, to, 1, to)
	f.pair(t, l, to)
	// One that was made by an earlier view does not count.
	old := f.generation
	f.revoke(t)
	if err := f.dp.Allow("web", to, kernel.Allowance{Generation: old, Total: 1, Local: []kernel.Endpoint{{UID: "db", At: to}}}); err != nil {
		t.Fatal(err)
	}
	f.toAgent(t, to)
}

func TestOnlyPodsInForceAreAllowed(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to := at(f.db.V4, 8080)
	a := kernel.Allowance{Generation: f.generation, Total: 1, Local: []kernel.Endpoint{{UID: "db", At: to}}}
	if err := f.server.Unguard(); err != nil {
		t.Fatal(err)
	}
	if err := f.dp.Allow("web", to, a); !errors.Is(err, kernel.ErrNotInForce) {
		t.Errorf("a pod without a guard is allowed as a destination: %v", err)
	}
	if err := f.server.Guard(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.pod.ReleaseOutbound(); err != nil {
		t.Fatal(err)
	}
	if err := f.dp.Allow("web", to, a); !errors.Is(err, kernel.ErrNotInForce) {
		t.Errorf("a pod that is not captured is allowed as a source: %v", err)
	}
}

// Between the release of a pod's inbound traffic and the moment when its clients know, one may begin.
func TestConnectionArrivesInAPodWhoseReleaseHasBegun(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newDirect(t, m)
		for _, fam := range families() {
			t.Run(fam.name, func(t *testing.T) {
				to, l := f.serve(t, fam.of(f.db))
				if err := errors.Join(f.server.Unguard(), f.server.ReleaseInbound()); err != nil {
					t.Fatal(err)
				}
				client, server := f.pair(t, l, to)
				send(t, client, server, "request")
				send(t, server, client, "an answer")
				f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectOpened)
				if err := errors.Join(f.server.CaptureInbound(), f.server.Guard(t.Context())); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
}

func TestSocketsThatAreSpecialGoThroughTheAgent(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, _ := f.serve(t, f.db.V4)
	sockaddr := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	for _, test := range []struct {
		name     string
		protocol int
		connect  func(fd int) error
	}{
		{"bound to a device", 0, func(fd int) error {
			return errors.Join(unix.BindToDevice(fd, "eth0"), unix.Connect(fd, sockaddr))
		}},
		{"data in the SYN", 0, func(fd int) error {
			return unix.Sendto(fd, []byte("early"), unix.MSG_FASTOPEN, sockaddr)
		}},
		{"multipath", unix.IPPROTO_MPTCP, func(fd int) error { return unix.Connect(fd, sockaddr) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			netnstest.Do(t, f.web.Namespace, func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, test.protocol)
				if err != nil {
					return err
				}
				t.Cleanup(func() { _ = unix.Close(fd) })
				return test.connect(fd)
			})
			if got := addrPort(accept(t, f.pod.Outbound()).LocalAddr()); got != to {
				t.Errorf("the agent got a connection to %s", got)
			}
		})
	}
}

func TestAppsThatBindFirstGoByTheKernel(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client, err := f.web.Dial(ctx, netns.DialConfig{Remote: to, Local: at(f.web.V4, 5555)})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server := accept(t, l)
	send(t, client, server, "from a port of its own")
	if got := addrPort(server.RemoteAddr()); got != at(f.web.V4, 5555) {
		t.Errorf("the server sees %s", got)
	}
}

func TestNobodyConnectsByTheKernelWithoutAnAgent(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	client, server := f.pair(t, l, to)
	if err := errors.Join(f.pod.Outbound().Close(), f.server.Outbound().Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := tryDial(t, f.web.Namespace, to, patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection without an agent: %v, want it refused", err)
	}
	send(t, client, server, "a live one goes on")
}

func TestCutConnectionIsReset(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	for _, fam := range families() {
		t.Run(fam.name, func(t *testing.T) {
			to, l := f.serve(t, fam.of(f.db))
			client, server := f.pair(t, l, to)
			send(t, client, server, "before")
			c := f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectOpened)
			if err := f.dp.Cut(c.ID); err != nil {
				t.Fatal(err)
			}
			for name, conn := range map[string]net.Conn{"client": client, "server": server} {
				_ = conn.SetReadDeadline(time.Now().Add(patience))
				if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) || errors.Is(err, io.EOF) {
					t.Errorf("the %s reads %v, want a reset", name, err)
				}
			}
			closed := f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectClosed)
			if closed.Clean || closed.Sent != 6 {
				t.Errorf("closed: %+v", closed)
			}
			if err := f.dp.Cut(c.ID); err != nil {
				t.Errorf("cut again: %v", err)
			}
			// What the kernel finds in the place of a connection that is gone is a listener.
			for name, pod := range map[string]*kernel.Pod{"web": f.pod, "db": f.server} {
				if err := pod.Listening(); err != nil {
					t.Errorf("%s, after a cut: %v", name, err)
				}
			}
			again := dial(t, f.web.Namespace, to)
			send(t, again, accept(t, l), "the application listens")
		})
	}
}

func TestRefusedConnectionIsTold(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to := at(f.db.V4, 8080) // nobody listens
	f.allow(t, to, 1, to)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	local := at(f.web.V4, 5556)
	if _, err := f.web.Dial(ctx, netns.DialConfig{Remote: to, Local: local}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection to a closed port: %v, want it refused", err)
	}
	c := f.events.next(t, local, kernel.DirectFailed)
	if !c.Arrived || !errors.Is(c.Err, syscall.ECONNREFUSED) || c.Sent != 0 {
		t.Errorf("failed: %+v", c)
	}
}

// A server that goes on to send to a client that has gone hears of it, and is not left to
// retransmit for minutes.
func TestServerHearsThatItsClientIsGone(t *testing.T) {
	netnstest.Require(t)
	f := newDirect(t, modes()[0])
	to, l := f.serve(t, f.db.V4)
	client, server := f.pair(t, l, to)
	send(t, client, server, "all I have to say")
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// -1: the socket is gone as soon as its FIN is acknowledged.
	if err := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_LINGER2, -1) }); err != nil {
		t.Fatal(err)
	}
	from := addrPort(client.LocalAddr())
	_ = client.Close()
	f.events.next(t, from, kernel.DirectClosed)
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := server.Write([]byte("still here")); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the server is never told that its client is gone")
		}
	}
}

func TestLiveConnectionsAreFoundAgainByTheNextAgent(t *testing.T) {
	netnstest.Require(t)
	for name, layout := range map[string]bool{"same layout": false, "other layout": true} {
		t.Run(name, func(t *testing.T) {
			f := newDirect(t, modes()[0])
			to, l := f.serve(t, f.db.V4)
			client, server := f.pair(t, l, to)
			send(t, client, server, "before")
			opened := f.events.next(t, addrPort(client.LocalAddr()), kernel.DirectOpened)
			if err := f.dp.Close(); err != nil {
				t.Fatal(err)
			}
			if layout {
				f.cfg = f.cfg.WithLayout("another")
			}
			send(t, server, client, "while no agent is there")
			f.open(t)
			f.enrol(t)
			f.enrolAs(t, "db", f.db)
			f.toAgent(t, to) // the verdicts of an earlier agent do not count
			send(t, client, server, "after")
			live, err := f.dp.DirectConnections()
			if err != nil || len(live) != 1 || live[0].ID != opened.ID || live[0].Client != "web" || live[0].Server != "db" {
				t.Errorf("the next agent finds %+v, %v", live, err)
			}
			if err := f.dp.Cut(opened.ID); err != nil {
				t.Fatal(err)
			}
			_ = client.SetReadDeadline(time.Now().Add(patience))
			if _, err := client.Read(make([]byte, 1)); err == nil || isTimeout(err) {
				t.Errorf("the next agent cut it, and the client reads %v", err)
			}
		})
	}
}
