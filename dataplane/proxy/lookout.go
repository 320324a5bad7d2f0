package proxy

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// lookout has Go's scheduler look at the network while bulk keeps all processors busy.
//
// Why: a processor that has goroutines to run does not ask the kernel which sockets are ready. While
// all have, only the runtime does (sysmon), every 10 ms. Who moves bulk is always ready to go on, so
// a message of somebody else would wait for that long at each hop. Therefore it passes here between
// its turns, and waits for an event of its own making: the scheduler hears of it where it hears of
// everything else, and runs whoever is ready.
type lookout struct {
	raw  syscall.RawConn // of an eventfd, which the garbage collector closes
	made time.Time
	mu   sync.Mutex   // held by who passes
	last atomic.Int64 // when somebody did, after made
}

// lookEvery is how long others may go unheard: bulk moves some chunks in that time, and to pass takes
// one or two microseconds.
const lookEvery = 200 * time.Microsecond

func newLookout() (*lookout, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd2", err)
	}
	raw, err := os.NewFile(uintptr(fd), "eventfd").SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("wait for an eventfd: %w", err)
	}
	return &lookout{raw: raw, made: time.Now()}, nil
}

// pass looks, unless somebody has done so lately.
func (l *lookout) pass() {
	now := int64(time.Since(l.made))
	if now-l.last.Load() < int64(lookEvery) || !l.mu.TryLock() {
		return
	}
	defer l.mu.Unlock()
	l.last.Store(now)
	told := false
	_ = l.raw.Read(func(fd uintptr) bool { // it cannot fail: nobody closes it
		if told {
			return true
		}
		told = true
		return !tell(fd)
	})
}

// tell makes an event. The poller hears of each, as it hears of changes: nobody need read them.
func tell(fd uintptr) bool {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, err := nonblock.Write(fd, one[:])
	return err == nil
}
