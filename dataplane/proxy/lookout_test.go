package proxy

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// The only processor never runs out of work, and yet who waits for a message hears of it.
func TestWhoPassesTheLookoutLetsMessagesIn(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, err := newLookout()
	if err != nil {
		t.Fatal(err)
	}
	from, to := hbonetest.TCPPair(t)
	var heard atomic.Int64
	go func() {
		buf := make([]byte, 1)
		for {
			if _, err := to.Read(buf); err != nil {
				return
			}
			heard.Add(1)
		}
	}()
	time.Sleep(10 * time.Millisecond) // it waits
	for i := range int64(100) {
		if _, err := from.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		// Both may become ready at once, in either order.
		for range 2 {
			l.last.Store(-int64(lookEvery))
			l.pass()
		}
		if n := heard.Load(); n != i+1 {
			t.Fatalf("%d of %d messages were heard", n, i+1)
		}
	}
}

func TestLookoutIsPassedOnceInAWhile(t *testing.T) {
	l, err := newLookout()
	if err != nil {
		t.Fatal(err)
	}
	l.made = time.Now().Add(-time.Hour)
	l.pass()
	first := l.last.Load()
	if first < int64(time.Hour) {
		t.Fatalf("passed %v after it was made an hour ago", time.Duration(first))
	}
	later := first + int64(time.Hour)
	l.last.Store(later)
	if l.pass(); l.last.Load() != later {
		t.Error("passed again at once")
	}
}
