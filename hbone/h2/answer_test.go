package h2_test

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// tallied counts what is written to it.
type tallied struct {
	net.Conn
	writes atomic.Int64
}

func (c *tallied) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// To a peer whose first bytes are there go the answer, the application's first bytes and its end in one piece.
func TestAnswerGoesWithTheFirstBytes(t *testing.T) {
	heard, took := make(chan struct{}), make(chan int64)
	a, b := hbonetest.TCPPair(t)
	wire := &tallied{Conn: b}
	p := newPairOn(t, a, wire, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		time.Sleep(10 * time.Millisecond) // the first bytes are behind the request
		before := wire.writes.Load()
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			t.Error(err)
			return
		}
		if !s.Offer([]byte("answer")) {
			t.Error("a short answer is not taken")
		}
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
		<-heard // it may be another goroutine that writes
		took <- wire.writes.Load() - before
		hbonetest.Read(t, s, "question")
		hbonetest.ReadEOF(t, s)
	})
	// On a machine that has much else to do it may wait for too long.
	for attempts := 1; ; attempts++ {
		s := ask(t, p.session, "question")
		hbonetest.Read(t, s, "answer")
		hbonetest.ReadEOF(t, s)
		heard <- struct{}{}
		n := <-took
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			return
		}
		if attempts == 100 {
			t.Fatalf("%d writes each time", n)
		}
	}
}

func TestServerKnowsWhetherFirstBytesAreThere(t *testing.T) {
	begun := make(chan bool)
	p := newPair(t, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		begun <- r.Begun()
		for deadline := time.Now().Add(10 * time.Second); !r.Begun() && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		begun <- r.Begun()
	})
	o, err := p.session.Start(&hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	o.Send(nil, false)
	if <-begun {
		t.Error("first bytes are there, but none were sent")
	}
	o.Send([]byte("question"), false)
	if !<-begun {
		t.Error("first bytes were sent, but none are there")
	}
	if _, _, err := o.Answer(t.Context()); err == nil { // the handler gives none
		t.Error("the request was accepted")
	}
}

func TestAnswerDoesNotWaitForAnApplicationThatIsSilent(t *testing.T) {
	streams, done := make(chan hbone.Stream, 3), make(chan struct{})
	p := newPair(t, h2.Client{}, h2.Server{}, hbonetest.Accepting(streams, done))
	defer close(done)
	for range cap(streams) {
		s := ask(t, p.session, "question") // returns when the answer is there
		theirs := <-streams
		hbonetest.Read(t, theirs, "question")
		hbonetest.Write(t, theirs, "late")
		hbonetest.Read(t, s, "late")
	}
}

// The end that ends a stream goes in one piece with the request of the next one, and arrives where there is none.
func TestLastEndGoesWithTheNextRequest(t *testing.T) {
	ended := make(chan struct{})
	a, b := hbonetest.TCPPair(t)
	wire := &tallied{Conn: a}
	p := newPairOn(t, wire, b, h2.Client{}, h2.Server{}, func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			t.Error(err)
			return
		}
		hbonetest.Read(t, s, "question")
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
		hbonetest.ReadEOF(t, s)
		ended <- struct{}{}
	})
	last := ask(t, p.session, "question")
	// On a machine that has much else to do it may wait for too long.
	for attempts := 1; ; attempts++ {
		hbonetest.ReadEOF(t, last)
		before := wire.writes.Load()
		if err := last.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		last = ask(t, p.session, "question")
		<-ended
		n := wire.writes.Load() - before
		if n == 1 {
			break
		}
		if attempts == 100 {
			t.Fatalf("%d writes each time", n)
		}
	}
	hbonetest.ReadEOF(t, last)
	if err := last.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	<-ended
}

// ask opens a stream whose first bytes go along with the request.
func ask(t *testing.T, session hbone.Session, question string) hbone.Stream {
	t.Helper()
	if !session.Reserve() {
		t.Fatal("no room for a stream")
	}
	o, err := session.Start(&hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	if n := o.Send([]byte(question), false); n != len(question) {
		t.Fatalf("%d of %d first bytes were sent", n, len(question))
	}
	s, _, err := o.Answer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}
