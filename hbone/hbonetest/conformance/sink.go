package conformance

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// sink takes what it has room for, and keeps it.
type sink struct {
	mu   sync.Mutex
	room int
	got  bytes.Buffer
	last bool // what it took was the last
	full chan struct{}
	ends chan error
}

func newSink(room int) *sink {
	return &sink{room: room, full: make(chan struct{}, 16), ends: make(chan error, 4)}
}

func (s *sink) Take(p []byte, last bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last {
		s.got.WriteString("(behind the last bytes)")
	}
	n := min(len(p), s.room)
	s.room -= n
	s.last = last && n == len(p)
	s.got.Write(p[:n])
	return n
}

func (s *sink) Full()         { s.full <- struct{}{} }
func (s *sink) End(err error) { s.ends <- err }

// admit makes room and has st go on.
func (s *sink) admit(st hbone.Stream, n int) bool {
	s.mu.Lock()
	s.room = n
	s.mu.Unlock()
	return st.Resume()
}

func (s *sink) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got.String()
}

func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("not within 10 s: " + what)
		panic("unreachable")
	}
}

func (with Connect) testSinkGetsWhatCameBeforeItAndTheEnd(t *testing.T) {
	client, server, _ := with.both(t)
	hbonetest.Write(t, client, "early ")
	s := newSink(1 << 20)
	server.Deliver(s)
	hbonetest.Write(t, client, "and late")
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := within(t, "the end", s.ends); err != nil || s.text() != "early and late" {
		t.Errorf("got %q and %v", s.text(), err)
	}
}

func (with Connect) testFullSinkGetsTheRestAndTheEndWhenItResumes(t *testing.T) {
	client, server, _ := with.both(t)
	s := newSink(3)
	server.Deliver(s)
	hbonetest.Write(t, client, "abcdef")
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	within(t, "the sink is full", s.full)
	if s.text() != "abc" {
		t.Fatalf("a sink with room for 3 got %q", s.text())
	}
	if s.admit(server, 2) {
		t.Error("Resume says that all was taken")
	}
	select {
	case err := <-s.ends:
		t.Fatalf("the end %v came before the bytes", err)
	case <-time.After(50 * time.Millisecond):
	}
	if !s.admit(server, 10) {
		t.Error("Resume says that something is left")
	}
	if err := within(t, "the end", s.ends); err != nil || s.text() != "abcdef" {
		t.Errorf("got %q and %v", s.text(), err)
	}
}

// Sinks without room hold back their own peers, by their windows, and no other stream, however many
// they are, and in whichever direction.
func (with Connect) testFullSinksHoldUpNobodyElse(t *testing.T) {
	const many = 64
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			streams, done := make(chan hbone.Stream, 1), make(chan struct{})
			p := with(t, hbonetest.Accepting(streams, done))
			t.Cleanup(func() { close(done) })
			pair := func() (from, to hbone.Stream) {
				from, to = p.open(t), <-streams
				if side == "client" {
					from, to = to, from
				}
				return from, to
			}
			var writers sync.WaitGroup
			t.Cleanup(writers.Wait)
			for range many {
				from, to := pair()
				s := newSink(1 << 20) // its window grows before
				to.Deliver(s)
				t.Cleanup(func() { _ = to.Close() })
				writers.Go(func() { _, _ = from.Write(make([]byte, 16<<20)) })
				within(t, "the sink is full", s.full)
			}
			from, to := pair()
			s := newSink(1 << 30)
			to.Deliver(s)
			data := make([]byte, 8<<20)
			for i := range data {
				data[i] = byte(rand.Uint32())
			}
			writers.Go(func() {
				_, _ = from.Write(data)
				_ = from.CloseWrite()
			})
			if err := within(t, "the end", s.ends); err != nil {
				t.Fatal(err)
			}
			if s.text() != string(data) {
				t.Errorf("%d bytes arrived, not what was sent", s.got.Len())
			}
		})
	}
}

func (with Connect) testSinkIsToldOfAResetAndOfALostConnection(t *testing.T) {
	for name, breakIt := range map[string]func(client hbone.Stream, p *Pair){
		"reset":      func(c hbone.Stream, _ *Pair) { _ = c.Close() },
		"connection": func(_ hbone.Stream, p *Pair) { _ = p.Session.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			client, server, p := with.both(t)
			s := newSink(10)
			server.Deliver(s)
			breakIt(client, p)
			if err := within(t, "the end", s.ends); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("the end is %v, want an error that is no clean end", err)
			}
		})
	}
}

// What a sink has not taken is not given back to the peer: a window's worth is the most that
// is ever unread.
func (with Connect) testWindowComesBackOnlyForWhatTheSinkTook(t *testing.T) {
	client, server, _ := with.both(t)
	s := newSink(0)
	server.Deliver(s)
	written := make(chan int, 1)
	go func() {
		n, _ := client.Write(make([]byte, 16<<20))
		written <- n
	}()
	within(t, "the sink is full", s.full)
	select {
	case n := <-written:
		t.Fatalf("%d bytes were written though nobody takes any", n)
	case <-time.After(100 * time.Millisecond):
	}
	for !s.admit(server, 64<<20) {
		t.Error("Resume says that something is left")
	}
	if n := within(t, "all is written", written); n != 16<<20 {
		t.Errorf("%d bytes were written", n)
	}
}
