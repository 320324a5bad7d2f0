package kernel_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestOutboundCaptureSeesDestinationAndClient(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, fam := range families() {
			t.Run(fam.name, func(t *testing.T) {
				destination := netip.AddrPortFrom(fam.of(f.db), 3306)
				app := dial(t, f.web.Namespace, destination)
				conn := accept(t, f.pod.Outbound())
				if got := addrPort(conn.LocalAddr()); got != destination {
					t.Errorf("original destination %v, want %v", got, destination)
				}
				if got, want := addrPort(conn.RemoteAddr()), addrPort(app.LocalAddr()); got != want || got.Addr() != fam.of(f.web) {
					t.Errorf("client %v, want %v", got, want)
				}
				if got := addrPort(app.RemoteAddr()); got != destination {
					t.Errorf("the application's peer is %v, want %v", got, destination)
				}
				send(t, app, conn, "question")
				send(t, conn, app, "answer")
			})
		}
	})
}

func TestInboundCaptureAndDialApp(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, fam := range families() {
			t.Run(fam.name, func(t *testing.T) {
				at := netip.AddrPortFrom(fam.of(f.web), 8080)
				server := netnstest.Listen(t, f.web.Namespace, "tcp", at.String())
				client := dial(t, f.db.Namespace, at)
				in := accept(t, f.pod.Inbound())
				if got := addrPort(in.LocalAddr()); got != at {
					t.Errorf("original destination %v, want %v", got, at)
				}
				if got, want := addrPort(in.RemoteAddr()), addrPort(client.LocalAddr()); got != want {
					t.Errorf("client %v, want %v", got, want)
				}
				toApp, err := f.pod.DialApp(t.Context(), addrPort(in.RemoteAddr()), at, false)
				if err != nil {
					t.Fatal(err)
				}
				defer toApp.Close()
				app := accept(t, server)
				if got := addrPort(app.RemoteAddr()).Addr(); got != fam.of(f.db) {
					t.Errorf("the application sees %v, want the client's %v", got, fam.of(f.db))
				}
				send(t, client, in, "question")
				send(t, toApp, app, "question")
				send(t, app, toApp, "answer")
				send(t, in, client, "answer")
			})
		}
	})
}

func TestDialAppToClosedPortIsRefused(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		for _, fam := range families() {
			client := netip.AddrPortFrom(fam.of(f.db), 40000)
			conn, err := f.pod.DialApp(t.Context(), client, netip.AddrPortFrom(fam.of(f.web), 9), false)
			if err == nil {
				conn.Close()
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: %v, want connection refused", fam.name, err)
			}
		}
	})
}

func TestTunnelPortIsAlwaysTheAgents(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		for _, fam := range families() {
			// An application that holds the very address outranks any wildcard listener.
			netnstest.Listen(t, f.web.Namespace, "tcp", netip.AddrPortFrom(fam.of(f.web), 15008).String())
		}
		f.openPod(t)
		for _, fam := range families() {
			at := netip.AddrPortFrom(fam.of(f.web), 15008)
			peer := dial(t, f.db.Namespace, at)
			conn := accept(t, f.pod.Tunnel())
			if got := addrPort(conn.LocalAddr()); got != at {
				t.Errorf("%s: accepted at %v, want %v", fam.name, got, at)
			}
			send(t, peer, conn, "hello")
		}
		if err := f.pod.CaptureOutbound(); err != nil {
			t.Fatal(err)
		}
		own, err := f.pod.DialTunnel(t.Context(), netip.AddrPortFrom(f.web.V4, 15008))
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		send(t, own, accept(t, f.pod.Tunnel()), "to myself")
	})
}

// Under SYN cookies the ACK that completes a handshake meets no socket of the connection.
func TestInboundCaptureWithSYNCookies(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		netnstest.Do(t, f.web.Namespace, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("2"), 0o644)
		})
		for _, fam := range families() {
			at := netip.AddrPortFrom(fam.of(f.web), 8080)
			server := listenOn(t, f.web, at)
			client := dial(t, f.db.Namespace, at)
			in := accept(t, f.pod.Inbound())
			send(t, client, in, "with a cookie")
			toApp, err := f.pod.DialApp(t.Context(), addrPort(in.RemoteAddr()), at, false)
			if err != nil {
				t.Fatal(err)
			}
			defer toApp.Close()
			send(t, toApp, accept(t, server), "and to the application")
			app := dial(t, f.web.Namespace, netip.AddrPortFrom(fam.of(f.db), 3306))
			send(t, app, accept(t, f.pod.Outbound()), "outbound as well")
		}
	})
}

func TestPodWithoutIPv6(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		netnstest.Do(t, f.web.Namespace, func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0o644)
		})
		var err error
		f.pod, err = f.dp.OpenPod(kernel.PodConfig{UID: "web", NetNS: f.web.Path(), Addrs: f.web.Addrs()[:1]})
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range []func() error{f.pod.CaptureOutbound, f.pod.CaptureInbound, func() error { return f.pod.Guard(t.Context()) }} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		send(t, app, accept(t, f.pod.Outbound()), "out")
		client := dial(t, f.db.Namespace, netip.AddrPortFrom(f.web.V4, 8080))
		send(t, client, accept(t, f.pod.Inbound()), "in")
		for _, finding := range f.pod.Check(t.Context()) {
			if !finding.OK {
				t.Errorf("check %s: %s", finding.Check, finding.Detail)
			}
		}
	})
}

// An application that has the agent's ports already keeps them.
func TestAgentsPortsInUse(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := newFixture(t, m)
		for _, port := range []uint16{15001, 15006, 15008} {
			netnstest.Listen(t, f.web.Namespace, "tcp", fmt.Sprintf(":%d", port))
		}
		f.enrol(t)
		assertCaptured(t, f)
	})
}
