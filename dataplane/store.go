package dataplane

import "sync"

// Store holds the current Snapshot and tells when there is a newer one. The zero Store is
// ready and empty.
type Store struct {
	mu      sync.Mutex
	current *Snapshot
	changed chan struct{}
}

// Publish makes s the current snapshot.
func (s *Store) Publish(snapshot *Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
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
