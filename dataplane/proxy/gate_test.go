package proxy

import (
	"testing"
	"testing/synctest"
	"time"
)

// The turns are new: the channel of one that was made outside of a synctest's bubble is not known in
// it.
func TestGateBoundsEachPodAndTheNode(t *testing.T) {
	g := newGate(3, time.Second)
	one, two := g.share(2), g.share(2)
	var held []*turn
	for range 2 {
		held = append(held, newTurn(one))
		held[len(held)-1].acquire()
	}
	synctest.Test(t, func(t *testing.T) {
		g := newGate(3, time.Hour)
		one, two := g.share(2), g.share(2)
		granted := make(chan string, 10)
		release := make(chan struct{})
		take := func(name string, s *share) {
			go func() {
				turn := newTurn(s)
				turn.acquire()
				granted <- name
				<-release
				turn.release()
			}()
			synctest.Wait()
		}
		for range 4 {
			take("one", one)
		}
		if len(granted) != 2 {
			t.Errorf("one pod got %d turns, its bound is 2", len(granted))
		}
		take("two", two)
		take("two", two)
		if len(granted) != 3 {
			t.Errorf("%d turns are taken, the node's bound is 3", len(granted))
		}
		close(release)
		synctest.Wait()
		if len(granted) != 6 || g.active != 0 || g.waiting != 0 {
			t.Errorf("%d were granted, %d are active, %d wait", len(granted), g.active, g.waiting)
		}
	})
	for _, turn := range held {
		turn.release()
		turn.release() // changes nothing
	}
	if g.active != 0 || one.active != 0 || two.active != 0 {
		t.Errorf("active %d, %d, %d after all were released", g.active, one.active, two.active)
	}
}

func TestGateTakesPodsInTurnHoweverManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, time.Hour)
		blocker := newTurn(g.share(1))
		blocker.acquire()
		var order []string
		wait := func(name string, s *share) {
			go func() {
				turn := newTurn(s)
				turn.acquire()
				order = append(order, name)
				turn.release()
			}()
			synctest.Wait()
		}
		bulk, quiet := g.share(1), g.share(1)
		for range 100 {
			wait("bulk", bulk)
		}
		wait("quiet", quiet)
		blocker.release()
		synctest.Wait()
		if len(order) != 101 || order[1] != "quiet" {
			t.Errorf("%d ran; the quiet pod was not second", len(order))
		}
	})
}

func TestTurnOfABlockedHolderPassesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, time.Millisecond)
		s := g.share(1)
		blocked, next := newTurn(s), newTurn(s)
		blocked.acquire()
		start := time.Now()
		next.acquire()
		if waited := time.Since(start); waited != time.Millisecond {
			t.Errorf("waited %v for a blocked holder, want the lease", waited)
		}
		blocked.release() // it lost the turn: the new holder keeps it
		if g.active != 1 || s.active != 1 {
			t.Errorf("%d active, %d of the pod; want 1", g.active, s.active)
		}
		next.release()
		if g.active != 0 {
			t.Errorf("%d active after all were released", g.active)
		}
	})
}

func TestTurnIsKeptWhileNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, time.Millisecond)
		turn := newTurn(g.share(1))
		turn.acquire()
		time.Sleep(time.Hour)
		if g.active != 1 {
			t.Error("the turn was taken although nobody waits")
		}
		turn.release()
	})
}
