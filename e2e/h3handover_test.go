package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// newH3Upgrade is an upgrade whose connections go by HTTP/3.
func newH3Upgrade(t *testing.T, opts lab.Options) *upgrade {
	u := prepareUpgrade(t, opts)
	if err := u.AddNamespace("shop", map[string]string{dataplane.TransportLabel: string(dataplane.TransportH3)}); err != nil {
		t.Fatal(err)
	}
	u.start("--drain-timeout=" + drainTimeout.String())
	u.label(dataplane.ModeAmbient)
	eventually(t, "connections go by HTTP/3", func() error { return open(t, u.client, u.target).overHTTP3(u.cluster) })
	u.traffic = startLoad(t, 4, u.client, u.target)
	return u
}

// overHTTP3 uses s and closes it, and wants its agent to carry it so.
func (s steady) overHTTP3(c *cluster) error {
	defer s.Close()
	if err := s.use(); err != nil {
		return err
	}
	client := c.Agent(c.Node(1)).Client()
	defer client.Close()
	list, err := client.Connections(c.t.Context())
	if err != nil {
		return err
	}
	for _, conn := range list {
		if conn.Source.Addr == s.LocalAddr().(*net.TCPAddr).AddrPort() && strings.HasPrefix(conn.Transport, "h3") {
			return nil
		}
	}
	return fmt.Errorf("it does not: %+v", list)
}

// stream is a connection on which bytes go both ways all the time: what the server sends back is
// what it was sent, and in this order.
type stream struct {
	conn    *net.TCPConn
	stop    chan struct{}
	ended   chan error
	arrived atomic.Int64 // bytes
}

func startStream(t *testing.T, from *lab.Pod, to netip.AddrPort) *stream {
	t.Helper()
	conn, err := from.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := &stream{conn: conn, stop: make(chan struct{}), ended: make(chan error, 2)}
	seed := [32]byte{1}
	sent := make(chan int64, 1)
	go func() { s.ended <- s.write(rand.NewChaCha8(seed), sent) }()
	go func() { s.ended <- s.read(rand.NewChaCha8(seed), sent) }()
	return s
}

func (s *stream) write(bytes *rand.ChaCha8, sent chan<- int64) error {
	chunk := make([]byte, 16<<10)
	for n := int64(0); ; n += int64(len(chunk)) {
		select {
		case <-s.stop:
			sent <- n
			return s.conn.CloseWrite()
		case <-time.After(2 * time.Millisecond):
		}
		_, _ = bytes.Read(chunk) // never fails
		if _, err := s.conn.Write(chunk); err != nil {
			sent <- n
			return fmt.Errorf("write after %d bytes: %w", n, err)
		}
	}
}

func (s *stream) read(bytes *rand.ChaCha8, sent <-chan int64) error {
	got, want := make([]byte, 16<<10), make([]byte, 16<<10)
	for {
		n, err := s.conn.Read(got)
		_, _ = bytes.Read(want[:n]) // never fails
		if string(got[:n]) != string(want[:n]) {
			return fmt.Errorf("other bytes came back after %d", s.arrived.Load())
		}
		s.arrived.Add(int64(n))
		switch {
		case errors.Is(err, io.EOF):
			if all := <-sent; s.arrived.Load() != all {
				return fmt.Errorf("%d bytes came back of %d", s.arrived.Load(), all)
			}
			return nil
		case err != nil:
			return fmt.Errorf("read after %d bytes: %w", s.arrived.Load(), err)
		}
	}
}

// flows wants that bytes arrive.
func (s *stream) flows(t *testing.T) {
	t.Helper()
	before := s.arrived.Load()
	eventually(t, "bytes go on", func() error {
		select {
		case err := <-s.ended:
			t.Fatal("the connection ended:", err)
		default:
		}
		if n := s.arrived.Load() - before; n < 256<<10 {
			return fmt.Errorf("%d arrived", n)
		}
		return nil
	})
}

// end ends it, and wants that all bytes came back.
func (s *stream) end(t *testing.T) {
	t.Helper()
	close(s.stop)
	if err := s.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-s.ended; err != nil {
			t.Error(err)
		}
	}
}

// Connections over HTTP/3 outlive an upgrade as those over HTTP/2 do: of the server's agent, of the
// client's, and of both. No byte is lost, no new connection fails, and the old agent ends them when
// its drain does.
func TestUpgradeSparesConnectionsOverHTTP3(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		u := newH3Upgrade(t, opts)
		both := startStream(t, u.client, u.target)
		both.flows(t)
		var drained []*lab.Agent
		for _, number := range []int{2, 1} {
			one := startStream(t, u.client, u.target)
			lasting := open(t, u.client, u.target)
			one.flows(t)
			if err := lasting.use(); err != nil {
				t.Fatal(err)
			}
			old := u.hand(u.Node(number), u.v2)
			drained = append(drained, old)
			u.served()
			one.flows(t)
			time.Sleep(3 * time.Second / 2) // the old agent accepts no more
			u.served()
			one.flows(t)
			both.flows(t)
			if err := lasting.use(); err != nil {
				t.Errorf("a connection without traffic: %v", err)
			}
			one.end(t)
			if err := open(t, u.client, u.target).overHTTP3(u.cluster); err != nil {
				t.Errorf("a new connection: %v", err)
			}
		}
		both.end(t)
		lasting := open(t, u.client, u.target)
		if err := lasting.use(); err != nil {
			t.Fatal(err)
		}
		drained = append(drained, u.hand(u.Node(2), u.v1))
		for _, old := range drained {
			if err := old.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		told := time.Now()
		time.Sleep(drainTimeout / 4)
		if err := lasting.use(); err != nil {
			t.Errorf("a connection of before the handover, while its agent drains: %v", err)
		}
		_ = lasting.SetReadDeadline(time.Now().Add(patience)) // an error shows next
		if _, err := lasting.Read(make([]byte, 1)); !isReset(err) || time.Since(told) < drainTimeout/2 {
			t.Errorf("it ended with %v after %v, want a reset after the drain", err, time.Since(told))
		}
		for _, old := range drained {
			if err := old.Wait(t.Context()); err != nil {
				t.Errorf("the old agent: %v", err)
			}
		}
		u.spared()
	})
}

// Peers of an agent that dies while it drains learn of it from its successor.
func TestConnectionsOverHTTP3EndWithAKilledAgent(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		u := newH3Upgrade(t, opts)
		for _, number := range []int{2, 1} {
			s := startStream(t, u.client, u.target)
			s.flows(t)
			old := u.hand(u.Node(number), u.v2)
			time.Sleep(3 * time.Second / 2) // the load is with the new agent
			s.flows(t)
			if err := old.Kill(); err != nil {
				t.Fatal(err)
			}
			killed := time.Now()
			_ = s.conn.SetDeadline(killed.Add(patience)) // an error shows next
			if err := <-s.ended; !isReset(err) {
				t.Errorf("node %d: it ended with %v, want a reset", number, err)
			}
			if took := time.Since(killed); took > 3*time.Second {
				t.Errorf("node %d: it ended %v after its agent", number, took)
			}
		}
		u.spared()
	})
}

// A node that goes to a successor and back keeps its connections over HTTP/3.
func TestNodeIsGivenBackOverHTTP3(t *testing.T) {
	u := newH3Upgrade(t, lab.Options{})
	s := startStream(t, u.client, u.target)
	for _, n := range u.Nodes() {
		old := u.hand(n, u.v2)
		s.flows(t)
		u.served()
		if err := u.Agent(n).Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := old.AwaitSuccession(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.flows(t)
		u.served()
	}
	s.end(t)
	u.spared()
}

// Flows of UDP begin anew with an agent that takes a node over, whosever it is: what is lost is what is
// under way in that moment.
func TestUpgradeSparesUDP(t *testing.T) {
	eachFamilyInFull(t, func(t *testing.T, opts lab.Options) {
		u := prepareUpgrade(t, opts)
		target := u.server.AddrPort(portEcho)
		echoUDP(t, u.server, portEcho)
		u.start("--drain-timeout=" + drainTimeout.String())
		u.label(dataplane.ModeAmbient)
		awaitUDP(t, u.cluster, u.client, target)
		conn, err := dialUDP(u.client, target)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		lost := countLost(t, conn)
		for _, number := range []int{2, 1} {
			u.replace(u.Node(number), u.v2, 5*time.Second/2) // the old one accepts no more, and its flows have ended
			n := lost()
			t.Logf("node %d: %d lost", number, n)
			if n > 400 {
				t.Errorf("%d datagrams were lost when the agent of node %d was replaced, which is %v of them", n, number, 400*countInterval)
			}
		}
	})
}

// countInterval is between two datagrams of countLost.
const countInterval = 2 * time.Millisecond

// countLost sends datagrams on conn, one by one, until the test ends. It returns what tells how many
// were not answered since it was asked last.
func countLost(t *testing.T, conn *net.UDPConn) (lost func() int64) {
	var sent, answered atomic.Int64
	stop, ended := make(chan struct{}), make(chan struct{}, 2)
	go func() {
		defer func() { ended <- struct{}{} }()
		for {
			select {
			case <-stop:
				return
			case <-time.After(countInterval):
			}
			sent.Add(1)
			_, _ = conn.Write([]byte("question")) // what is lost is counted
		}
	}()
	go func() {
		defer func() { ended <- struct{}{} }()
		for b := make([]byte, 64); ; {
			_, err := conn.Read(b)
			switch {
			case err == nil:
				answered.Add(1)
			case errors.Is(err, net.ErrClosed):
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		_ = conn.Close()
		<-ended
		<-ended
	})
	var before int64
	return func() int64 {
		now := sent.Load() - answered.Load() // one may be on its way
		n := now - before
		before = now
		return n
	}
}
