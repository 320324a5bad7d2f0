package proxy

import (
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// ways are the ways through a proxy; each gives a client's connection to an application.
var ways = map[string]func(w *world, serve func(*net.TCPConn)) (client *net.TCPConn, reporting *node){
	"tunnel":  throughTunnel,
	overHTTP3: throughTunnel,
	"passthrough": func(w *world, serve func(*net.TCPConn)) (*net.TCPConn, *node) {
		return w.dial(w.nodes[0], w.web, w.listen(netip.MustParseAddr("127.0.0.1"), serve)), w.nodes[0]
	},
	"inbound plaintext": func(w *world, serve func(*net.TCPConn)) (*net.TCPConn, *node) {
		return w.plain(w.nodes[1], w.db, netip.MustParseAddr("127.0.0.9"), w.listen(w.db.addr, serve)), w.nodes[1]
	},
}

const overHTTP3 = "tunnel over HTTP/3"

func throughTunnel(w *world, serve func(*net.TCPConn)) (*net.TCPConn, *node) {
	return w.dial(w.nodes[0], w.web, w.listen(w.db.addr, serve)), w.nodes[1]
}

func everyWay(t *testing.T, test func(t *testing.T, w *world, open func(serve func(*net.TCPConn)) *net.TCPConn, reporting func() *node)) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			var w *world
			if name == overHTTP3 {
				w = newTransportWorld(t, "h3", false).world
			} else {
				w = newWorld(t)
			}
			var n *node
			test(t, w, func(serve func(*net.TCPConn)) (client *net.TCPConn) {
				client, n = way(w, serve)
				return client
			}, func() *node { return n })
		})
	}
}

func TestHalfCloseDrainsReturnTraffic(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, reporting func() *node) {
		client := open(func(c *net.TCPConn) {
			wantEOF(t, c, "question")
			time.Sleep(20 * time.Millisecond) // the answer comes well after the end of the question
			sendText(t, c, "answer")
		})
		sendText(t, client, "question")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, client, "answer")
		f := reporting().event(t, admin.FlowClose)
		if f.Sent != 8 || f.Received != 6 || f.Flags != "-" {
			t.Errorf("closed with sent %d, received %d, flags %s (%s); want 8, 6 and -", f.Sent, f.Received, f.Flags, f.Cause)
		}
	})
}

func TestHalfCloseByServerLeavesClientTrafficGoing(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, _ func() *node) {
		done := make(chan struct{})
		client := open(func(c *net.TCPConn) {
			defer close(done)
			sendText(t, c, "bye")
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
			wantEOF(t, c, "still here")
		})
		wantEOF(t, client, "bye")
		sendText(t, client, "still ")
		time.Sleep(20 * time.Millisecond)
		sendText(t, client, "here")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		<-done
	})
}

func TestServerMaySpeakFirst(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, _ func() *node) {
		client := open(func(c *net.TCPConn) {
			sendText(t, c, "hello")
			wantEOF(t, c, "")
		})
		receive(t, client, "hello")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, client, "")
	})
}

func TestResetByClientReachesServer(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, reporting func() *node) {
		done := make(chan struct{})
		client := open(func(c *net.TCPConn) {
			defer close(done)
			sendText(t, c, "x")
			wantReset(t, c)
		})
		receive(t, client, "x")
		reset(client)
		<-done
		if f := reporting().event(t, admin.FlowClose); f.Flags != "RESET" {
			t.Errorf("closed with flags %s (%s), want RESET", f.Flags, f.Cause)
		}
	})
}

func TestResetByServerReachesClient(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, _ func() *node) {
		client := open(func(c *net.TCPConn) {
			receive(t, c, "x")
			reset(c)
		})
		sendText(t, client, "x")
		wantReset(t, client)
	})
}

// A connection whose one direction has ended and whose other one is idle has nobody who
// reads or writes, and must still notice.
func TestResetAfterHalfCloseIsNoticedWhileIdle(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, reporting func() *node) {
		asked, gone := make(chan struct{}), make(chan struct{})
		client := open(func(c *net.TCPConn) {
			wantEOF(t, c, "question")
			close(asked)
			<-gone // silent: nothing is written that could tell the proxy
		})
		sendText(t, client, "question")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		<-asked
		n := reporting()
		if live := n.telemetry.Live(); live != 1 {
			t.Errorf("%d connections are live, want 1", live)
		}
		reset(client)
		eventually(t, "nothing is live", func() bool { return n.telemetry.Live() == 0 && w.nodes[0].Live("web") == 0 })
		close(gone)
	})
}

func TestTransfersAreByteExactInRandomChunks(t *testing.T) {
	const flows, size = 50, 1 << 20
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, reporting func() *node) {
		var wg sync.WaitGroup
		for i := range flows {
			client := open(func(c *net.TCPConn) { exchange(t, c, size) })
			wg.Go(func() { exchange(t, client, size-i) })
		}
		wg.Wait()
		for _, node := range w.nodes {
			for _, f := range node.events(admin.FlowFailed) {
				t.Errorf("a connection did not come up: %s", f.Cause)
			}
		}
		n := reporting()
		eventually(t, "every connection is closed", func() bool { return n.telemetry.Live() == 0 })
		closed := n.events(admin.FlowClose)
		if opened := n.events(admin.FlowOpen); len(opened) != len(closed) {
			t.Errorf("%d opened and %d closed", len(opened), len(closed))
		}
		for _, f := range closed {
			if f.Received != size || f.Sent < size-flows || f.Sent > size || f.Flags != "-" {
				t.Errorf("closed with sent %d, received %d, flags %s (%s)", f.Sent, f.Received, f.Flags, f.Cause)
			}
		}
	})
}

// exchange sends size random bytes in random chunks, ends, and reads to the end. Each
// message carries its checksum, which the reader verifies.
func exchange(t *testing.T, c *net.TCPConn, size int) {
	var wg sync.WaitGroup
	wg.Go(func() {
		random := rand.New(rand.NewPCG(rand.Uint64(), 1))
		data := make([]byte, size-sha256.Size)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		sum := sha256.Sum256(data)
		data = append(data, sum[:]...)
		for len(data) > 0 {
			n := min(len(data), 1+random.IntN(128<<10))
			if _, err := c.Write(data[:n]); err != nil {
				t.Error(err)
				return
			}
			data = data[n:]
		}
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(c)
	wg.Wait()
	if err != nil || len(got) < sha256.Size {
		t.Errorf("read %d bytes: %v", len(got), err)
		return
	}
	split := len(got) - sha256.Size
	if sum := sha256.Sum256(got[:split]); string(sum[:]) != string(got[split:]) {
		t.Errorf("%d bytes arrived with another checksum", len(got))
	}
}

func TestSlowReaderHoldsTheSenderBack(t *testing.T) {
	everyWay(t, func(t *testing.T, w *world, open func(func(*net.TCPConn)) *net.TCPConn, reporting func() *node) {
		resume := make(chan struct{})
		var got atomic.Int64
		client := open(func(c *net.TCPConn) {
			<-resume
			n, err := io.Copy(io.Discard, c)
			if err != nil {
				t.Error(err)
			}
			got.Store(n)
		})
		chunk := make([]byte, 256<<10)
		var sent int64
		for {
			if err := client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			n, err := client.Write(chunk)
			sent += int64(n)
			if err != nil {
				break
			}
			// Four socket buffers of at most 6 MiB each and a stream's window of 4 MiB.
			if sent > 64<<20 {
				t.Fatal("64 MiB were taken while nobody read")
			}
		}
		close(resume)
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, client, "")
		if got.Load() != sent {
			t.Errorf("%d bytes arrived of %d", got.Load(), sent)
		}
		w.nodes[0].serving("web")[0].retireTunnels() // QUIC keeps windows as long as its connection
		for _, n := range w.nodes {
			eventually(t, "all buffers are back", func() bool { return n.bulk.used.Load() == 0 })
		}
	})
}

func TestManySlowReadersStayWithinTheBufferBudget(t *testing.T) {
	const budget = 4 * largeBuffer
	w := newWorld(t, func(c *Config) { c.Limits.PodBuffers = budget })
	resume := make(chan struct{})
	app := w.listen(netip.MustParseAddr("127.0.0.1"), func(c *net.TCPConn) {
		<-resume
		echo(c)
	})
	var wg sync.WaitGroup
	for range 12 {
		c := w.dial(w.nodes[0], w.web, app)
		wg.Go(func() {
			if _, err := c.Write(make([]byte, 8<<20)); err != nil {
				t.Error(err)
			}
			_ = c.CloseWrite()
		})
		wg.Go(func() {
			if n, err := io.Copy(io.Discard, c); n != 8<<20 || err != nil {
				t.Errorf("got %d bytes back and %v", n, err)
			}
		})
	}
	pod := w.nodes[0].serving("web")[0]
	eventually(t, "the budget is used", func() bool { return pod.large.used.Load() >= budget-largeBuffer })
	for range 20 {
		if used := pod.large.used.Load(); used > budget+12*largeBuffer { // a reservation is taken back after it failed
			t.Errorf("%d bytes of buffers are in use, the budget is %d", used, budget)
		}
		time.Sleep(time.Millisecond)
	}
	close(resume)
	wg.Wait()
	eventually(t, "all buffers are back", func() bool { return pod.large.used.Load() == 0 })
}

func taken(t *testing.T, c net.Conn) *netns.Conn {
	t.Helper()
	taken, err := netns.Take(c.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	return taken
}

// What the death of the process does to an application's socket is what Close does to it.
func TestUntimelyCloseOfASocketIsAReset(t *testing.T) {
	for name, deliver := range map[string]func(*tcpLeg) error{
		"no end":           nil,
		"an end":           func(l *tcpLeg) error { return l.closeWrite(false) },
		"the last of both": func(l *tcpLeg) error { return l.closeWrite(true) },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			socket := taken(t, c)
			leg, err := newTCPLeg(socket, "the application")
			if err != nil {
				t.Fatal(err)
			}
			if n, err := leg.write([]byte("part"), false); n != 4 || err != nil {
				t.Fatal(n, err)
			}
			receive(t, client, "part")
			if deliver != nil {
				if err := deliver(leg); err != nil {
					t.Fatal(err)
				}
			}
			if err := socket.Close(); err != nil {
				t.Fatal(err)
			}
			if deliver != nil {
				wantEOF(t, client, "")
			} else {
				wantReset(t, client)
			}
		})
	}
}

// told notes what it is told.
type told struct{ deeds []string }

func (l *told) note(deed string, p []byte) (int, error) {
	l.deeds = append(l.deeds, deed+" "+string(p))
	return len(p), nil
}

func deedOf(verb string, last bool) string {
	if last {
		return verb + " last"
	}
	return verb
}

func (l *told) write(p []byte, last bool) (int, error) { return l.note(deedOf("write", last), p) }
func (l *told) offer(p []byte, last bool, _ *round) (int, error) {
	return l.note(deedOf("offer", last), p)
}
func (l *told) closeWrite(bool) error { return nil }
func (l *told) finish()               {}
func (l *told) abort()                {}
func (l *told) offerEnd(bool, *round) bool {
	_, _ = l.note("offerEnd", nil)
	return true
}

// toldRelay carries what is said to from to a leg that notes it.
func toldRelay(t *testing.T) (from *net.TCPConn, src *tcpLeg, dst *told, r *relay) {
	t.Helper()
	limits := Limits{}.withDefaults()
	a, b := hbonetest.TCPPair(t)
	src, err := newTCPLeg(taken(t, b), "the application")
	if err != nil {
		t.Fatal(err)
	}
	dst = &told{}
	r = newRelay(src, dst)
	r.share, r.buffers = newGate(1, time.Hour).share(1), &buffers{pod: &budget{limit: limits.PodBuffers}, node: &budget{limit: limits.NodeBuffers}}
	r.count = [2]func(int){func(int) {}, func(int) {}}
	r.lot = &lot{}
	return a.(*net.TCPConn), src, dst, r
}

func end(t *testing.T, from *net.TCPConn) {
	t.Helper()
	if err := from.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Millisecond) // it is on loopback
}

// A visit of the lot moves a message and the end behind it, and an end alone.
func TestVisitMovesBytesAndTheirEnd(t *testing.T) {
	for said, want := range map[string][]string{"bye": {"offer last bye", "offerEnd "}, "": {"offerEnd "}} {
		from, src, dst, r := toldRelay(t)
		sendText(t, from, said)
		end(t, from)
		round := &round{events: unix.EPOLLIN | unix.EPOLLRDHUP}
		if next := r.visit(0, round); next != nil {
			t.Error("the socket is to leave the lot")
		}
		if next := r.visit(0, round); next == nil {
			t.Error("a socket that has ended is to be visited again")
		}
		if !slices.Equal(dst.deeds, want) || r.ended.Load() != 1 {
			t.Errorf("behind %q and an end came %q, want %q; %d directions have ended", said, dst.deeds, want, r.ended.Load())
		}
		src.abort()
	}
}

// What was reset behind bytes has not ended cleanly, though the kernel tells of it but once.
func TestVisitSeesAResetBehindBytes(t *testing.T) {
	from, _, dst, r := toldRelay(t)
	var failed error
	r.done = func(err error) { failed = err }
	sendText(t, from, "part")
	reset(from)
	time.Sleep(10 * time.Millisecond) // it is on loopback
	round := &round{events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLERR | unix.EPOLLHUP}
	for range 3 {
		if next := r.visit(0, round); next != nil {
			break
		}
	}
	if failed == nil || slices.Contains(dst.deeds, "offerEnd ") {
		t.Errorf("the connection ended with %v, and behind %q", failed, dst.deeds)
	}
}

func TestEndRightBehindBytesGoesAlong(t *testing.T) {
	for _, ends := range []bool{false, true} {
		from, src, dst, r := toldRelay(t)
		sendText(t, from, "bye")
		want, ended := []string{"write bye"}, errAgain
		if ends {
			want, ended = []string{"write last bye"}, io.EOF
			end(t, from)
		}
		turn := r.share.turn()
		turn.acquire()
		moved, more, err := r.chunks(0, src, turn)
		turn.recycle()
		if moved != 3 || more || !errors.Is(err, ended) || !slices.Equal(dst.deeds, want) {
			t.Errorf("moved %d, %v, %v, by %q; want 3, false, %v, by %q", moved, more, err, dst.deeds, ended, want)
		}
		src.abort()
	}
}
