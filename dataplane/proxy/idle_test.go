package proxy

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// parked is how many sockets wait in the lots of both nodes.
func (w *world) parked() (n int) {
	for _, node := range w.nodes {
		for i := range node.lots {
			node.lots[i].mu.Lock()
			n += len(node.lots[i].places)
			node.lots[i].mu.Unlock()
		}
	}
	return n
}

func TestIdleConnectionsOwnNoGoroutine(t *testing.T) {
	const connections = 50
	w := newWorld(t)
	app := w.listen(w.db.addr, echo)
	warm := w.dial(w.nodes[0], w.web, app)
	sendText(t, warm, "x")
	receive(t, warm, "x")
	conns := make([]*net.TCPConn, connections)
	before := runtime.NumGoroutine()
	for i := range conns {
		conns[i] = w.dial(w.nodes[0], w.web, app)
		sendText(t, conns[i], "x")
		receive(t, conns[i], "x")
	}
	eventually(t, "all sockets are parked, of both ends", func() bool { return w.parked() == 2*(connections+1) })
	// Each connection's echo is one; allow a few that come and go.
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before+connections+5 })
	for range 2 {
		for _, c := range conns {
			sendText(t, c, "again")
			receive(t, c, "again")
		}
	}
	for _, c := range conns[1:] {
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, c, "")
	}
	reset(conns[0])
	_ = warm.Close()
	eventually(t, "nothing is parked or live", func() bool { return w.parked() == 0 && w.nodes[0].Live("web") == 0 && w.nodes[1].Live("db") == 0 })
	for _, node := range w.nodes {
		for i := range node.lots {
			lot := &node.lots[i]
			eventually(t, "the lot has closed its epoll set", func() bool {
				lot.mu.Lock()
				defer lot.mu.Unlock()
				return lot.set == nil
			})
		}
	}
}

// Whoever speaks, ends or resets first after an idle time, the other side gets to know.
func TestIdleConnectionsNotice(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, _ func() *node) {
		acts := map[string]func(server, client *net.TCPConn){
			"client speaks": func(server, client *net.TCPConn) { sendText(t, client, "hi"); receive(t, server, "hi") },
			"server speaks": func(server, client *net.TCPConn) { sendText(t, server, "hi"); receive(t, client, "hi") },
			"client ends": func(server, client *net.TCPConn) {
				_ = client.CloseWrite()
				wantEOF(t, server, "")
				sendText(t, server, "bye")
				receive(t, client, "bye")
			},
			"client resets": func(server, client *net.TCPConn) { reset(client); wantReset(t, server) },
			"server resets": func(server, client *net.TCPConn) { reset(server); wantReset(t, client) },
		}
		done := make(chan struct{})
		defer close(done)
		conns := make(map[string][2]*net.TCPConn, len(acts))
		for name := range acts {
			accepted := make(chan *net.TCPConn)
			client := open(func(c *net.TCPConn) {
				accepted <- c
				<-done
			})
			sendText(t, client, "x")
			server := <-accepted
			receive(t, server, "x")
			conns[name] = [2]*net.TCPConn{server, client}
		}
		eventually(t, "all are parked", func() bool { return w.parked() >= 2*len(acts) })
		for name, act := range acts {
			t.Log(name)
			act(conns[name][0], conns[name][1])
		}
	})
}

func TestParkedConnectionsAreCutAtTheForcedEnd(t *testing.T) {
	w := newWorld(t)
	app := w.listen(w.web.addr, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	third := newFakePod(t, "third", w.db.addr.Next().String())
	w.publish(func(c *dataplane.Contents) {
		workload := third.workload("node1")
		workload.ServiceAccount = "web"
		c.Workloads = append(c.Workloads, workload)
		c.Captured["third"] = true
	})
	drain, cut, ended := w.serve(w.nodes[0], third)
	client := w.dial(w.nodes[0], third, app)
	sendText(t, client, "x")
	eventually(t, "its sockets are parked", func() bool { return w.parked() == 2 })
	drain()
	select {
	case <-ended:
		t.Fatal("the pod is not served any more, though a connection lives")
	case <-time.After(100 * time.Millisecond):
	}
	cut()
	wantReset(t, client)
	<-ended
}

// A reset from one goroutine meets another that parks the socket: closing a socket waits for those
// that use it.
func TestResetMeetsParking(t *testing.T) {
	for range 200 {
		a, b := hbonetest.TCPPair(t)
		leg, err := newTCPLeg(taken(t, a), "the application")
		if err != nil {
			t.Fatal(err)
		}
		parking, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			var l lot
			for i := 0; ; i++ {
				leg.parkOrLook(&l, unix.EPOLLIN, func(*round) func() { return nil })
				leg.unpark()
				if i == 10 {
					close(parking)
				}
				leg.mu.Lock()
				released := leg.released
				leg.mu.Unlock()
				if released && i > 10 {
					return
				}
			}
		}()
		<-parking
		go leg.abort()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("both wait for each other")
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the other end sees %v, want a reset", err)
		}
	}
}

// Short messages are the lot's, and much at a time is a pump's: a connection goes from one to the
// other with what its application says, and loses nothing on the way.
func TestMessagesOfEverySizeOnParkedConnections(t *testing.T) {
	const connections, rounds = 8, 40
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, _ func() *node) {
		conns := make([]*net.TCPConn, connections)
		for i := range conns {
			conns[i] = open(echo)
		}
		var talks sync.WaitGroup
		for i, c := range conns {
			talks.Go(func() {
				random := rand.New(rand.NewPCG(uint64(i), 1))
				for range rounds {
					size := 1 + random.IntN(roundBuffer>>random.IntN(10))
					if random.IntN(4) == 0 {
						size = roundBuffer - 1 + random.IntN(200<<10)
					}
					message := make([]byte, size)
					for j := range message {
						message[j] = byte(random.Uint32())
					}
					sent := make(chan error, 1)
					go func() {
						_, err := c.Write(message)
						sent <- err
					}()
					got := make([]byte, size)
					_, err := io.ReadFull(c, got)
					if err = errors.Join(err, <-sent); err != nil || !bytes.Equal(got, message) {
						t.Errorf("of %d bytes others came back, or not all: %v", size, err)
						return
					}
				}
			})
		}
		talks.Wait()
		for i, c := range conns {
			if i%2 == 0 {
				reset(c)
				continue
			}
			_ = c.CloseWrite()
			wantEOF(t, c, "")
		}
		eventually(t, "nothing is parked", func() bool { return w.parked() == 0 })
	})
}

// A connection with short messages is parked long before it is idle.
func TestShortMessagesAreTheLots(t *testing.T) {
	w := newWorld(t)
	client := w.dial(w.nodes[0], w.web, w.listen(w.db.addr, echo))
	for range 2 * calmAfter {
		sendText(t, client, "short")
		receive(t, client, "short")
	}
	before := runtime.NumGoroutine()
	if n := w.parked(); n != 2 {
		t.Fatalf("%d sockets are parked behind short messages, want those of both ends", n)
	}
	for range 100 {
		sendText(t, client, "short")
		receive(t, client, "short")
		if n := w.parked(); n != 2 {
			t.Fatalf("%d sockets are parked between short messages, want both", n)
		}
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines more than before", n-before)
	}
}
