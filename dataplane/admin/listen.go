package admin

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// maxSocketPath is the longest path that a unix socket address takes
// (sizeof(sun_path) less its NUL byte, unix(7)).
const maxSocketPath = 107

// listener is the agent's unix socket. Closing it removes the file, unless another
// agent's socket has taken its place.
type listener struct {
	*net.UnixListener
	path string
	file os.FileInfo
	once sync.Once
	err  error
}

// listen takes path for this process: it replaces the socket of an agent that is gone and
// refuses to take one that answers.
func listen(path string) (*listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: a socket's path has at most %d bytes, this one has %d: choose a shorter one", path, maxSocketPath, len(path))
	}
	if err := makeDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	var l *listener
	err := withDirLock(filepath.Dir(path), func() error {
		if err := removeStale(path); err != nil {
			return err
		}
		var err error
		l, err = bind(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

func bind(path string) (*listener, error) {
	ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// Between bind and chmod the umask decides who can connect; the check of the peer's
	// credentials does not.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict %s to its owner: %w", path, err), ul.Close())
	}
	file, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look at the new socket: %w", err), ul.Close())
	}
	ul.SetUnlinkOnClose(false)
	return &listener{UnixListener: ul, path: path, file: file}, nil
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

// withDirLock keeps two agents that start at once from removing each other's new socket.
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

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: there is a file of that name that is not a socket: remove it or choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(fmt.Errorf("listen on %s: a running agent has this socket: stop it, or give this one another name", path), conn.Close())
	}
	// ECONNREFUSED alone says that no process holds the socket: a busy agent answers EAGAIN.
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("ask who has %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the socket of an earlier agent: %w", err)
	}
	return nil
}

// Close may be called again.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.err = withDirLock(filepath.Dir(l.path), func() error {
			return errors.Join(l.removeOwn(), l.UnixListener.Close())
		})
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
