package certs

import "sync"

// latest holds a value and tells when there is a newer one.
type latest[T any] struct {
	mu      sync.Mutex
	value   T
	changed chan struct{}
}

func (l *latest[T]) set(v T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.value = v
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// load returns the value and a channel that is closed when a newer one was set.
func (l *latest[T]) load() (T, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.value, l.changed
}
