package h2_test

import (
	"bytes"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// offer expects p to be taken, when there is room at the latest.
func offer(t *testing.T, s hbone.Stream, p []byte) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !s.Offer(p); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are not taken", len(p))
		}
	}
}

func TestWhatIsOfferedKeepsItsPlace(t *testing.T) {
	c, s, _ := both(t)
	offer(t, c, []byte("one "))
	offer(t, c, []byte("two "))
	hbonetest.Write(t, c, "three ")
	offer(t, c, []byte("four"))
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "one two three four" {
		t.Errorf("read %q, %v", got, err)
	}
	if c.Offer([]byte("five")) {
		t.Error("bytes are taken behind the end")
	}
}

func TestEndIsOfferedBehindBytes(t *testing.T) {
	c, s, _ := both(t)
	offer(t, c, []byte("last"))
	if !c.OfferEnd() {
		t.Fatal("the end is not taken")
	}
	if c.Offer([]byte("late")) {
		t.Error("bytes are taken behind the end")
	}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		hbonetest.Read(t, s, "last")
		hbonetest.ReadEOF(t, s)
	}()
	c.Push()
	<-heard
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	hbonetest.ReadEOF(t, c)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if c.OfferEnd() {
		t.Error("a closed stream takes an end")
	}
}

// lasts is a sink that notes what it is told of the last bytes.
type lasts struct {
	said []bool
	ends chan error
}

func (l *lasts) Take(p []byte, last bool) int {
	l.said = append(l.said, last)
	return len(p)
}
func (l *lasts) Full()         {}
func (l *lasts) End(err error) { l.ends <- err }

// A sink hears that bytes are the last when the end is there with them, whether they waited for it or not.
func TestSinkIsToldOfTheLastBytes(t *testing.T) {
	for name, early := range map[string]bool{"they come to it": false, "they wait for it": true} {
		t.Run(name, func(t *testing.T) {
			c, s, p := both(t)
			l := &lasts{ends: make(chan error, 1)}
			if !early {
				s.Deliver(l)
			}
			hbonetest.Write(t, c, "first ")
			offer(t, c, []byte("last"))
			if !c.OfferEnd() {
				t.Fatal("the end is not taken")
			}
			c.Push()
			if early {
				p.open(t) // the server answers it behind all that
				s.Deliver(l)
			}
			if err := <-l.ends; err != nil {
				t.Fatal(err)
			}
			if end := len(l.said) - 1; slices.Index(l.said, true) != end {
				t.Errorf("told %v, want it of the last bytes alone", l.said)
			}
		})
	}
}

func TestPushSendsWhatManyOffered(t *testing.T) {
	const n = 20
	streams, done := make(chan hbone.Stream, n), make(chan struct{})
	defer close(done)
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	var ours, theirs []hbone.Stream
	for range n {
		ours = append(ours, p.open(t))
		theirs = append(theirs, <-streams)
	}
	for i, s := range ours {
		offer(t, s, bytes.Repeat([]byte{byte(i)}, 1000))
	}
	ours[0].Push()
	for i, s := range theirs {
		got := make([]byte, 1000)
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, 1000)) {
			t.Errorf("stream %d: other bytes, or %v", i, err)
		}
	}
}

// Nobody pushes and nobody reads: what is held is bounded, by the stream's window and by what a
// connection holds for all of its streams.
func TestOfferTakesNoMoreThanThereIsRoomFor(t *testing.T) {
	const held, window, size = 96 << 10, 64 << 10, 1000
	streams, done := make(chan hbone.Stream, 2), make(chan struct{})
	defer close(done)
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	first, second := p.open(t), p.open(t)
	fill := func(s hbone.Stream) (taken int) {
		for s.Offer(make([]byte, size)) {
			taken += size
		}
		return taken
	}
	a, b := fill(first), fill(second)
	if a > window || a+b > held || a < window/2 || a+b < held/2 {
		t.Errorf("%d and %d bytes were taken, want the window of %d of each, and of both %d", a, b, window, held)
	}
	if first.Offer(make([]byte, 20<<10)) {
		t.Error("more than a frame is taken")
	}
	for _, want := range []int{a, b} {
		first.Push()
		if _, err := io.ReadFull(<-streams, make([]byte, want)); err != nil {
			t.Fatal(err)
		}
	}
	offer(t, first, make([]byte, size)) // what was read makes room
	offer(t, second, make([]byte, size))
}
