package hbone_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// record is a TLS record around n bytes.
func record(n int) []byte {
	r := append([]byte{23, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...)
	for i := range n {
		r[5+i] = byte(rand.Uint32())
	}
	return r
}

func TestWireGivesRecordByRecordHoweverTheyArrive(t *testing.T) {
	for name, pair := range map[string]func(testing.TB) (net.Conn, net.Conn){
		"TCP":       hbonetest.TCPPair,
		"in memory": func(testing.TB) (net.Conn, net.Conn) { return net.Pipe() },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			w := hbone.NewWire(a)
			sizes := []int{0, 1, 16 << 10, 17, 16 << 10, 16 << 10, 300, 65535, 5}
			var all []byte
			for _, n := range sizes {
				all = append(all, record(n)...)
			}
			go func(rest []byte) {
				for len(rest) > 0 {
					n := min(len(rest), 1+rand.IntN(40_000))
					_, _ = b.Write(rest[:n])
					rest = rest[n:]
				}
				_ = b.Close()
			}(all)
			buf := make([]byte, 1<<20)
			for _, n := range sizes {
				for left := 5 + n; left > 0; {
					got, err := w.Read(buf)
					if err != nil || got > left {
						t.Fatalf("read %d bytes and %v where %d are left of a record", got, err, left)
					}
					if !bytes.Equal(buf[:got], all[:got]) {
						t.Fatal("other bytes than those that were sent")
					}
					all, left = all[got:], left-got
				}
			}
			if n, err := w.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("at the end read %d bytes and %v, want EOF", n, err)
			}
		})
	}
}

func TestWireThatDoesNotWaitSaysNotYet(t *testing.T) {
	a, b := hbonetest.TCPPair(t)
	w := hbone.NewWire(a)
	w.NoWait(true)
	buf := make([]byte, 100)
	notYet := func(when string) {
		t.Helper()
		if n, err := w.Read(buf); n != 0 || !errors.As(err, new(hbone.NotYet)) {
			t.Fatalf("%s: read %d bytes and %v", when, n, err)
		}
	}
	send := func(p []byte) {
		t.Helper()
		if _, err := b.Write(p); err != nil {
			t.Fatal(err)
		}
		if err := w.Await(); err != nil {
			t.Fatal(err)
		}
	}
	r := record(50)
	notYet("nothing was sent")
	send(r[:3])
	notYet("a part of a header is there")
	send(r[3:30])
	if n, err := w.Read(buf); n != 30 || err != nil {
		t.Fatalf("read %d bytes and %v of a record's first 30", n, err)
	}
	notYet("the rest is missing")
	if w.Buffered() {
		t.Error("a part of a record passes for one")
	}
	send(append(r[30:], record(1)...))
	if n, err := w.Read(buf); n != 25 || err != nil || !w.Buffered() {
		t.Fatalf("read %d bytes and %v of the rest of a record; the next is there: %v", n, err, w.Buffered())
	}
}

func TestWireHoldsWhatIsWrittenUntilItIsFlushed(t *testing.T) {
	a, b := hbonetest.TCPPair(t)
	w := hbone.NewWire(a)
	w.Hold()
	for _, p := range []string{"one ", "two"} {
		if _, err := w.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	_ = b.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := b.Read(make([]byte, 10)); err == nil {
		t.Fatalf("%d bytes were sent before the flush", n)
	}
	if done, err := w.TryFlush(); !done || err != nil {
		t.Fatalf("TryFlush = %v, %v", done, err)
	}
	_ = b.SetReadDeadline(time.Time{})
	got := make([]byte, 7)
	if _, err := io.ReadFull(b, got); err != nil || string(got) != "one two" {
		t.Errorf("got %q, %v", got, err)
	}
}

// A peer that reads nothing makes TryFlush give up and keep the rest, in order.
func TestWireKeepsWhatThePeerDoesNotTake(t *testing.T) {
	a, b := hbonetest.TCPPair(t)
	w := hbone.NewWire(a)
	sent := make([]byte, 0, 64<<20)
	part := record(16 << 10)
	for done := true; done; {
		if len(sent) > 60<<20 {
			t.Fatal("the kernel takes whatever it is given")
		}
		w.Hold()
		if _, err := w.Write(part); err != nil {
			t.Fatal(err)
		}
		sent = append(sent, part...)
		var err error
		if done, err = w.TryFlush(); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(sent))
	read := make(chan error, 1)
	go func() { _, err := io.ReadFull(b, got); read <- err }()
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil || !bytes.Equal(got, sent) {
		t.Errorf("what arrived is not what was written, or %v", err)
	}
}

// Peers that send a part of a record and wait cost what they sent, beyond a few of them.
func TestManyWiresThatWaitHoldWhatIsThere(t *testing.T) {
	const wires, most = 300, 16 << 20 // with a whole buffer each they would hold 40 MB
	before := heapInUse()
	type half struct {
		peer   net.Conn
		record []byte
		got    chan []byte
	}
	var halves []half
	for range wires {
		a, b := hbonetest.TCPPair(t)
		h := half{peer: b, record: record(1000), got: make(chan []byte, 1)}
		halves = append(halves, h)
		if _, err := b.Write(h.record[:500]); err != nil {
			t.Fatal(err)
		}
		go func() {
			got := make([]byte, len(h.record))
			w := hbone.NewWire(a)
			for !w.Buffered() {
				if err := w.Await(); err != nil {
					break
				}
			}
			n, err := io.ReadFull(w, got)
			if err != nil {
				t.Error(err)
			}
			h.got <- got[:n]
		}()
	}
	held := uint64(0)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		held = heapInUse() - before
		if held > 64*(128<<10) && held < most { // all are there
			break
		}
	}
	if held <= 64*(128<<10) || held >= most {
		t.Errorf("%d wires that wait hold %d bytes", wires, held)
	}
	for _, h := range halves {
		if _, err := h.peer.Write(h.record[500:]); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range halves {
		if got := <-h.got; !bytes.Equal(got, h.record) {
			t.Fatalf("got %d other bytes than those that were sent", len(got))
		}
	}
}

// heapInUse is without what pools keep.
func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// Peers that do not read cost what is to be sent to them, beyond a few of them.
func TestManyWiresWhosePeersDoNotReadHoldWhatIsLeft(t *testing.T) {
	const wires, most = 300, 20 << 20 // with a whole buffer each they would hold 43 MB
	before := heapInUse()
	var stuck []*hbone.Wire
	for range wires {
		a, _ := hbonetest.TCPPair(t)
		if err := a.(*net.TCPConn).SetWriteBuffer(4 << 10); err != nil {
			t.Fatal(err)
		}
		w := hbone.NewWire(a)
		for done := true; done; {
			w.Hold()
			if _, err := w.Write(record(16 << 10)); err != nil {
				t.Fatal(err)
			}
			var err error
			if done, err = w.TryFlush(); err != nil {
				t.Fatal(err)
			}
		}
		stuck = append(stuck, w)
	}
	if held := heapInUse() - before; held >= most {
		t.Errorf("%d wires whose peers do not read hold %d bytes", wires, held)
	}
	for _, w := range stuck {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if err := w.Flush(); err == nil {
			t.Error("what was left went to a connection that is closed")
		}
	}
	if n := hbone.Holding(); n != 0 {
		t.Errorf("%d wires count as waiting in the end", n)
	}
}
