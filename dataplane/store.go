package dataplane

import "sync"

// Store holds the current Snapshot and tells when there is a newer one. The zero Store is
// ready and empty.
type Store struct {
	mu      sync.Mutex
	current *Snapshot
	changed chan struct{}
	before  func(next *Snapshot)
}

// Before has Publish call fn with each snapshot before anybody can load it, for who must take
// back what he concluded from earlier ones. The current one, if any, it gets at once. fn must not
// use the Store; nil ends it.
func (s *Store) Before(fn func(next *Snapshot)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = fn
	if fn != nil && s.current != nil {
		fn(s.current)
	}
}

// Publish makes s the current snapshot.
func (s *Store) Publish(snapshot *Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.before != nil {
		s.before(snapshot)
	}
	s.current = snapshot
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Load returns the current snapshot, nil before the first complete one, and a channel that
// is closed when a newer one has been published.
func (s *Store) Load() (*Snapshot, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.current, s.changed
}
