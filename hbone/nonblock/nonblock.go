// Package nonblock makes, reads, writes, polls and closes sockets that are in non-blocking mode, as
// those of package net are, and polls sets of them, behind Go's scheduler's back.
//
// A system call of package syscall tells the scheduler that it may take long. That costs little,
// but in a process that is idle between two messages it also wakes the thread that looks after
// long calls (runtime.sysmon), which sleeps again at once: a futex call, a switch of threads and
// a competitor for the CPU with each message. A call that cannot block needs no looking after.
// Nothing else can run on its CPU until it returns, so what may take long by its size goes the
// usual way.
package nonblock

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// short is the most that is written unknown to the scheduler: to send it takes some tens of
// microseconds, in which the kernel may do the receiver's work as well.
const short = 16 << 10

// Read is read(2): 0 at the end of the stream, EAGAIN when there is nothing.
func Read(fd uintptr, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return again(func() (uintptr, unix.Errno) { return read(fd, p) })
}

// Write is write(2): it may take a part of p, and returns EAGAIN when it takes nothing.
func Write(fd uintptr, p []byte) (int, error) {
	switch {
	case len(p) == 0:
		return 0, nil
	case len(p) > short:
		for {
			if n, err := unix.Write(int(fd), p); err != unix.EINTR {
				return max(n, 0), err
			}
		}
	}
	return again(func() (uintptr, unix.Errno) { return write(fd, p) })
}

// WriteMore is Write of what more comes right behind, or the end: the kernel may keep it back for that,
// 200 ms at most (MSG_MORE in send(2)).
func WriteMore(fd uintptr, p []byte) (int, error) {
	if len(p) == 0 || len(p) > short {
		return Write(fd, p)
	}
	return again(func() (uintptr, unix.Errno) { return writeMore(fd, p) })
}

// Ready reports whether one of events (poll(2)), an error or a hang-up is there; also when the
// kernel does not tell.
func Ready(fd uintptr, events int16) bool {
	set := unix.PollFd{Fd: int32(fd), Events: events}
	var now unix.Timespec
	n, err := again(func() (uintptr, unix.Errno) {
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&set)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
		return n, errno
	})
	return n > 0 || err != nil
}

// Wait is epoll_pwait(2) without waiting: 0 when nothing is ready.
func Wait(set uintptr, events []unix.EpollEvent) (int, error) {
	return again(func() (uintptr, unix.Errno) {
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, set, uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
		return n, errno
	})
}

// errAgain is made once: it is the answer to every second call.
var errAgain error = unix.EAGAIN

func again(call func() (uintptr, unix.Errno)) (int, error) {
	for {
		switch n, errno := call(); errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, errAgain
		default:
			return 0, errno
		}
	}
}
