package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// The longest datagrams that there are come back whole: what 16 bits of length leave beside the
// headers, of which IPv6 does not count its own.
func TestUDPCarriesTheLongestDatagrams(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		longest := 65_535 - 8 - 20
		if opts.IPv6 {
			longest = 65_535 - 8
		}
		p.conceals(p.readable(noncePrefix), func() {
			for _, size := range []int{0, 1, 1400, 1472, 1500, 9000, longest} {
				payload := string(append(nonce(), random(longest)...)[:size])
				if err := askUDP(p.web, p.db.AddrPort(portEcho), payload, patience); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
		})
	})
}

// A socket that wants its datagrams whole on the path is told what a tunnel has room for, and that
// much arrives.
func TestUDPSocketLearnsThePathsMTU(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		level, discover, mtu, headers := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU, 20+8
		if opts.IPv6 {
			level, discover, mtu, headers = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU, 40+8
		}
		p.protect()
		conn, err := dialUDP(p.web, p.db.AddrPort(portEcho))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		control := func(do func(fd int) error) {
			t.Helper()
			raw, err := conn.SyscallConn()
			var doErr error
			if err == nil {
				err = raw.Control(func(fd uintptr) { doErr = do(int(fd)) })
			}
			if err := errors.Join(err, doErr); err != nil {
				t.Fatal(err)
			}
		}
		control(func(fd int) error { return unix.SetsockoptInt(fd, level, discover, unix.IP_PMTUDISC_DO) })
		eventually(t, "what fits the link and not the tunnel is too long", func() error {
			if _, err := conn.Write(random(1500 - headers)); !errors.Is(err, unix.EMSGSIZE) {
				return errors.Join(errors.New("it is sent"), err)
			}
			return nil
		})
		var longest int
		control(func(fd int) (err error) {
			longest, err = unix.GetsockoptInt(fd, level, mtu)
			return err
		})
		t.Logf("the path's MTU is %d", longest)
		if longest-headers < leastPacket || longest >= 1500 {
			t.Errorf("the path's MTU is %d", longest)
		}
		eventually(t, "what fits arrives", func() error {
			return exchangeUDP(conn, string(random(longest-headers)), time.Second)
		})
	})
}

// Ten thousand sockets of one pod are answered at once, each its own, and both agents know of
// every flow until a policy ends them all.
func TestUDPCarriesTenThousandFlows(t *testing.T) {
	flows := 10_000
	if raceEnabled {
		flows /= 5
	}
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		p.protect()
		conns, ours := make([]*net.UDPConn, flows), make(map[netip.AddrPort]bool)
		for i := range conns {
			var err error
			if conns[i], err = dialUDP(p.web, p.db.AddrPort(portEcho)); err != nil {
				t.Fatal(err)
			}
			defer conns[i].Close()
			ours[conns[i].LocalAddr().(*net.UDPAddr).AddrPort()] = true
		}
		for round := range 2 {
			started := time.Now()
			atOnce(conns, func(i int, conn *net.UDPConn) {
				if err := exchangeUDP(conn, fmt.Sprintf("flow %d, round %d", i, round), patience); err != nil {
					t.Errorf("flow %d, round %d: %v", i, round, err)
				}
			})
			t.Logf("round %d took %v", round, time.Since(started))
			for _, n := range p.Nodes() {
				listed := udpFlows(t, p.cluster, n)
				listed = slices.DeleteFunc(listed, func(f admin.Connection) bool { return !ours[f.Source.Addr] })
				if len(listed) != flows {
					t.Errorf("round %d: agent of %s lists %d flows, want %d", round, n.Name, len(listed), flows)
				}
			}
		}
		p.apply("policy.yaml", authorization("no-web", "DENY", "web"))
		for _, n := range p.Nodes() {
			eventually(t, "the flows of "+n.Name+" end", func() error {
				if left := len(udpFlows(t, p.cluster, n)); left > 0 {
					return fmt.Errorf("%d are left", left)
				}
				return nil
			})
		}
	})
}

// atOnce calls do for each socket, for many at a time.
func atOnce(conns []*net.UDPConn, do func(i int, conn *net.UDPConn)) {
	indices := make(chan int)
	var workers sync.WaitGroup
	for range 64 {
		workers.Go(func() {
			for i := range indices {
				do(i, conns[i])
			}
		})
	}
	for i := range conns {
		indices <- i
	}
	close(indices)
	workers.Wait()
}

// One socket that is not connected asks a thousand peers, and each answer comes from the peer that
// was asked.
func TestUDPSocketHasAThousandPeers(t *testing.T) {
	const peers, firstPort = 1000, 20_000
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		for i := range uint16(peers) {
			echoUDP(t, p.db, firstPort+i)
		}
		p.protect()
		conn, err := p.web.ListenPacket(t.Context(), "udp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		waiting := make(map[netip.AddrPort]string)
		for i := range uint16(peers) {
			waiting[p.db.AddrPort(firstPort+i)] = fmt.Sprint("peer ", i)
		}
		asked := make(map[netip.AddrPort]string, peers)
		for end := time.Now().Add(patience); len(waiting) > 0 && time.Now().Before(end); {
			for peer, question := range waiting {
				asked[peer] = question
				if _, err := conn.WriteTo([]byte(question), net.UDPAddrFromAddrPort(peer)); err != nil {
					t.Fatal(err)
				}
			}
			for buf := make([]byte, 64); len(waiting) > 0; {
				if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				n, from, err := conn.ReadFrom(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break // and ask those again that were lost
				}
				if err != nil {
					t.Fatal(err)
				}
				peer := from.(*net.UDPAddr).AddrPort()
				peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
				if string(buf[:n]) != asked[peer] {
					t.Errorf("%v answered %q, want %q", peer, buf[:n], asked[peer])
				}
				delete(waiting, peer)
			}
		}
		if len(waiting) > 0 {
			t.Errorf("%d peers did not answer", len(waiting))
		}
		if n := len(udpFlows(t, p.cluster, p.Node(1))); n < peers {
			t.Errorf("the agent lists %d flows", n)
		}
	})
}

// A server on the wildcard address learns which of its addresses was asked, and answers from it.
func TestUDPServerAnswersFromTheAddressThatWasAsked(t *testing.T) {
	p := newUDPPair(t, lab.Options{DualStack: true}, nil)
	asked := serveEveryAddress(t, p.db, portName)
	p.conceals(p.port(portName), func() {
		for _, addr := range p.db.Addrs {
			if err := askUDP(p.web, netip.AddrPortFrom(addr, portName), "which?", patience); err != nil {
				t.Errorf("%v: %v", addr, err)
				continue
			}
			if got := <-asked; got != addr {
				t.Errorf("the server was asked at %v, and learns %v", addr, got)
			}
		}
	})
}

// serveEveryAddress echoes as DNS servers do: from the address that IP_PKTINFO names. It tells
// which that was.
func serveEveryAddress(t *testing.T, pod *lab.Pod, port uint16) <-chan netip.Addr {
	t.Helper()
	conn, err := pod.ListenPacket(t.Context(), "udp", fmt.Sprintf("[::]:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	server := ipv6.NewPacketConn(conn)
	if err := server.SetControlMessage(ipv6.FlagDst, true); err != nil {
		t.Fatal(err)
	}
	asked := make(chan netip.Addr, 100) // more than a test asks
	var serving sync.WaitGroup
	serving.Go(func() {
		for buf := make([]byte, 1500); ; {
			n, info, from, err := server.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || info == nil {
				t.Errorf("read a question: %v, %v", info, err)
				return
			}
			addr, _ := netip.AddrFromSlice(info.Dst)
			asked <- addr.Unmap()
			if _, err := server.WriteTo(buf[:n], &ipv6.ControlMessage{Src: info.Dst}, from); err != nil {
				t.Error("answer:", err)
			}
		}
	})
	t.Cleanup(func() {
		_ = conn.Close()
		serving.Wait()
	})
	return asked
}

// A policy ends a live flow and keeps it away, says so, and lets it come back when it goes.
func TestPolicyEndsUDP(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		p.protect()
		conn, err := dialUDP(p.web, p.db.AddrPort(portEcho))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := exchangeUDP(conn, "before the policy", patience); err != nil {
			t.Fatal(err)
		}
		p.apply("policy.yaml", authorization("no-web", "DENY", "web"))
		eventually(t, "the live flow ends", func() error {
			if flows := udpFlows(t, p.cluster, p.Node(2)); len(flows) > 0 {
				return fmt.Errorf("%d are left", len(flows))
			}
			return nil
		})
		p.flow(2, "a live flow that was cut", func(f admin.Flow) bool {
			return f.Protocol == dataplane.ProtocolHBONEUDP && f.Event == admin.FlowClose && f.Flags == "DENY"
		})
		for range 3 {
			if err := exchangeUDP(conn, "under the policy", 200*time.Millisecond); err == nil {
				t.Error("the flow is answered although it is denied")
			}
		}
		p.flow(2, "a denial", func(f admin.Flow) bool {
			return f.Protocol == dataplane.ProtocolHBONEUDP && f.Event == admin.FlowDenied && f.Source.Workload == "web" && f.Flags == "DENY"
		})
		logged(t, p.agent(2), "src.workload=web", "direction=inbound", "shop/no-web rule 0")

		if err := p.DeleteFile("policy.yaml"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the flow works again", func() error { return exchangeUDP(conn, "after the policy", time.Second) })
	})
}

// What nobody listens for is refused, in a tunnel as in clear.
func TestUDPClosedPortIsRefused(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		p.conceals(p.port(portClosed), func() {
			for range 3 {
				if err := askUDP(p.web, p.db.AddrPort(portClosed), "anybody?", patience); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a closed port: %v, want %v", err, syscall.ECONNREFUSED)
				}
			}
		})
	})
}

// Ports that the server's annotation names are in clear, and no others.
func TestUDPClearPortsAreInClear(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, map[string]string{dataplane.UDPClearAnnotation: fmt.Sprint(portName)})
		echoUDP(t, p.db, portName)
		left := nonce()[16:]
		p.conceals(p.readable(noncePrefix), func() {
			for to, payload := range map[uint16][]byte{portEcho: nonce(), portName: left} {
				if err := askUDP(p.web, p.db.AddrPort(to), string(payload), patience); err != nil {
					t.Errorf("port %d: %v", to, err)
				}
			}
		})
		if !p.readable(left)() {
			t.Error("a port that is to be left alone is not in clear")
		}
	})
}

// Where the path lets no UDP to the tunnel's port through, flows go by HTTP/2, and the agent
// says why.
func TestUDPGoesByHTTP2WherePort15008IsBlocked(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		p := newUDPPair(t, opts, nil)
		family := "-4"
		if opts.IPv6 {
			family = "-6"
		}
		block := []string{family, "rule", "add", "ipproto", "udp", "dport", fmt.Sprint(dataplane.PortTunnel), "blackhole"}
		if out, err := p.Fabric().Exec(t.Context(), "ip", block...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		p.conceals(p.readable(noncePrefix), func() {
			for range 10 {
				if err := askUDP(p.web, p.db.AddrPort(portEcho), string(nonce()), patience); err != nil {
					t.Error(err)
				}
			}
		})
		logged(t, p.agent(1), "tunnels to a peer go by HTTP/2", "UDP port 15008", "NetworkPolicy", "peer=")
		if len(udpFlows(t, p.cluster, p.Node(2))) == 0 {
			t.Error("the server's agent lists no flow")
		}
	})
}
