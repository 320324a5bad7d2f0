// Package conformance tests a transport of HBONE by what all of them promise: the contracts of
// hbone.Session, hbone.Stream and hbone.Sink.
package conformance

import (
	"context"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
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
		{"WhatIsOfferedArrivesWithItsEnd", with.testWhatIsOfferedArrivesWithItsEnd},
		{"CloseWithoutCleanEndResetsThePeer", with.testCloseWithoutCleanEndResetsThePeer},
		{"CloseUnblocksReadAndWrite", with.testCloseUnblocksReadAndWrite},
		{"RejectAnswersWithStatus", with.testRejectAnswersWithStatus},
		{"UnansweredRequestIsReset", with.testUnansweredRequestIsReset},
		{"OpenContextBoundsOnlyTheOpening", with.testOpenContextBoundsOnlyTheOpening},
		{"OpenGivesUpWithItsContext", with.testOpenGivesUpWithItsContext},
		{"RequestContextEnds", with.testRequestContextEnds},
		{"SinkGetsWhatCameBeforeItAndTheEnd", with.testSinkGetsWhatCameBeforeItAndTheEnd},
		{"FullSinkGetsTheRestAndTheEndWhenItResumes", with.testFullSinkGetsTheRestAndTheEndWhenItResumes},
		{"FullSinksHoldUpNobodyElse", with.testFullSinksHoldUpNobodyElse},
		{"SinkIsToldOfAResetAndOfALostConnection", with.testSinkIsToldOfAResetAndOfALostConnection},
		{"WindowComesBackOnlyForWhatTheSinkTook", with.testWindowComesBackOnlyForWhatTheSinkTook},
	} {
		t.Run(test.name, test.run)
	}
}

func (p *Pair) open(t *testing.T) hbone.Stream {
	t.Helper()
	s, _, err := hbonetest.Open(t.Context(), p.Session, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// both opens a stream and returns its two ends.
func (with Connect) both(t *testing.T) (client, server hbone.Stream, p *Pair) {
	t.Helper()
	streams, done := make(chan hbone.Stream, 1), make(chan struct{})
	p = with(t, hbonetest.Accepting(streams, done))
	client = p.open(t)
	server = <-streams
	t.Cleanup(func() { close(done) })
	return client, server, p
}
