package netns

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// stock is sockets that were made beforehand. A thread's visit to a namespace takes as long as
// all else that a connection over loopback needs of the kernel before it connects (16 µs), so a
// visit shortly after another brings some more sockets along than it was made for.
type stock struct {
	mu     sync.Mutex
	closed bool
	fds    map[int][]int // by address family
	visit  time.Time     // the last
	timer  *time.Timer   // closes what nobody takes; runs while there is anything
}

const (
	stockSize  = 32
	stockPause = 10 * time.Millisecond // two visits closer than this are followed by more
	stockLife  = time.Second           // without a visit
)

// take returns a socket of the stock, or how many to make.
func (s *stock) take(family int) (fd int, ok bool, missing int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := s.fds[family]; len(left) > 0 {
		s.fds[family] = left[:len(left)-1]
		return left[len(left)-1], true, 0
	}
	last := s.visit
	s.visit = time.Now()
	if s.visit.Sub(last) > stockPause {
		return 0, false, 1
	}
	return 0, false, stockSize
}

// put takes fds over.
func (s *stock) put(family int, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = closeAll(fds) // of sockets that never connected
		return
	}
	if s.fds == nil {
		s.fds = make(map[int][]int)
	}
	s.fds[family] = append(s.fds[family], fds...)
	if s.timer == nil {
		s.timer = time.AfterFunc(stockLife, s.expire)
	}
}

func (s *stock) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := stockLife - time.Since(s.visit); left > 0 && !s.closed {
		s.timer.Reset(left)
		return
	}
	s.timer = nil
	_ = s.clearLocked()
}

func (s *stock) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	return s.clearLocked()
}

func (s *stock) clearLocked() error {
	var errs []error
	for family, fds := range s.fds {
		errs = append(errs, closeAll(fds))
		delete(s.fds, family)
	}
	return errors.Join(errs...)
}

func closeAll(fds []int) error {
	var errs []error
	for _, fd := range fds {
		errs = append(errs, os.NewSyscallError("close", unix.Close(fd)))
	}
	return errors.Join(errs...)
}
