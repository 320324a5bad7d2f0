package dataplane

import (
	"sync"
	"testing"
)

func TestStoreIsEmptyAtFirst(t *testing.T) {
	var s Store
	snapshot, changed := s.Load()
	if snapshot != nil {
		t.Errorf("snapshot = %v, want none", snapshot)
	}
	select {
	case <-changed:
		t.Error("changed before anything was published")
	default:
	}
}

func TestStoreTellsOfEachPublication(t *testing.T) {
	var s Store
	for range 3 {
		_, changed := s.Load()
		_, again := s.Load()
		next := NewSnapshot(Contents{})
		s.Publish(next)
		<-changed
		<-again
		got, later := s.Load()
		if got != next {
			t.Error("Load did not return what was published")
		}
		select {
		case <-later:
			t.Error("the channel of the current snapshot is closed")
		default:
		}
	}
}

// A reader that loads, uses the snapshot and waits never misses the last one.
func TestStoreReadersReachTheLastSnapshot(t *testing.T) {
	var s Store
	last := NewSnapshot(Contents{})
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for {
				snapshot, changed := s.Load()
				if snapshot == last {
					return
				}
				<-changed
			}
		})
	}
	for range 100 {
		s.Publish(NewSnapshot(Contents{}))
	}
	s.Publish(last)
	readers.Wait()
}

func TestBeforeComesBeforeAnybodyCanLoad(t *testing.T) {
	var s Store
	first, second := NewSnapshot(Contents{}), NewSnapshot(Contents{})
	s.Publish(first)
	var seen []*Snapshot
	_, changed := s.Load()
	s.Before(func(next *Snapshot) {
		seen = append(seen, next)
		select {
		case <-changed:
			t.Error("others were told first")
		default:
		}
	})
	s.Publish(second)
	s.Before(nil)
	s.Publish(first)
	if len(seen) != 2 || seen[0] != first || seen[1] != second {
		t.Errorf("called with %v, want the current one and the next", seen)
	}
}
