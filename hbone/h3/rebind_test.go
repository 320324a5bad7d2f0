package h3_test

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// nat passes on what one client sends it, from a port of its own that it may give up for another.
type nat struct {
	inside *net.UDPConn
	server *net.UDPAddr

	mu      sync.Mutex
	client  *net.UDPAddr
	outside *net.UDPConn
	ports   map[int]bool // that the server saw
	work    sync.WaitGroup
}

func newNAT(t *testing.T, addr string, server netip.AddrPort) *nat {
	t.Helper()
	inside, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)})
	if err != nil {
		t.Fatal(err)
	}
	n := &nat{inside: inside, server: net.UDPAddrFromAddrPort(server), ports: make(map[int]bool)}
	n.rebind(t)
	n.work.Go(func() {
		buf := make([]byte, 2048)
		for {
			size, from, err := inside.ReadFromUDP(buf)
			if err != nil {
				return
			}
			n.mu.Lock()
			n.client = from
			n.ports[n.outside.LocalAddr().(*net.UDPAddr).Port] = true
			_, _ = n.outside.Write(buf[:size]) // QUIC repeats what gets lost
			n.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		_ = inside.Close()
		n.mu.Lock()
		_ = n.outside.Close()
		n.mu.Unlock()
		n.work.Wait()
	})
	return n
}

func (n *nat) addr() netip.AddrPort { return n.inside.LocalAddr().(*net.UDPAddr).AddrPort() }

// rebind has the server see the client at another port; the one before answers nobody any more.
func (n *nat) rebind(t *testing.T) {
	t.Helper()
	outside, err := net.DialUDP("udp", nil, n.server)
	if err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	if n.outside != nil {
		_ = n.outside.Close()
	}
	n.outside = outside
	n.mu.Unlock()
	n.work.Go(func() {
		buf := make([]byte, 2048)
		for {
			size, err := outside.Read(buf)
			if err != nil {
				return
			}
			n.mu.Lock()
			client := n.client
			n.mu.Unlock()
			_, _ = n.inside.WriteToUDP(buf[:size], client) // as above
		}
	})
}

// heard is a sink that keeps the first datagram.
type heard chan string

func (h heard) Datagram(p []byte) {
	select {
	case h <- string(p):
	default:
	}
}

func (h heard) End(error) {}

// A connection outlives a NAT's change of mind (RFC 9000 section 9), with its streams, its flows and the
// address that its peer proved first.
func TestConnectionSurvivesANewPath(t *testing.T) {
	for name, addr := range loopbacks() {
		t.Run(name, func(t *testing.T) {
			served := make(chan *hbone.ServerRequest, 3)
			streams, flows := make(chan hbone.Stream, 2), make(chan hbone.DatagramStream, 1)
			done := make(chan struct{})
			w := newWorld(t, addr, func(r *hbone.ServerRequest) {
				served <- r
				if r.Protocol == hbone.UDP {
					f, err := r.AcceptDatagrams(hbone.Response{})
					if err != nil {
						t.Error(err)
						return
					}
					flows <- f
				} else {
					s, err := r.Accept(hbone.Response{})
					if err != nil {
						t.Error(err)
						return
					}
					streams <- s
				}
				<-done
			}, nil)
			defer close(done)
			n := newNAT(t, addr, w.server.addr)
			w.key.Remote = n.addr()
			session := w.connect(t)
			open := func() (ours, theirs hbone.Stream) {
				t.Helper()
				ours, _, err := hbonetest.Open(t.Context(), session, &hbone.Request{Authority: "10.0.0.1:80"})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = ours.Close() })
				return ours, <-streams
			}
			ours, theirs := open()
			flow, _, err := session.OpenDatagrams(t.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer flow.Close()
			theirFlow := <-flows
			first := (<-served).Conn.Remote

			for range 2 {
				n.rebind(t)
				hbonetest.Write(t, ours, "question")
				hbonetest.Read(t, theirs, "question")
				hbonetest.Write(t, theirs, "answer")
				hbonetest.Read(t, ours, "answer")
			}
			got := make(heard, 1)
			theirFlow.Deliver(got)
			for deadline := time.Now().Add(10 * time.Second); ; {
				if err := flow.Send([]byte("datagram"), true); err != nil {
					t.Fatal(err)
				}
				select {
				case text := <-got:
					if text != "datagram" {
						t.Errorf("the flow brought %q", text)
					}
				case <-time.After(100 * time.Millisecond): // datagrams may get lost
					if time.Now().Before(deadline) {
						continue
					}
					t.Error("the flow brings nothing")
				}
				break
			}
			_, _ = open()
			<-served // of the flow
			if last := (<-served).Conn.Remote; last != first {
				t.Errorf("a request on the new path is said to come from %v, others came from %v", last, first)
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			if len(n.ports) != 3 {
				t.Errorf("the server saw %d ports, want 3", len(n.ports))
			}
		})
	}
}
