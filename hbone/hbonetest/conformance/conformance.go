// Package conformance tests a transport of HBONE by what all of them promise: the contracts of
// hbone.Session, hbone.Stream and hbone.Sink.
package conformance

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// Pair is a session and the server that serves it.
type Pair struct {
	Session hbone.Session
	Force   context.CancelFunc // cuts the server
}

// Connect makes a pair whose server serves requests of either protocol with handler, and that
// ends with the test.
type Connect func(t *testing.T, handler hbone.Handler) *Pair

// Test tests what with makes.
func Test(t *testing.T, with Connect) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"RequestAndResponseCarryTheirContent", with.testRequestAndResponseCarryTheirContent},
		{"HalfCloseByClientDrainsReturnTraffic", with.testHalfCloseByClientDrainsReturnTraffic},
		{"HalfCloseByServerLeavesRequestTrafficGoing", with.testHalfCloseByServerLeavesRequestTrafficGoing},
		{"CloseWithoutCleanEndResetsThePeer", with.testCloseWithoutCleanEndResetsThePeer},
		{"CloseUnblocksReadAndWrite", with.testCloseUnblocksReadAndWrite},
		{"RejectAnswersWithStatus", with.testRejectAnswersWithStatus},
		{"UnansweredRequestIsReset", with.testUnansweredRequestIsReset},
		{"OpenContextBoundsOnlyTheOpening", with.testOpenContextBoundsOnlyTheOpening},
		{"OpenGivesUpWithItsContext", with.testOpenGivesUpWithItsContext},
		{"RequestContextEnds", with.testRequestContextEnds},
		{"SinkGetsWhatCameBeforeItAndTheEnd", with.testSinkGetsWhatCameBeforeItAndTheEnd},
		{"FullSinkGetsTheRestAndTheEndWhenItResumes", with.testFullSinkGetsTheRestAndTheEndWhenItResumes},
		{"FullSinkHoldsUpNobodyElse", with.testFullSinkHoldsUpNobodyElse},
		{"SinkIsToldOfAResetAndOfALostConnection", with.testSinkIsToldOfAResetAndOfALostConnection},
		{"WindowComesBackOnlyForWhatTheSinkTook", with.testWindowComesBackOnlyForWhatTheSinkTook},
	} {
		t.Run(test.name, test.run)
	}
}

// Open sends CONNECT and waits for the answer.
func Open(ctx context.Context, s hbone.Session, r *hbone.Request) (hbone.Stream, *hbone.Response, error) {
	o, err := s.Start(r)
	if err != nil {
		return nil, nil, err
	}
	o.Send(nil, false)
	return o.Answer(ctx)
}

func (p *Pair) open(t *testing.T) hbone.Stream {
	t.Helper()
	s, _, err := Open(t.Context(), p.Session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// accepting serves streams by handing them to the test, which returns from done.
func accepting(streams chan<- hbone.Stream, done <-chan struct{}) hbone.Handler {
	return func(r *hbone.ServerRequest) {
		s, err := r.Accept(hbone.Response{})
		if err != nil {
			return
		}
		streams <- s
		<-done
	}
}

// both opens a stream and returns its two ends.
func (with Connect) both(t *testing.T) (client, server hbone.Stream, p *Pair) {
	t.Helper()
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	p = with(t, accepting(streams, done))
	client = p.open(t)
	server = <-streams
	t.Cleanup(func() { close(done) })
	return client, server, p
}

func echo(r *hbone.ServerRequest) {
	s, err := r.Accept(hbone.Response{})
	if err != nil {
		return
	}
	if _, err := io.Copy(struct{ io.Writer }{s}, s); err == nil {
		_ = s.CloseWrite()
	}
	_ = s.Close()
}

func write(t *testing.T, s hbone.Stream, text string) {
	t.Helper()
	if n, err := s.Write([]byte(text)); err != nil || n != len(text) {
		t.Fatalf("Write = %d, %v", n, err)
	}
}

func read(t *testing.T, s hbone.Stream, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func readEOF(t *testing.T, s hbone.Stream) {
	t.Helper()
	if n, err := s.Read(make([]byte, 10)); n != 0 || err != io.EOF { //nolint:errorlint // the contract is io.EOF itself
		t.Fatalf("Read = %d, %v; want EOF", n, err)
	}
}

func waitStreams(t *testing.T, s hbone.Session, n int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); s.Streams() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("session carries %d streams, want %d", s.Streams(), n)
		}
	}
}
