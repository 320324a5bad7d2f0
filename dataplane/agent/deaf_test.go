package agent

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// A pod with CAP_NET_ADMIN destroys the agent's listeners. They come back without anybody's
// help, and a captured connection that lives meanwhile goes on.
func TestDestroyedListenerComesBack(t *testing.T) {
	p, node, _ := newPods(t)
	web, db := node.NewPod(t), node.NewPod(t)
	a := serve(t, p, dataplane.Workload{
		UID: "web", Name: dataplane.Name{Namespace: "shop", Name: "web"}, Node: "n1", NetNS: web.Path(), Addrs: web.Addrs(),
		Labels: map[string]string{dataplane.ModeLabel: dataplane.ModeAmbient}, ServiceAccount: "web", Phase: dataplane.PodRunning,
	})

	captured := func() bool { return a.reconciler.Status()["web"].State == dataplane.CaptureInForce }
	within(t, "the pod is captured", captured)
	server := echoServer(t, db.Namespace, netip.AddrPortFrom(db.V4, 3306))
	early := dialEcho(t, web.Namespace, server)
	echoes(t, early)
	for _, l := range []func() syscall.Conn{
		func() syscall.Conn { return p.get("web").Outbound() },
		func() syscall.Conn { return p.get("web").Inbound() },
		func() syscall.Conn { return p.get("web").Tunnel() },
	} {
		destroyListener(t, l())
		within(t, "the agent notices", func() bool { return p.get("web").Listening() == nil })
		within(t, "the pod is captured again", captured)
		echoes(t, dialEcho(t, web.Namespace, server))
	}
	echoes(t, early)
}

// serve runs the parts of an agent that enrol pods and carry their connections.
func serve(t *testing.T, p *pods, workloads ...dataplane.Workload) *Agent {
	t.Helper()
	a := &Agent{cfg: Config{Node: "n1", Log: slog.New(slog.DiscardHandler)}, pods: p, datapath: p.datapath, keeper: p.keeper}
	a.store.Publish(dataplane.NewSnapshot(shop(workloads...)))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	a.telemetry, err = telemetry.New(telemetry.Config{})
	must(err)
	p.proxy, err = proxy.New(proxy.Config{Node: "n1", Store: &a.store, Certs: p.keeper, Telemetry: a.telemetry, Log: slog.New(slog.DiscardHandler)})
	must(err)
	p.publisher, err = file.NewPublisher(t.TempDir(), "n1")
	must(err)
	p.serve, a.stopServing = context.WithCancel(t.Context())
	p.force, a.cutServing = context.WithCancel(t.Context())
	a.reconciler, err = enroll.New(enroll.Config{Node: "n1", Store: &a.store, Target: p, Settle: time.Millisecond, MaxDrainAll: 2 * time.Second, Log: slog.New(slog.DiscardHandler)})
	must(err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 3)
	for _, run := range []func(context.Context) error{a.enrol, a.watchPods, p.proxy.Run} {
		go func() { done <- run(ctx) }()
	}
	t.Cleanup(func() {
		stop()
		a.stopServing()
		a.cutServing()
		for range 3 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		p.wait()
	})
	return a
}

// shop is a cluster of one namespace.
func shop(workloads ...dataplane.Workload) dataplane.Contents {
	return dataplane.Contents{TrustDomain: "cluster.local", Namespaces: []dataplane.Namespace{{Name: "shop"}}, Workloads: workloads}
}

func within(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

func destroyListener(t *testing.T, l syscall.Conn) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_RDWR) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func echoServer(t *testing.T, ns *netns.Namespace, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	l, err := ns.Listen(netns.ListenConfig{Addr: at})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				buf := make([]byte, 64)
				for {
					n, err := conn.Read(buf)
					if err != nil {
						return
					}
					if _, err := conn.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	return at
}

func dialEcho(t *testing.T, ns *netns.Namespace, at netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := ns.Dial(t.Context(), netns.DialConfig{Remote: at})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func echoes(t *testing.T, conn net.Conn) {
	t.Helper()
	buf := make([]byte, 4)
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(buf); err != nil || string(buf) != "echo" {
		t.Fatalf("received %q, %v", buf, err)
	}
}
