package kernel_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// udpModes are those in which UDP can be captured.
func udpModes() []mode {
	var can []mode
	for _, m := range modes() {
		if m.inbound == kernel.InboundSKLookup {
			can = append(can, m)
		}
	}
	return can
}

func inUDPModes(t *testing.T, test func(t *testing.T, m mode)) {
	netnstest.Require(t)
	for _, m := range udpModes() {
		t.Run(m.name, func(t *testing.T) { test(t, m) })
	}
}

// inUDPMode is for what does not depend on how programs are attached.
func inUDPMode(t *testing.T, test func(t *testing.T, m mode)) {
	netnstest.Require(t)
	test(t, udpModes()[0])
}

// withUDP is a fixture in which db speaks the tunnel and web's UDP is captured.
func withUDP(t testing.TB, m mode, cfg kernel.UDPConfig) *fixture {
	t.Helper()
	f := enrolled(t, m)
	f.peers(t, f.db)
	f.captureUDP(t, cfg)
	return f
}

func (f *fixture) captureUDP(t testing.TB, cfg kernel.UDPConfig) {
	t.Helper()
	if err := f.pod.CaptureUDP(cfg); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) peers(t testing.TB, pods ...*netnstest.Pod) {
	t.Helper()
	peers := make(map[kernel.Peer][]dataplane.PortRange)
	for _, p := range pods {
		for _, a := range p.Addrs() {
			peers[kernel.Peer{Addr: a}] = []dataplane.PortRange{{First: 5, Last: 5}} // that of a wire's sentinel
		}
	}
	if err := f.dp.SetPeers(peers); err != nil {
		t.Fatal(err)
	}
}

// bindUDP makes a socket as an application does; port 0 lets the kernel choose.
func bindUDP(t testing.TB, ns *netns.Namespace, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	netnstest.Do(t, ns, func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func dialUDP(t testing.TB, ns *netns.Namespace, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	netnstest.Do(t, ns, func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func localOf(c *net.UDPConn) netip.AddrPort {
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func say(t testing.TB, c *net.UDPConn, to netip.AddrPort, payload string) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(payload), to); err != nil {
		t.Fatal(err)
	}
}

// hear expects payload at an application's socket and returns who sent it.
func hear(t testing.TB, c *net.UDPConn, payload string) netip.AddrPort {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != payload {
		t.Fatalf("heard %.100q, %v; want %.100q", buf[:n], err, payload)
	}
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// captured expects payload at the agent.
func (f *fixture) captured(t testing.TB, payload string) dataplane.Datagram {
	t.Helper()
	type result struct {
		data []byte
		d    dataplane.Datagram
		err  error
	}
	got := make(chan result, 1)
	go func() {
		buf := make([]byte, 65536)
		n, d, err := f.pod.Datagrams().Receive(buf)
		got <- result{buf[:n], d, err}
	}()
	select {
	case r := <-got:
		if r.err != nil || string(r.data) != payload {
			t.Fatalf("the agent received %.100q, %v; want %.100q", r.data, r.err, payload)
		}
		return r.d
	case <-time.After(patience):
		t.Fatalf("the agent did not receive %.100q", payload)
		panic("unreachable")
	}
}

// discard empties the agent's queue.
func (f *fixture) discard(t testing.TB) {
	t.Helper()
	d := f.pod.Datagrams()
	if err := d.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 65536); ; {
		if _, _, err := d.Receive(buf); err != nil {
			break
		}
	}
	if err := d.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

func forFamilies(t *testing.T, test func(t *testing.T, fam family)) {
	for _, fam := range families() {
		t.Run(fam.name, func(t *testing.T) { test(t, fam) })
	}
}

// An application's question reaches the agent, which knows who asks whom, and its answer comes
// from whom was asked; with unconnected and with connected sockets.
func TestUDPIsCapturedAndAnswered(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		forFamilies(t, func(t *testing.T, fam family) {
			server := at(fam.of(f.db), 53)
			app := bindUDP(t, f.web.Namespace, at(netip.IPv6Unspecified(), 0))
			say(t, app, server, "unconnected")
			d := f.captured(t, "unconnected")
			if want := at(fam.of(f.web), localOf(app).Port()); d.From != want || d.To != server {
				t.Errorf("from %v to %v, want %v to %v", d.From, d.To, want, server)
			}
			if err := f.pod.Datagrams().Deliver(server, d.From, []byte("answer")); err != nil {
				t.Fatal(err)
			}
			if from := hear(t, app, "answer"); from != server {
				t.Errorf("the answer is from %v, want %v", from, server)
			}

			connected := dialUDP(t, f.web.Namespace, server)
			if _, err := connected.Write([]byte("connected")); err != nil {
				t.Fatal(err)
			}
			d = f.captured(t, "connected")
			if d.From != localOf(connected) || d.To != server || d.From.Addr() != fam.of(f.web) {
				t.Errorf("from %v to %v", d.From, d.To)
			}
			if err := f.pod.Datagrams().Deliver(server, d.From, []byte("answer")); err != nil {
				t.Fatal(err)
			}
			hear(t, connected, "answer")
		})
	})
}

// One socket talks to a peer and to others at the same time; what is not a peer's is untouched.
func TestUDPOfOneSocketGoesByDestination(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		other := f.node.NewPod(t)
		forFamilies(t, func(t *testing.T, fam family) {
			plain := bindUDP(t, other.Namespace, at(fam.of(other), 53))
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			for i := range 3 {
				say(t, app, at(fam.of(f.db), 53), fmt.Sprint("to the peer ", i))
				say(t, app, at(fam.of(other), 53), fmt.Sprint("to another ", i))
				f.captured(t, fmt.Sprint("to the peer ", i))
				if from := hear(t, plain, fmt.Sprint("to another ", i)); from != localOf(app) {
					t.Errorf("from %v, want %v", from, localOf(app))
				}
				say(t, plain, localOf(app), "answer")
				hear(t, app, "answer")
			}
		})
	})
}

// What comes out of the tunnel reaches a server from the client's address, and what the server
// says to it comes to the agent: to each client, known as a peer or not.
func TestUDPServerAnswersByTheTunnel(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		forFamilies(t, func(t *testing.T, fam family) {
			// Older than the capture, as servers are.
			server := bindUDP(t, f.web.Namespace, at(netip.IPv6Unspecified(), 0))
			f.captureUDP(t, kernel.UDPConfig{})
			address := at(fam.of(f.web), localOf(server).Port())
			for i, client := range []netip.AddrPort{at(fam.of(f.db), 40000), at(fam.of(f.db), 40001)} {
				if err := f.pod.Datagrams().Keep(address, client); err != nil {
					t.Fatal(err)
				}
				question, answer := fmt.Sprint("question ", i), fmt.Sprint("answer ", i)
				if err := f.pod.Datagrams().Deliver(client, address, []byte(question)); err != nil {
					t.Fatal(err)
				}
				if from := hear(t, server, question); from != client {
					t.Errorf("the server hears %v, want %v", from, client)
				}
				say(t, server, client, answer)
				if d := f.captured(t, answer); d.From != address || d.To != client {
					t.Errorf("the answer goes from %v to %v, want %v to %v", d.From, d.To, address, client)
				}
				f.pod.Datagrams().Forget(address, client)
			}
		})
	})
}

// Where a server would answer in clear, it does not for a while what was asked by a flow that has
// ended since, nor what an agent delivered that was killed.
func TestUDPLateAnswersAreNotInClear(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		f.peers(t, f.db)
		forFamilies(t, func(t *testing.T, fam family) {
			client := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 0))
			server := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0)) // older
			f.captureUDP(t, kernel.UDPConfig{})
			keep := func() {
				t.Helper()
				if err := f.pod.Datagrams().Keep(localOf(server), localOf(client)); err != nil {
					t.Fatal(err)
				}
			}
			toAgent := func(answer string) {
				t.Helper()
				say(t, server, localOf(client), answer)
				f.captured(t, answer)
			}
			// inClear waits for the first answer in clear.
			inClear := func(answer string) {
				t.Helper()
				for end := time.Now().Add(patience); time.Now().Before(end); {
					say(t, server, localOf(client), answer)
					if err := client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
						t.Fatal(err)
					}
					if n, _, err := client.ReadFromUDPAddrPort(make([]byte, 100)); err == nil && n == len(answer) {
						return
					}
					f.discard(t)
				}
				t.Fatalf("%q does not arrive in clear", answer)
			}
			inClear("nobody asked by a tunnel")

			keep()
			f.pod.Datagrams().Forget(localOf(server), localOf(client))
			toAgent("late")
			keep() // the client asks again
			time.Sleep(3 * time.Second)
			toAgent("kept")
			f.pod.Datagrams().Forget(localOf(server), localOf(client))
			inClear("forgotten")

			keep()
			if err := f.dp.Close(); err != nil { // as the death of the agent does
				t.Fatal(err)
			}
			f.open(t)
			f.openPod(t)
			f.peers(t, f.db)
			toAgent("kept for the next agent")
			time.Sleep(3 * time.Second)
			toAgent("the agent before may still be there")
			if err := f.dp.ForgetOrphans(); err != nil {
				t.Fatal(err)
			}
			inClear("the agent before is gone")
			if err := f.pod.ReleaseUDP(); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// Who is a peer changes with each call, also with the first one of the next agent.
func TestUDPPeersChange(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		other := f.node.NewPod(t)
		fam := families()[0]
		app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
		var servers [2]*net.UDPConn
		for i, p := range []*netnstest.Pod{f.db, other} {
			servers[i] = bindUDP(t, p.Namespace, at(fam.of(p), 53))
		}
		// tell says something to both, and wants it in a tunnel or in clear.
		tell := func(what string, tunnels ...bool) {
			t.Helper()
			for i, server := range servers {
				text := fmt.Sprint(what, i)
				say(t, app, localOf(server), text)
				if tunnels[i] {
					f.captured(t, text)
				} else {
					hear(t, server, text)
				}
			}
		}
		tell("one", true, false)
		f.peers(t, other)
		tell("the other", false, true)
		f.peers(t, f.db, other)
		tell("both", true, true)
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		f.open(t)
		f.openPod(t)
		tell("as the agent before said", true, true)
		f.peers(t)
		tell("none", false, false)
	})
}

// A socket that is older than the capture goes on in clear, and is answered; the server's answer
// to what came in clear goes the way it came, although the client is a peer.
func TestUDPOlderSocketsGoOnInClear(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		f.peers(t, f.db)
		forFamilies(t, func(t *testing.T, fam family) {
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 0))
			older := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			f.captureUDP(t, kernel.UDPConfig{})
			if n, err := f.pod.OlderUDP(); n != 1 || err != nil {
				t.Errorf("%d older sockets, %v; want 1", n, err)
			}
			say(t, older, localOf(peer), "older")
			hear(t, peer, "older")
			say(t, peer, localOf(older), "answer")
			hear(t, older, "answer")

			// A new server that an old socket of the peer asks.
			server := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			say(t, peer, localOf(server), "in clear")
			say(t, server, hear(t, server, "in clear"), "as it came")
			hear(t, peer, "as it came")

			// The same server begins something with a peer that did not ask.
			say(t, server, at(fam.of(f.db), 9), "of its own")
			f.captured(t, "of its own")
			_ = older.Close()
			if n, err := f.pod.OlderUDP(); n != 0 || err != nil {
				t.Errorf("%d older sockets once it is closed, %v; want 0", n, err)
			}
			if err := f.pod.ReleaseUDP(); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// Whoever waits needs no buffer until there is something to receive.
func TestUDPWait(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		d := f.pod.Datagrams()
		quic, _, err := d.QUIC()
		if err != nil {
			t.Fatal(err)
		}
		defer quic.Close()
		soon := time.Now().Add(50 * time.Millisecond)
		if err := errors.Join(d.SetDeadline(soon), quic.SetReadDeadline(soon)); err != nil {
			t.Fatal(err)
		}
		for name, err := range map[string]error{"the pod's datagrams": d.Wait(), "the tunnel's": netns.AwaitDatagram(quic)} {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: waiting for nothing ends with %v", name, err)
			}
		}
		if err := d.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		say(t, bindUDP(t, f.web.Namespace, at(netip.IPv4Unspecified(), 0)), at(families()[0].of(f.db), 9), "something")
		if err := d.Wait(); err != nil {
			t.Fatal(err)
		}
		f.captured(t, "something")
	})
}

// Ports that are left alone, by the pod or by its peer.
func TestUDPClearPorts(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		peers := make(map[kernel.Peer][]dataplane.PortRange)
		for _, a := range f.db.Addrs() {
			peers[kernel.Peer{Addr: a}] = []dataplane.PortRange{{First: 7, Last: 8}, {First: 5000, Last: 5010}}
		}
		if err := f.dp.SetPeers(peers); err != nil {
			t.Fatal(err)
		}
		f.captureUDP(t, kernel.UDPConfig{Strict: true, Clear: []dataplane.PortRange{{First: 123, Last: 123}}})
		forFamilies(t, func(t *testing.T, fam family) {
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			for _, port := range []uint16{7, 8, 5000, 5005, 5010, 123} {
				peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), port))
				say(t, app, localOf(peer), "in clear")
				say(t, peer, hear(t, peer, "in clear"), "answer")
				hear(t, app, "answer")
			}
			for _, port := range []uint16{6, 9, 4999, 5011, 122, 124} {
				say(t, app, at(fam.of(f.db), port), "captured")
				f.captured(t, "captured")
			}
			// Inbound: strict, but for the port of ours.
			ntp := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 123))
			client := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 0))
			say(t, client, localOf(ntp), "in clear")
			say(t, ntp, hear(t, ntp, "in clear"), "answer")
			hear(t, client, "answer")
		})
		if err := f.pod.CaptureUDP(kernel.UDPConfig{Clear: make([]dataplane.PortRange, kernel.MaxClearPorts+1)}); err == nil {
			t.Error("more ranges than fit were taken")
		}
		if err := f.pod.CaptureUDP(kernel.UDPConfig{Clear: []dataplane.PortRange{{First: 2, Last: 1}}}); err == nil {
			t.Error("a range that ends before it begins was taken")
		}
	})
}

// A service is captured at its port alone, by its address, which the answer comes from.
func TestUDPService(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		service := at(netip.MustParseAddr("10.96.0.10"), 53)
		if err := f.dp.SetPeers(map[kernel.Peer][]dataplane.PortRange{{Addr: service.Addr(), Port: 53}: nil}); err != nil {
			t.Fatal(err)
		}
		f.captureUDP(t, kernel.UDPConfig{})
		app := bindUDP(t, f.web.Namespace, at(netip.IPv6Unspecified(), 0))
		say(t, app, service, "query")
		d := f.captured(t, "query")
		if err := f.pod.Datagrams().Deliver(service, d.From, []byte("answer")); err != nil {
			t.Fatal(err)
		}
		if from := hear(t, app, "answer"); from != service {
			t.Errorf("the answer is from %v, want %v", from, service)
		}
		before := f.counter(t, "divert", "elsewhere")
		say(t, app, at(service.Addr(), 54), "another port")
		if got := f.counter(t, "divert", "elsewhere"); got != before+1 {
			t.Errorf("%d datagrams left alone, want %d", got, before+1)
		}
	})
}

// A strict pod refuses what peers send in clear, whole or in fragments, and not what others do,
// nor the answers to its own older sockets.
func TestUDPStrict(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		f.peers(t, f.db)
		other := f.node.NewPod(t)
		forFamilies(t, func(t *testing.T, fam family) {
			older := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			f.captureUDP(t, kernel.UDPConfig{Strict: true})
			server := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 0))
			plain := bindUDP(t, other.Namespace, at(fam.of(other), 0))
			before := f.counter(t, "receive", "dropped_clear")
			say(t, peer, localOf(server), "refused")
			say(t, peer, localOf(server), string(bytes.Repeat([]byte("refused in fragments"), 1000)))
			say(t, plain, localOf(server), "not a peer's")
			hear(t, server, "not a peer's")
			if got := f.counter(t, "receive", "dropped_clear"); got < before+3 {
				t.Errorf("%d refused, want at least %d", got, before+3)
			}
			say(t, older, localOf(peer), "older")
			say(t, peer, hear(t, peer, "older"), "answer")
			hear(t, older, "answer")
			if err := f.pod.ReleaseUDP(); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// A pod that requires tunnels hands to the agent what it sends to anybody, or has it dropped on
// the host's end, but for answers, ports that are left alone, older sockets, DHCP and multicast.
func TestUDPRequire(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		other := f.node.NewPod(t)
		w := newWire(t, f.node, f.web, other)
		forFamilies(t, func(t *testing.T, fam family) {
			older := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			f.captureUDP(t, kernel.UDPConfig{Require: true, Clear: []dataplane.PortRange{{First: 5, Last: 5}, {First: 123, Last: 123}}})
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			plain := bindUDP(t, other.Namespace, at(fam.of(other), 0))
			say(t, app, localOf(plain), "captured")
			if d := f.captured(t, "captured"); d.To != localOf(plain) {
				t.Errorf("it was to %v, the agent says %v", localOf(plain), d.To)
			}
			long := string(bytes.Repeat([]byte("in fragments"), 500))
			say(t, app, localOf(plain), long)
			f.captured(t, long)
			say(t, older, localOf(plain), "older")
			say(t, plain, hear(t, plain, "older"), "answer")
			hear(t, older, "answer")
			asker := bindUDP(t, other.Namespace, at(fam.of(other), 0))
			say(t, asker, localOf(app), "question")
			say(t, app, hear(t, app, "question"), "answer")
			hear(t, asker, "answer")
			ntp := bindUDP(t, other.Namespace, at(fam.of(other), 123))
			say(t, app, localOf(ntp), "left alone")
			hear(t, ntp, "left alone")
			if err := f.pod.ReleaseUDP(); err != nil {
				t.Fatal(err)
			}
		})
		before := f.counter(t, "divert", "elsewhere")
		f.captureUDP(t, kernel.UDPConfig{Require: true, Clear: []dataplane.PortRange{{First: 5, Last: 5}}})
		local := bindUDP(t, f.web.Namespace, at(netip.IPv4Unspecified(), 68))
		for _, to := range []string{"224.0.0.251:5353", "169.254.20.10:53", "192.0.2.1:67"} {
			say(t, local, netip.MustParseAddrPort(to), "left alone")
		}
		if got := f.counter(t, "divert", "elsewhere"); got != before+3 {
			t.Errorf("%d datagrams left alone, want %d", got-before, 3)
		}
		if w.udpArrives(t, 53, "past every queue") || w.udpFragmentsArrive(t, 53, "later fragment") {
			t.Error("a datagram to who is no peer gets past the guard")
		}
	})
}

// The longest datagram, of many fragments, arrives whole; so does it in the other direction.
func TestUDPFragments(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		other := f.node.NewPod(t)
		forFamilies(t, func(t *testing.T, fam family) {
			longest := 65507
			if fam.name == "v6" {
				longest = 65527
			}
			long := string(bytes.Repeat([]byte("raceway"), 65527/7+1)[:longest])
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			server := at(fam.of(f.db), 9)
			for range 3 {
				say(t, app, server, long)
				d := f.captured(t, long)
				if d.Whole {
					t.Error("a datagram in fragments is said to be one that must not be fragmented")
				}
				if err := f.pod.Datagrams().Deliver(server, d.From, []byte(long)); err != nil {
					t.Fatal(err)
				}
				hear(t, app, long)
			}
			plain := bindUDP(t, other.Namespace, at(fam.of(other), 0))
			say(t, app, localOf(plain), long)
			hear(t, plain, long)
		})
	})
}

// A sender that hands the kernel many datagrams at once (UDP_SEGMENT) reaches the agent as one
// buffer with the size of its parts.
func TestUDPSegments(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		forFamilies(t, func(t *testing.T, fam family) {
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			setUDP(t, app, unix.SOL_UDP, unix.UDP_SEGMENT, 1000)
			payload := string(bytes.Repeat([]byte("x"), 10_500))
			say(t, app, at(fam.of(f.db), 9), payload)
			if d := f.captured(t, payload); d.Segment != 1000 {
				t.Errorf("segments of %d bytes, want 1000", d.Segment)
			}
		})
	})
}

func setUDP(t testing.TB, c *net.UDPConn, level, option, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), level, option, value) })
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
}

// Who wants to find out the path's MTU gets EMSGSIZE; of others the kernel fragments.
func TestUDPTooBig(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		forFamilies(t, func(t *testing.T, fam family) {
			server := at(fam.of(f.db), 9)
			probing := dialUDP(t, f.web.Namespace, server)
			level, discover := unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER
			if fam.name == "v4" {
				level, discover = unix.SOL_IP, unix.IP_MTU_DISCOVER
			}
			setUDP(t, probing, level, discover, unix.IP_PMTUDISC_DO)
			payload := string(make([]byte, 1400))
			if _, err := probing.Write([]byte(payload)); err != nil {
				t.Fatal(err)
			}
			d := f.captured(t, payload)
			if !d.Whole {
				t.Error("it does not say that the datagram must stay whole")
			}
			if err := f.pod.Datagrams().TooBig(d.From, d.To, len(payload), 1300); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the error of the message, and then the path's MTU
				if _, err := probing.Write([]byte(payload)); !errors.Is(err, syscall.EMSGSIZE) {
					t.Errorf("%v, want EMSGSIZE", err)
				}
			}
			_, err := probing.Write([]byte(payload[:1300]))
			if errors.Is(err, syscall.EMSGSIZE) { // the error of the message itself is told once, too
				_, err = probing.Write([]byte(payload[:1300]))
			}
			if err != nil {
				t.Fatalf("a datagram of the size that is possible: %v", err)
			}
			f.captured(t, payload[:1300])

			careless := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			say(t, careless, server, payload)
			if d := f.captured(t, payload); d.Whole {
				t.Error("a datagram that may be fragmented is said to be one that must not")
			}
		})
	})
}

// A closed port is told in both directions: to the application that asks, and to the agent when
// it delivers.
func TestUDPClosedPort(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		w := watch(t, f)
		forFamilies(t, func(t *testing.T, fam family) {
			server := at(fam.of(f.db), 9)
			app := dialUDP(t, f.web.Namespace, server)
			if _, err := app.Write([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			d := f.captured(t, "anybody?")
			if err := f.pod.Datagrams().Refuse(d.From, d.To); err != nil {
				t.Fatal(err)
			}
			if err := app.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%v, want ECONNREFUSED", err)
			}

			client, closed := at(fam.of(f.db), 40000), at(fam.of(f.web), 9)
			if err := f.pod.Datagrams().Keep(closed, client); err != nil {
				t.Fatal(err)
			}
			if err := f.pod.Datagrams().Deliver(client, closed, []byte("secret of the tunnel")); err != nil {
				t.Fatal(err)
			}
			gotClient, gotApp, err := f.pod.Datagrams().Refused(fam.name == "v4")
			if err != nil || gotClient != client || gotApp != closed {
				t.Errorf("refused from %v to %v, %v; want %v to %v", gotClient, gotApp, err, client, closed)
			}
		})
		if w.arrives(t, "secret of the tunnel") {
			t.Error("what the tunnel brought went out in clear, inside an ICMP message")
		}
	})
}

// watch sees what leaves web for db.
func watch(t *testing.T, f *fixture) *wire { return newWire(t, f.node, f.web, f.db) }

// Only the pod's own addresses can be delivered to, or sent from.
func TestUDPForeignAddresses(t *testing.T) {
	netnstest.Require(t)
	f := withUDP(t, udpModes()[0], kernel.UDPConfig{})
	d := f.pod.Datagrams()
	if err := d.Deliver(at(f.db.V4, 1), at(f.db.V4, 2), nil); !errors.Is(err, kernel.ErrForeign) {
		t.Errorf("%v, want ErrForeign", err)
	}
	if err := d.Deliver(at(f.db.V6, 1), at(f.web.V4, 2), nil); !errors.Is(err, syscall.EAFNOSUPPORT) {
		t.Errorf("%v, want EAFNOSUPPORT", err)
	}
	if err := d.Deliver(at(f.db.V4, 1), at(f.web.V4, 2), make([]byte, 65508)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("%v, want EMSGSIZE", err)
	}
}

// One socket, a thousand peers, each answered in its own name.
func TestUDPOneSocketManyPeers(t *testing.T) {
	netnstest.Require(t)
	f := enrolled(t, udpModes()[0])
	peers := make(map[kernel.Peer][]dataplane.PortRange)
	var list []netip.AddrPort
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)})
		peers[kernel.Peer{Addr: a}] = nil
		list = append(list, at(a, uint16(1000+i)))
	}
	if err := f.dp.SetPeers(peers); err != nil {
		t.Fatal(err)
	}
	f.captureUDP(t, kernel.UDPConfig{})
	app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
	for _, p := range list {
		say(t, app, p, p.String())
		d := f.captured(t, p.String())
		if d.To != p {
			t.Fatalf("to %v, want %v", d.To, p)
		}
		if err := f.pod.Datagrams().Deliver(p, d.From, []byte("from "+p.String())); err != nil {
			t.Fatal(err)
		}
		if from := hear(t, app, "from "+p.String()); from != p {
			t.Fatalf("from %v, want %v", from, p)
		}
	}
}

// A server with several sockets and IP_PKTINFO is told the address that was asked, and the
// interface that it would be without the mesh.
func TestUDPPacketInfo(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		server := bindUDP(t, f.web.Namespace, at(netip.IPv4Unspecified(), 0))
		setUDP(t, server, unix.SOL_IP, unix.IP_PKTINFO, 1)
		address := at(f.web.V4, localOf(server).Port())
		if err := f.pod.Datagrams().Deliver(at(f.db.V4, 40000), address, []byte("question")); err != nil {
			t.Fatal(err)
		}
		if err := server.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		oob := make([]byte, 128)
		_, n, _, _, err := server.ReadMsgUDPAddrPort(make([]byte, 100), oob)
		if err != nil {
			t.Fatal(err)
		}
		h, data, _, err := unix.ParseOneSocketControlMessage(oob[:n])
		if err != nil || h.Type != unix.IP_PKTINFO {
			t.Fatalf("control message %v, %v", h, err)
		}
		// struct in_pktinfo: interface, local address, address of the header
		if got := netip.AddrFrom4([4]byte(data[8:])); got != f.web.V4 {
			t.Errorf("asked at %v, want %v", got, f.web.V4)
		}
		if int(data[0]) != f.web.InterfaceIndex {
			t.Errorf("by interface %d, want %d", data[0], f.web.InterfaceIndex)
		}
	})
}

// An application bound to an interface is captured and answered as well.
func TestUDPOfSocketBoundToInterface(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		forFamilies(t, func(t *testing.T, fam family) {
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			raw, err := app.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var failure error
			err = raw.Control(func(fd uintptr) { failure = unix.BindToDevice(int(fd), "eth0") })
			if err := errors.Join(err, failure); err != nil {
				t.Fatal(err)
			}
			server := at(fam.of(f.db), 53)
			say(t, app, server, "question")
			d := f.captured(t, "question")
			if err := f.pod.Datagrams().Deliver(server, d.From, []byte("answer")); err != nil {
				t.Fatal(err)
			}
			hear(t, app, "answer")
		})
	})
}

// The tunnel's port is the agent's, whoever else is bound to it.
func TestUDPTunnelPort(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{Strict: true})
		forFamilies(t, func(t *testing.T, fam family) {
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 15008))
			say(t, peer, at(fam.of(f.web), 15008), "initial")
			quic, _, err := f.pod.Datagrams().QUIC()
			if err != nil {
				t.Fatal(err)
			}
			defer quic.Close()
			if from := hear(t, quic, "initial"); from != localOf(peer) {
				t.Errorf("from %v, want %v", from, localOf(peer))
			}
			// And what the agent sends passes, to a peer's tunnel port.
			say(t, quic, localOf(peer), "handshake")
			if from := hear(t, peer, "handshake"); from != at(fam.of(f.web), 15008) {
				t.Errorf("from %v", from)
			}
		})
	})
}

// What escapes capture is dropped on the host's end: a frame past every queue, whole or in
// fragments, and what leaves while the program in the pod is gone.
func TestUDPGuard(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		other := f.node.NewPod(t)
		if !newWire(t, f.node, f.web, other).udpArrives(t, 53, "to another") {
			t.Error("a datagram to another than a peer is dropped")
		}
		f.peers(t)
		w := watch(t, f)
		if !w.udpArrives(t, 53, "not a peer") {
			t.Error("a datagram is dropped before its destination is a peer")
		}
		f.peers(t, f.db)
		if w.udpArrives(t, 53, "to a peer") {
			t.Error("a datagram for a peer gets past the guard")
		}
		if w.udpFragmentsArrive(t, 53, "later fragment") {
			t.Error("a fragment for a peer gets past the guard")
		}
		if !w.udpFragmentsArrive(t, 5, "fragment that is left alone") {
			t.Error("a fragment to a port that is left alone is dropped")
		}
	})
}

// With the agent killed nothing is in clear, and what is not for peers works.
func TestUDPFailsClosedWithoutAgent(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		other := f.node.NewPod(t)
		w := watch(t, f)
		if err := f.dp.Close(); err != nil { // what is left by a death, and no more
			t.Fatal(err)
		}
		forFamilies(t, func(t *testing.T, fam family) {
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			say(t, app, at(fam.of(f.db), 53), "in nobody's hands")
			plain := bindUDP(t, other.Namespace, at(fam.of(other), 0))
			say(t, app, localOf(plain), "DNS")
			hear(t, plain, "DNS")
		})
		// The next one takes it all over, peers included.
		f.open(t)
		f.openPod(t)
		if w.arrives(t, "in nobody's hands") {
			t.Error("a datagram for a peer went out in clear while no agent ran")
		}
		app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
		say(t, app, at(f.db.V4, 53), "in the next agent's")
		f.captured(t, "in the next agent's")
		for _, c := range f.pod.Check(t.Context()) {
			if !c.OK {
				t.Errorf("check %s: %s", c.Check, c.Detail)
			}
		}
	})
}

// An agent of another layout takes over: peers, older sockets and capture hold throughout.
func TestUDPSurvivesAnotherLayout(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		f.peers(t, f.db)
		older := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
		f.captureUDP(t, kernel.UDPConfig{})
		if err := f.dp.Close(); err != nil {
			t.Fatal(err)
		}
		f.cfg = f.cfg.WithLayout("another")
		f.open(t)
		f.openPod(t)
		app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
		say(t, app, at(f.db.V4, 53), "captured")
		f.captured(t, "captured")
		peer := bindUDP(t, f.db.Namespace, at(f.db.V4, 0))
		say(t, older, localOf(peer), "in clear")
		hear(t, peer, "in clear")
	})
}

// An agent takes over while the one before it lives: what is sent reaches the new one, though both
// have sockets at the tunnel's port.
func TestUDPHandover(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{})
		old, oldPod := f.dp, f.pod
		if err := old.Yield(); err != nil {
			t.Fatal(err)
		}
		f.open(t)
		f.openPod(t)
		app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
		say(t, app, at(f.db.V4, 53), "to the new agent")
		d := f.captured(t, "to the new agent")
		peer := bindUDP(t, f.db.Namespace, at(f.db.V4, 0))
		say(t, peer, at(f.web.V4, 15008), "initial")
		quic, _, err := f.pod.Datagrams().QUIC()
		if err != nil {
			t.Fatal(err)
		}
		defer quic.Close()
		hear(t, quic, "initial")
		// The old one may still deliver what its tunnels bring.
		if err := oldPod.Datagrams().Deliver(d.To, d.From, []byte("from the old agent")); err != nil {
			t.Fatal(err)
		}
		hear(t, app, "from the old agent")
		if err := old.Close(); err != nil {
			t.Fatal(err)
		}
		say(t, app, at(f.db.V4, 53), "to the new agent alone")
		f.captured(t, "to the new agent alone")
	})
}

// Of two agents each gets the packets of QUIC to connection IDs of its own, and the one that has the
// node all others: what is new, and what was the other's once that has ended.
func TestQUICGoesByItsMark(t *testing.T) {
	inUDPMode(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{Strict: true})
		take := func() (*net.UDPConn, string) {
			t.Helper()
			conn, mark, err := f.pod.Datagrams().QUIC()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			return conn, string(mark[:])
		}
		old := f.dp
		oldQUIC, oldMark := take()
		if err := old.Yield(); err != nil {
			t.Fatal(err)
		}
		f.open(t)
		f.openPod(t)
		newQUIC, newMark := take()
		short := func(mark string) string { return "\x40" + mark + "and more" }
		long := func(mark string) string { return "\xe0\x00\x00\x00\x01\x08" + mark + "and more" }
		nobodys := string([]byte{^oldMark[0], ^newMark[1]})
		forFamilies(t, func(t *testing.T, fam family) {
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 15008))
			for _, packet := range []func(string) string{short, long} {
				for mark, to := range map[string]*net.UDPConn{oldMark: oldQUIC, newMark: newQUIC, nobodys: newQUIC} {
					say(t, peer, at(fam.of(f.web), 15008), packet(mark))
					if from := hear(t, to, packet(mark)); from != localOf(peer) {
						t.Errorf("from %v, want %v", from, localOf(peer))
					}
				}
			}
			for _, packet := range []string{"", "\x40", "\x40a", "\xe0", long("")[:6]} {
				say(t, peer, at(fam.of(f.web), 15008), packet)
				hear(t, newQUIC, packet)
			}
			// Several in one buffer, as GRO makes them: of one agent, and of both.
			segmented(t, peer, len(short(oldMark)))
			say(t, peer, at(fam.of(f.web), 15008), short(oldMark)+short(oldMark))
			hear(t, oldQUIC, short(oldMark))
			hear(t, oldQUIC, short(oldMark))
			say(t, peer, at(fam.of(f.web), 15008), short(oldMark)+short(newMark))
			say(t, peer, at(fam.of(f.web), 15008), short(nobodys)+short(oldMark))
			say(t, peer, at(fam.of(f.web), 15008), short(oldMark)+"\x40")
			hear(t, oldQUIC, short(oldMark))
			hear(t, oldQUIC, "\x40")
		})
		if err := errors.Join(old.Close(), oldQUIC.Close()); err != nil {
			t.Fatal(err)
		}
		forFamilies(t, func(t *testing.T, fam family) {
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 15008))
			say(t, peer, at(fam.of(f.web), 15008), short(oldMark))
			hear(t, newQUIC, short(oldMark))
		})
		for _, c := range f.pod.Check(t.Context()) {
			if !c.OK {
				t.Errorf("check %s: %s", c.Check, c.Detail)
			}
		}
	})
}

// segmented has what conn sends cut into datagrams of size bytes on its way (UDP_SEGMENT).
func segmented(t *testing.T, conn *net.UDPConn, size int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) })
	if err := errors.Join(err, failure); err != nil {
		t.Fatal(err)
	}
}

// Somebody in the pod takes the programs, the sysctl or the entries away.
func TestUDPRepair(t *testing.T) {
	netnstest.Require(t)
	f := withUDP(t, udpModes()[0], kernel.UDPConfig{})
	for _, pin := range []string{"divert", "receive"} {
		path := fmt.Sprintf("%s/pods/%d/%s_%d", pinDir(f), f.web.Cookie(), pin, f.web.InterfaceIndex)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	netnstest.Do(t, f.web.Namespace, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/lo/accept_local", []byte("0"), 0o644)
	})
	mended, err := f.pod.Repair()
	if err != nil || len(mended) != 2 {
		t.Errorf("mended %q, %v; want UDP and the sysctl", mended, err)
	}
	app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
	say(t, app, at(f.db.V4, 53), "captured")
	f.captured(t, "captured")
}

// Release leaves nothing behind.
func TestUDPRelease(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := withUDP(t, m, kernel.UDPConfig{Strict: true})
		if err := f.pod.ReleaseUDP(); err != nil {
			t.Fatal(err)
		}
		if f.pod.Datagrams() != nil {
			t.Error("there are sockets")
		}
		forFamilies(t, func(t *testing.T, fam family) {
			peer := bindUDP(t, f.db.Namespace, at(fam.of(f.db), 0))
			app := bindUDP(t, f.web.Namespace, at(fam.of(f.web), 0))
			say(t, app, localOf(peer), "in clear")
			say(t, peer, hear(t, peer, "in clear"), "answer")
			hear(t, app, "answer")
		})
		netnstest.Do(t, f.web.Namespace, func() error {
			value, err := os.ReadFile("/proc/sys/net/ipv4/conf/lo/accept_local")
			if err == nil && string(value) != "0\n" {
				t.Errorf("accept_local is %q", value)
			}
			return err
		})
		f.captureUDP(t, kernel.UDPConfig{}) // and again
		app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
		say(t, app, at(f.db.V4, 53), "captured")
		f.captured(t, "captured")
	})
}

// Without SK_LOOKUP the UDP of a pod goes in clear, unless it must not: then the guard drops what
// should have been captured, and no more.
func TestUDPNeedsSKLookup(t *testing.T) {
	netnstest.Require(t)
	for _, m := range modes() {
		if m.inbound != kernel.InboundTC {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			f := enrolled(t, m)
			if f.dp.NoUDP() == nil {
				t.Fatal("it can be captured")
			}
			older, app := bindUDP(t, f.web.Namespace, at(f.web.V4, 0)), bindUDP(t, f.web.Namespace, at(f.web.V6, 0))
			if err := f.pod.CaptureUDP(kernel.UDPConfig{}); !errors.Is(err, f.dp.NoUDP()) {
				t.Errorf("captured: %v", err)
			}
			peer, peer6 := bindUDP(t, f.db.Namespace, at(f.db.V4, 0)), bindUDP(t, f.db.Namespace, at(f.db.V6, 0))
			say(t, app, localOf(peer6), "in clear")
			hear(t, peer6, "in clear")

			require := kernel.UDPConfig{Require: true, Clear: []dataplane.PortRange{{First: 123, Last: 123}}}
			for range 2 { // again it must not let go, nor have newer sockets for older ones
				if err := f.pod.CaptureUDP(require); !errors.Is(err, f.dp.NoUDP()) {
					t.Errorf("captured where it is required: %v", err)
				}
				app = bindUDP(t, f.web.Namespace, at(f.web.V4, 0))
				app6 := bindUDP(t, f.web.Namespace, at(f.web.V6, 0))
				before := f.counter(t, "guard", "dropped_datagram")
				say(t, app, localOf(peer), "dropped")
				say(t, app6, localOf(peer6), "dropped")
				if got := f.counter(t, "guard", "dropped_datagram") - before; got != 2 {
					t.Errorf("the guard dropped %d of 2 datagrams", got)
				}
			}
			ntp := bindUDP(t, f.db.Namespace, at(f.db.V4, 123))
			say(t, app, localOf(ntp), "left alone")
			hear(t, ntp, "left alone")
			say(t, older, localOf(peer), "older")
			hear(t, peer, "older")
			if f.pod.Datagrams() != nil {
				t.Error("there are sockets for what is not captured")
			}

			if err := f.pod.ReleaseUDP(); err != nil {
				t.Fatal(err)
			}
			say(t, app, localOf(peer), "in clear again")
			hear(t, peer, "in clear again")
		})
	}
}

// An agent that cannot capture UDP, after one that did, lets go of it where that is allowed, and
// serves the pod.
func TestUDPIsLetGoWhereItCannotBeAdopted(t *testing.T) {
	netnstest.Require(t)
	for name, cfg := range map[string]kernel.UDPConfig{"default": {}, "required": {Require: true}} {
		t.Run(name, func(t *testing.T) {
			f := withUDP(t, udpModes()[0], cfg)
			if err := f.dp.Close(); err != nil {
				t.Fatal(err)
			}
			f.cfg.Inbound = kernel.InboundTC
			f.open(t)
			if adopted := f.dp.Adopted(); len(adopted) != 1 || !adopted[0].UDP {
				t.Errorf("adopted %+v, want a pod with UDP", adopted)
			}
			f.openPod(t)
			app, peer := bindUDP(t, f.web.Namespace, at(f.web.V4, 0)), bindUDP(t, f.db.Namespace, at(f.db.V4, 0))
			before := f.counter(t, "guard", "dropped_datagram")
			say(t, app, localOf(peer), "after all")
			if !cfg.Require {
				hear(t, peer, "after all")
			} else if got := f.counter(t, "guard", "dropped_datagram") - before; got != 1 {
				t.Errorf("the guard dropped %d datagrams, want 1", got)
			}
			for _, found := range f.pod.Check(t.Context()) {
				if !found.OK {
					t.Errorf("%s: %s", found.Check, found.Detail)
				}
			}
		})
	}
}

// Many flows at once, from many goroutines.
func TestUDPConcurrentFlows(t *testing.T) {
	netnstest.Require(t)
	f := withUDP(t, udpModes()[0], kernel.UDPConfig{})
	d := f.pod.Datagrams()
	echoed := make(chan error, 1)
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := d.Receive(buf)
			if errors.Is(err, net.ErrClosed) {
				echoed <- nil
				return
			}
			if err == nil {
				err = d.Deliver(from.To, from.From, buf[:n])
			}
			if err != nil {
				echoed <- err
				return
			}
		}
	}()
	var apps sync.WaitGroup
	for i := range 20 {
		app := dialUDP(t, f.web.Namespace, at(f.db.V6, uint16(1000+i)))
		if err := app.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		apps.Go(func() {
			buf := make([]byte, 100)
			for j := range 50 {
				want := fmt.Sprint(i, " ", j)
				if _, err := app.Write([]byte(want)); err != nil {
					t.Error(err)
					return
				}
				if n, err := app.Read(buf); err != nil || string(buf[:n]) != want {
					t.Errorf("%q, %v; want %q", buf[:n], err, want)
					return
				}
			}
		})
	}
	apps.Wait()
	if err := f.pod.ReleaseUDP(); err != nil {
		t.Fatal(err)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
}

// udpArrives sends a datagram from a frame, and says whether it comes out.
func (w *wire) udpArrives(t *testing.T, port uint16, text string) bool {
	t.Helper()
	udp := &layers.UDP{SrcPort: 40000, DstPort: layers.UDPPort(port)}
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(w.ip4(layers.IPProtocolUDP)), udp, gopacket.Payload(text+" (IPv4)"))
	w.send(t, w.eth(layers.EthernetTypeIPv6), w.ip6(layers.IPProtocolUDP), udp, gopacket.Payload(text+" (IPv6)"))
	return w.arrives(t, text)
}

// udpFragmentsArrive sends a datagram in two fragments, the second with text.
func (w *wire) udpFragmentsArrive(t *testing.T, port uint16, text string) bool {
	t.Helper()
	w.seq++
	udp := &layers.UDP{SrcPort: 40000, DstPort: layers.UDPPort(port)}
	first := w.ip4(layers.IPProtocolUDP)
	first.Id, first.Flags = uint16(w.seq), layers.IPv4MoreFragments
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(first), udp, gopacket.Payload(make([]byte, 8)))
	second := w.ip4(layers.IPProtocolUDP)
	second.Id, second.FragOffset = uint16(w.seq), 2
	w.send(t, w.eth(layers.EthernetTypeIPv4), checksummed(second), gopacket.Payload(text))
	return w.arrives(t, text)
}

// The qdisc that an interface got for two programs goes with the last of them.
func TestReleasedUDPLeavesNoQdisc(t *testing.T) {
	inUDPModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		before := leftovers(t, f)
		f.captureUDP(t, kernel.UDPConfig{})
		if during := leftovers(t, f); m.tc == kernel.TCClsact && during == before {
			t.Error("no qdisc is to be seen, so that its absence proves nothing")
		}
		if err := f.pod.ReleaseUDP(); err != nil {
			t.Fatal(err)
		}
		if after := leftovers(t, f); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}
