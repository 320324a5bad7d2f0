// Package netns opens network namespaces and makes sockets inside them. A socket belongs
// to the namespace it was made in for good, so a thread visits the namespace only for the
// moment of the socket call; listening, connecting and copying happen outside, in Go's
// poller, and one process serves hundreds of namespaces with a handful of threads.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Namespace is an open network namespace. It keeps the namespace alive, though not its
// name in the file system, until Close.
type Namespace struct {
	path   string
	cookie uint64

	mu   sync.RWMutex // a Do holds it for reading, so that Close cannot pull the descriptor away
	file *os.File     // nil once closed

	sockets stock
}

// Open opens the network namespace that path names, for example /run/netns/web or
// /proc/4711/ns/net.
func Open(path string) (*Namespace, error) {
	// Not to wait for a writer, should path be a FIFO.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	if err := checkNamespace(file); err != nil {
		return nil, errors.Join(fmt.Errorf("open network namespace %s: %w", path, err), file.Close())
	}
	n := &Namespace{path: path, file: file}
	if err := n.Do(n.readCookie); err != nil {
		return nil, errors.Join(fmt.Errorf("network namespace %s: %w", path, err), file.Close())
	}
	return n, nil
}

func checkNamespace(file *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &st); err != nil {
		return fmt.Errorf("look at its file system: %w", err)
	}
	if st.Type != unix.NSFS_MAGIC {
		return errors.New("it is no namespace: the path may be mistyped, or the pod's namespace gone and its mount with it")
	}
	return nil
}

func (n *Namespace) readCookie() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	defer unix.Close(fd)
	n.cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return fmt.Errorf("read SO_NETNS_COOKIE (Linux 5.14 or newer has it): %w", err)
	}
	return nil
}

// Cookie identifies the namespace among all that exist until the next boot; unlike an
// inode number it is never used again.
func (n *Namespace) Cookie() uint64 { return n.cookie }

// Path is what Open was given.
func (n *Namespace) Path() string { return n.path }

// Gone reports that Path does not name the namespace any more: there is nothing, or another
// namespace took its place, as when a pod's sandbox is made anew. What cannot be told is false.
func (n *Namespace) Gone() bool {
	gone := false
	_ = n.WithFD(func(fd int) error { // closed, it says nothing
		var held, named unix.Stat_t
		if err := unix.Fstat(fd, &held); err != nil {
			return err
		}
		err := unix.Stat(n.path, &named)
		gone = errors.Is(err, unix.ENOENT) || err == nil && (held.Dev != named.Dev || held.Ino != named.Ino)
		return err
	})
	return gone
}

// Close is idempotent. Sockets made in the namespace live on.
func (n *Namespace) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		return nil
	}
	err := errors.Join(n.file.Close(), n.sockets.close())
	n.file = nil
	return err
}

// WithFD calls fn with the namespace's descriptor, which is valid only during the call.
func (n *Namespace) WithFD(fn func(fd int) error) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.file == nil {
		return fmt.Errorf("network namespace %s: %w", n.path, os.ErrClosed)
	}
	return fn(int(n.file.Fd()))
}

// Do runs fn on a thread that is inside the namespace and returns its error. fn must not
// start goroutines that need the namespace, and should be short: it holds a thread.
func (n *Namespace) Do(fn func() error) error {
	return n.WithFD(func(fd int) error {
		done := make(chan error, 1)
		go func() { done <- visit(fd, fn) }()
		return <-done
	})
}

// visit leaves the goroutine locked to its thread when the thread cannot come home; the
// runtime then ends the thread together with the goroutine instead of reusing it.
func visit(fd int, fn func() error) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open the thread's own network namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace (needs CAP_SYS_ADMIN): %w", err)
	}
	err = fn()
	if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}
