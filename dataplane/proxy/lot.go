package proxy

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lot is where sockets without traffic wait: an epoll set with one goroutine for all of them,
// which runs while there are any. Busy ones are not here, since package net's own poller wakes
// their goroutines sooner.
type lot struct {
	mu     sync.Mutex
	set    *epollSet // nil while nobody waits
	places map[uint64]func()
	last   uint64
}

// epollSet is an epoll instance as a file that the poller watches in turn.
type epollSet struct {
	file *os.File
	raw  syscall.RawConn
}

func newEpollSet() (*epollSet, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or os.NewFile takes it for one that cannot be polled
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), "epoll")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &epollSet{file: file, raw: raw}, nil
}

// control changes what the set waits for.
func (s *epollSet) control(op, fd int, event *unix.EpollEvent) error {
	var failed error
	err := s.raw.Control(func(set uintptr) { failed = unix.EpollCtl(int(set), op, fd, event) })
	return errors.Join(err, os.NewSyscallError("epoll_ctl", failed))
}

// wait returns what became ready, at least one.
func (s *epollSet) wait(events []unix.EpollEvent) (n int, err error) {
	var failed error
	err = s.raw.Read(func(set uintptr) bool {
		n, failed = unix.EpollWait(int(set), events, 0)
		return n > 0 || failed != nil && !errors.Is(failed, unix.EINTR)
	})
	return max(n, 0), errors.Join(err, os.NewSyscallError("epoll_wait", failed))
}

// park has wake called once when one of events, an error or a hang-up comes to fd, unless
// leave is called first. wake must not wait. The token is never 0.
func (l *lot) park(fd int, events uint32, wake func()) (token uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		if l.set, err = newEpollSet(); err != nil {
			return 0, fmt.Errorf("wait for sockets without traffic: %w", err)
		}
		l.places = make(map[uint64]func())
		go l.watch(l.set)
	}
	l.last++
	event := unix.EpollEvent{Events: events | unix.EPOLLONESHOT, Fd: int32(l.last), Pad: int32(l.last >> 32)}
	if err := l.set.control(unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		l.tidyLocked()
		return 0, fmt.Errorf("wait for a socket without traffic: %w", err)
	}
	l.places[l.last] = wake
	return l.last, nil
}

// leave takes the place of fd away. wake may have been called.
func (l *lot) leave(fd int, token uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		return
	}
	delete(l.places, token)
	_ = l.set.control(unix.EPOLL_CTL_DEL, fd, nil) // it is there, as fd is open
	l.tidyLocked()
}

// tidyLocked ends the goroutine of a lot that is empty.
func (l *lot) tidyLocked() {
	if len(l.places) == 0 {
		_ = l.set.file.SetReadDeadline(time.Unix(1, 0))
	}
}

func (l *lot) watch(set *epollSet) {
	var events [64]unix.EpollEvent
	for {
		n, err := set.wait(events[:])
		for _, wake := range l.ready(events[:n]) {
			wake()
		}
		if err != nil && l.close(set) {
			return
		}
	}
}

// ready gives up the places of events.
func (l *lot) ready(events []unix.EpollEvent) []func() {
	l.mu.Lock()
	defer l.mu.Unlock()
	wakes := make([]func(), 0, len(events))
	for _, e := range events {
		token := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32
		if wake := l.places[token]; wake != nil {
			wakes = append(wakes, wake)
		}
	}
	return wakes
}

// close ends the set unless somebody came meanwhile.
func (l *lot) close(set *epollSet) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.places) > 0 {
		_ = set.file.SetReadDeadline(time.Time{})
		return false
	}
	l.set = nil
	_ = set.file.Close()
	return true
}
