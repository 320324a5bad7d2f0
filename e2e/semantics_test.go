package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Ports that the shop's applications serve.
const (
	portEcho = 7000 + iota
	portGreeting
	portReturn
	portHalf
	portReset
	portResetting
	portHold
	portName
	portClosed
)

// What an application can tell of its sockets is the same as without the mesh.
func TestConnectionsBehaveAsWithoutTheMesh(t *testing.T) {
	eachVariant(t, func(t *testing.T, v variant) {
		s := newShop(t, v.opts, v.args...)
		for _, pod := range []*lab.Pod{s.web, s.near, s.db, s.plain} {
			serve(t, pod, portEcho, echo)
		}
		idle := open(t, s.web, s.db.AddrPort(portEcho)) // is used again after everything else
		for name, test := range map[string]func(*testing.T, *shop){
			"the server speaks first":                 serverFirst,
			"half-close drains the return traffic":    halfClose,
			"the server's half-close":                 serverHalfClose,
			"the client's reset":                      clientReset,
			"the client's reset after its half-close": clientResetAfterEnd,
			"the server's reset":                      serverReset,
			"a closed port":                           closedPort,
			"ports of the data plane":                 ownPorts,
			"addresses":                               addresses,
			"a pod's own address":                     ownAddress,
		} {
			t.Run(name, func(t *testing.T) { test(t, s) })
		}
		if err := idle.use(); err != nil {
			t.Error("a connection that was idle:", err)
		}
	})
}

// dialFrom connects and closes with the test.
func dialFrom(t *testing.T, from *lab.Pod, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := plug(from, to)
	if err != nil {
		t.Fatal("connect:", err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func serverFirst(t *testing.T, s *shop) {
	greeting := nonce()
	serve(t, s.db, portGreeting, func(conn *net.TCPConn) { _, _ = conn.Write(greeting) })
	conn := dialFrom(t, s.web, s.db.AddrPort(portGreeting))
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, greeting) {
		t.Errorf("greeted with %d bytes and %v", len(got), err)
	}
}

// returned is enough to be more than what buffers on the way hold.
const returned = 12 << 20

func halfClose(t *testing.T, s *shop) {
	answer := random(returned)
	serve(t, s.db, portReturn, func(conn *net.TCPConn) {
		if question, err := io.ReadAll(conn); err != nil || len(question) == 0 {
			t.Errorf("the server got %d bytes and %v", len(question), err)
		}
		_, _ = conn.Write(answer)
	})
	conn := dialFrom(t, s.web, s.db.AddrPort(portReturn))
	_, err := conn.Write([]byte("question"))
	if err = errors.Join(err, conn.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, answer) {
		t.Errorf("%d bytes of %d came back, and %v", len(got), len(answer), err)
	}
}

func serverHalfClose(t *testing.T, s *shop) {
	sum := make(chan [sha256.Size]byte, 1)
	serve(t, s.db, portHalf, func(conn *net.TCPConn) {
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
		all, err := io.ReadAll(conn)
		if err != nil {
			t.Error("the server, after its half-close:", err)
		}
		sum <- sha256.Sum256(all)
	})
	conn := dialFrom(t, s.web, s.db.AddrPort(portHalf))
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes and %v, want the server's end", n, err)
	}
	message := random(returned)
	_, err := conn.Write(message)
	if err = errors.Join(err, conn.Close()); err != nil {
		t.Fatal(err)
	}
	if <-sum != sha256.Sum256(message) {
		t.Error("what came after the server's half-close differs")
	}
}

// resetOf waits for the end of conn and wants it to be a reset.
func resetOf(conn *net.TCPConn) error {
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, conn)
	if !isReset(err) {
		return errors.Join(fmt.Errorf("it ended after %d bytes and not with a reset", n), err)
	}
	return nil
}

func resetNow(conn *net.TCPConn) error { return errors.Join(conn.SetLinger(0), conn.Close()) }

func clientReset(t *testing.T, s *shop) {
	ended := make(chan error, 1)
	serve(t, s.db, portReset, func(conn *net.TCPConn) {
		_, err := conn.Write([]byte("ready"))
		ended <- errors.Join(err, resetOf(conn))
	})
	conn := dialFrom(t, s.web, s.db.AddrPort(portReset))
	_, err := io.ReadFull(conn, make([]byte, len("ready")))
	if err = errors.Join(err, resetNow(conn)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error("the server's side:", err)
	}
}

// A reset that follows the client's clean end must reach a server that only writes.
func clientResetAfterEnd(t *testing.T, s *shop) {
	ended := make(chan error, 1)
	serve(t, s.db, portReset, func(conn *net.TCPConn) {
		if _, err := io.ReadAll(conn); err != nil {
			ended <- err
			return
		}
		if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
			ended <- err
			return
		}
		for {
			if _, err := conn.Write(make([]byte, 1024)); err != nil {
				ended <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	conn := dialFrom(t, s.web, s.db.AddrPort(portReset))
	err := conn.CloseWrite()
	_, readErr := io.ReadFull(conn, make([]byte, 1024))
	if err = errors.Join(err, readErr, resetNow(conn)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !isReset(err) {
		t.Errorf("the server's side: %v, want a reset", err)
	}
}

func serverReset(t *testing.T, s *shop) {
	serve(t, s.db, portResetting, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 16))
		if err := resetNow(conn); err != nil {
			t.Error(err)
		}
	})
	conn := dialFrom(t, s.web, s.db.AddrPort(portResetting))
	if _, err := conn.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := resetOf(conn); err != nil {
		t.Error("the client's side:", err)
	}
}

func closedPort(t *testing.T, s *shop) {
	for _, to := range []*lab.Pod{s.db, s.near, s.plain} {
		if err := refused(s.web, to.AddrPort(portClosed)); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
}

func ownPorts(t *testing.T, s *shop) {
	for _, port := range []uint16{15001, 15006, 15008} {
		if err := refused(s.web, s.db.AddrPort(port)); err != nil {
			t.Errorf("port %d: %v", port, err)
		}
	}
}

// addresses: the server sees the client's, the client sees the one that it asked for, in
// every family, on the same node and another, to pods with and without the mesh.
func addresses(t *testing.T, s *shop) {
	tell := func(conn *net.TCPConn) { _, _ = conn.Write([]byte(conn.RemoteAddr().String())) }
	for _, to := range []*lab.Pod{s.db, s.near, s.plain} {
		serve(t, to, portName, tell)
		for i, addr := range to.Addrs {
			targets := []netip.Addr{addr}
			if addr.Is4() {
				targets = append(targets, netip.AddrFrom16(addr.As16()))
			}
			for _, target := range targets {
				if err := checkNames(s.web, netip.AddrPortFrom(target, portName), s.web.Addrs[i]); err != nil {
					t.Errorf("%s as %s: %v", to, target, err)
				}
			}
		}
	}
	// And from a pod without the mesh.
	serve(t, s.web, portName, tell)
	for i, addr := range s.web.Addrs {
		if err := checkNames(s.plain, netip.AddrPortFrom(addr, portName), s.plain.Addrs[i]); err != nil {
			t.Errorf("from %s: %v", s.plain, err)
		}
	}
}

func checkNames(from *lab.Pod, target netip.AddrPort, want netip.Addr) error {
	conn, err := plug(from, target)
	if err != nil {
		return err
	}
	defer conn.Close()
	if peer, err := peerName(conn); err != nil || peer != target {
		return errors.Join(fmt.Errorf("the client's getpeername is %v, want %v", peer, target), err)
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	told, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	seen, err := netip.ParseAddrPort(string(told))
	if err != nil || seen.Addr().Unmap() != want {
		return fmt.Errorf("the server's getpeername is %q, want %v", told, want)
	}
	return nil
}

func ownAddress(t *testing.T, s *shop) {
	if err := ask(t.Context(), s.web, s.web.AddrPort(portEcho), nonce()); err != nil {
		t.Error(err)
	}
}

// A reader that does not read stops its writer: what lies between them is bounded, and none
// of it is lost.
func TestSlowReaderStopsItsWriter(t *testing.T) {
	const (
		connections = 8
		// What one connection may have under way: the sockets' buffers of both applications
		// and of both agents, and the stream's window.
		bound = 48 << 20
		// Agents keep a window and a buffer for each direction, not what was written.
		memory = connections * 16 << 20
	)
	s := newShop(t, lab.Options{})
	var release sync.WaitGroup
	release.Add(1)
	sums := make(chan [sha256.Size]byte, connections)
	serve(t, s.db, portHold, func(conn *net.TCPConn) {
		release.Wait()
		sum := sha256.New()
		if _, err := io.Copy(sum, conn); err != nil {
			t.Error("read what was held back:", err)
		}
		sums <- [sha256.Size]byte(sum.Sum(nil))
	})
	before := s.memory()
	wants := make(map[[sha256.Size]byte]int)
	var writers sync.WaitGroup
	var mu sync.Mutex
	conns := make([]*net.TCPConn, connections)
	for i := range conns {
		conns[i] = dialFrom(t, s.web, s.db.AddrPort(portHold))
		writers.Go(func() {
			sum, written, err := writeUntilBlocked(conns[i], bound)
			t.Logf("connection %d took %d KiB", i, written>>10)
			if err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
			mu.Lock()
			wants[sum]++
			mu.Unlock()
		})
	}
	writers.Wait()
	after := s.memory()
	for i := range after {
		t.Logf("agent of node%d: %d MiB before, %d MiB with %d blocked connections", i+1, before[i]>>20, after[i]>>20, connections)
		if after[i] > before[i]+memory {
			t.Errorf("agent of node%d grew by %d MiB", i+1, (after[i]-before[i])>>20)
		}
	}
	release.Done()
	for _, conn := range conns {
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	for range conns {
		sum := <-sums
		if wants[sum]--; wants[sum] < 0 {
			t.Error("what arrived is not what was written")
		}
	}
}

// memory is what the agents occupy now.
func (s *shop) memory() []uint64 {
	s.t.Helper()
	var all []uint64
	for _, n := range s.Nodes() {
		usage, err := s.Agent(n).Usage()
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, usage.RSS)
	}
	return all
}

// writeUntilBlocked writes until nothing is taken for a while; more than bound is an error.
func writeUntilBlocked(conn *net.TCPConn, bound int) (sum [sha256.Size]byte, written int, err error) {
	digest := sha256.New()
	chunk := random(64 << 10)
	for written <= bound {
		if err := conn.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return sum, written, err
		}
		n, err := conn.Write(chunk)
		written += n
		digest.Write(chunk[:n])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && n == 0:
			return [sha256.Size]byte(digest.Sum(nil)), written, nil
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return sum, written, err
		}
	}
	return sum, written, fmt.Errorf("more than %d bytes were taken that nobody reads", bound)
}
