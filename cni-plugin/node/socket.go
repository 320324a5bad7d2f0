package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// maxSocketPath is the longest path that a unix socket address takes
// (sizeof(sun_path) less its NUL byte, unix(7)).
const maxSocketPath = 107

// suffixLength is what the name of a socket grows by until it is in place.
const suffixLength = len(".") + 8

// listener is the agent's unix socket. Closing it removes the file, unless another agent's
// socket has taken its place.
type listener struct {
	*net.UnixListener
	path string
	file os.FileInfo
	once sync.Once
	err  error
}

// listen takes path over from whoever has it: during an upgrade two agents run, and at no
// moment may a plugin find nobody. The other keeps its open connections.
func listen(path string) (*listener, error) {
	if most := maxSocketPath - suffixLength; len(path) > most {
		return nil, fmt.Errorf("listen on %s: the path of this socket has at most %d bytes, this one has %d: choose a shorter one", path, most, len(path))
	}
	if err := makeDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("listen on %s: there is a file of that name that is not a socket: remove it or choose another path", path)
	}
	made := path + "." + strings.ToLower(rand.Text()[:suffixLength-1])
	ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ul.SetUnlinkOnClose(false) // it would remove the name that it was made with
	l := &listener{UnixListener: ul, path: path}
	if err := l.place(made); err != nil {
		return nil, errors.Join(err, os.Remove(made), ul.Close())
	}
	return l, nil
}

func (l *listener) place(made string) (err error) {
	// Between bind and chmod the umask decides who can connect; the check of the peer's
	// credentials does not.
	if err := os.Chmod(made, 0o600); err != nil {
		return fmt.Errorf("restrict %s to its owner: %w", l.path, err)
	}
	if l.file, err = os.Lstat(made); err != nil {
		return fmt.Errorf("look at the new socket: %w", err)
	}
	return withDirLock(filepath.Dir(l.path), func() error {
		if err := os.Rename(made, l.path); err != nil {
			return fmt.Errorf("put the new socket into place: %w", err)
		}
		return nil
	})
}

// makeDir creates dir for root alone; a directory that exists keeps its mode.
func makeDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("create the socket's directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create the socket's directory: %w", err)
	}
	return nil
}

// withDirLock keeps an agent that goes from removing the new socket of its successor.
func withDirLock(dir string, fn func() error) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open the socket's directory: %w", err)
	}
	defer func() { err = errors.Join(err, d.Close()) }() // closing releases the lock
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("lock %s: %w", dir, err)
		}
	}
}

// Close may be called again.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.err = errors.Join(withDirLock(filepath.Dir(l.path), l.removeOwn), l.UnixListener.Close())
	})
	return l.err
}

func (l *listener) removeOwn() error {
	now, err := os.Lstat(l.path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && !os.SameFile(now, l.file)) {
		return nil
	}
	return errors.Join(err, os.Remove(l.path))
}
