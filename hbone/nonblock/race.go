//go:build race

package nonblock

import (
	"errors"

	"golang.org/x/sys/unix"
)

// The race detector takes what one goroutine writes to a socket and another reads for order
// between them, and learns of it from package syscall alone.

func read(fd uintptr, p []byte) (uintptr, unix.Errno) { return told(unix.Read(int(fd), p)) }

func write(fd uintptr, p []byte) (uintptr, unix.Errno) { return told(unix.Write(int(fd), p)) }

func writeMore(fd uintptr, p []byte) (uintptr, unix.Errno) {
	return told(unix.SendmsgN(int(fd), p, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL))
}

func told(n int, err error) (uintptr, unix.Errno) {
	var errno unix.Errno
	errors.As(err, &errno) // it is no other
	return uintptr(max(n, 0)), errno
}
