package proxy

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// lot is where sockets wait that have no traffic, or short messages: an epoll set with one
// goroutine for all of them, which runs while there are any. What comes to several of them at the
// same time goes to their tunnel in one piece. Bulk is not here: it has goroutines of its own.
type lot struct {
	mu     sync.Mutex
	set    *epollSet // nil while nobody waits
	places map[uint64]place
	last   uint64
}

// lotOf is where the sockets of tunnel wait, nil of those of none.
func (p *Proxy) lotOf(tunnel *hbone.Conn) *lot {
	port := uint16(0)
	if tunnel != nil {
		port = tunnel.Local.Port() + tunnel.Remote.Port()
	}
	return &p.lots[int(port)%len(p.lots)]
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
		n, failed = nonblock.Wait(set, events)
		return n > 0 || failed != nil
	})
	return n, errors.Join(err, os.NewSyscallError("epoll_wait", failed))
}

// visit is called, on the goroutine of the lot, when one of the events that it waits for, an error
// or a hang-up came to its socket. It must not wait. If it returns a function the socket leaves
// the lot, and the function is called then, unless the socket left in the meantime or was parked again.
type visit func(r *round) (next func())

// round is what the visits of a lot share that come one behind the other.
type round struct {
	events  uint32            // what the present visit is for
	buf     [roundBuffer]byte // for a visit to read into
	streams []hbone.Stream    // to which something was offered
}

// roundBuffer is more than a stream takes at once: who fills it has bulk.
const roundBuffer = 16<<10 + 1

// offered has s pushed at the end.
func (r *round) offered(s hbone.Stream) { r.streams = append(r.streams, s) }

func (r *round) push() {
	for i, s := range r.streams {
		s.Push()
		r.streams[i] = nil
	}
	r.streams = r.streams[:0]
}

// place is a socket that waits.
type place struct {
	fd     int
	events uint32
	visit  visit
	turn   int // how often there was another visit
}

// park has visit called when one of events, an error or a hang-up comes to fd, until it leaves or
// leave is called. The token is never 0.
func (l *lot) park(fd int, events uint32, visit visit) (token uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.set == nil {
		if l.set, err = newEpollSet(); err != nil {
			return 0, fmt.Errorf("wait for sockets: %w", err)
		}
		l.places = make(map[uint64]place)
		go l.watch(l.set)
	}
	l.last++
	if err := l.set.control(unix.EPOLL_CTL_ADD, fd, event(l.last, events)); err != nil {
		l.tidyLocked()
		return 0, fmt.Errorf("wait for a socket: %w", err)
	}
	l.places[l.last] = place{fd: fd, events: events, visit: visit}
	return l.last, nil
}

func event(token uint64, events uint32) *unix.EpollEvent {
	return &unix.EpollEvent{Events: events, Fd: int32(token), Pad: int32(token >> 32)}
}

// again has visit called from now on, for other events, and reports whether the place is there. The
// visit before may be going on.
func (l *lot) again(token uint64, events uint32, visit visit) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.places[token]
	if !ok || p.events != events && l.set.control(unix.EPOLL_CTL_MOD, p.fd, event(token, events)) != nil {
		return false
	}
	p.events, p.visit = events, visit
	p.turn++
	l.places[token] = p
	return true
}

// leave takes a place away. Its visit may be going on.
func (l *lot) leave(token uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leaveLocked(token)
}

// forget is leave for a socket that is closed right behind: so the kernel takes it out of the set.
func (l *lot) forget(token uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.places[token]; ok {
		delete(l.places, token)
		l.tidyLocked()
	}
}

// leaveBehind takes a place away after a visit, and reports whether it was there and no other visit came
// in the meantime.
func (l *lot) leaveBehind(token uint64, turn int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.places[token].turn == turn && l.leaveLocked(token)
}

func (l *lot) leaveLocked(token uint64) bool {
	p, ok := l.places[token]
	if !ok {
		return false
	}
	delete(l.places, token)
	_ = l.set.control(unix.EPOLL_CTL_DEL, p.fd, nil) // it is there: a socket leaves before it is closed
	l.tidyLocked()
	return true
}

// tidyLocked ends the goroutine of a lot that is empty.
func (l *lot) tidyLocked() {
	if len(l.places) == 0 {
		_ = l.set.file.SetReadDeadline(time.Unix(1, 0))
	}
}

func (l *lot) watch(set *epollSet) {
	var events [64]unix.EpollEvent
	r := &round{}
	for {
		n, err := set.wait(events[:])
		for _, e := range events[:n] {
			token := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32
			p, ok := l.at(token)
			if !ok {
				continue
			}
			r.events = e.Events
			if next := p.visit(r); next != nil && l.leaveBehind(token, p.turn) {
				next()
			}
		}
		r.push()
		if err != nil && l.close(set) {
			return
		}
	}
}

// at is a place that was not left.
func (l *lot) at(token uint64) (place, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.places[token]
	return p, ok
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
