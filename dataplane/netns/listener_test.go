package netns_test

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

func listen(t *testing.T, at string) *netns.Listener {
	t.Helper()
	plain, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	l, err := netns.TakeListener(plain.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// connected is the two ends of a connection to l.
func connected(t *testing.T, l *netns.Listener) (far net.Conn, c *netns.Conn) {
	t.Helper()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	if c, err = l.AcceptConn(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return far, c
}

func TestListenerIsLikeOneOfPackageNet(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l := listen(t, at)
		far, c := connected(t, l)
		if c.Local().String() != far.RemoteAddr().String() || c.Remote().String() != far.LocalAddr().String() {
			t.Errorf("from %v to %v, but the other end says from %v to %v", c.Remote(), c.Local(), far.LocalAddr(), far.RemoteAddr())
		}
		if err := c.Use(func(fd int) {
			if on, err := unix.GetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY); on == 0 || err != nil {
				t.Errorf("TCP_NODELAY is %d, %v", on, err)
			}
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(far, "there"); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(io.LimitReader(c, 5)); string(got) != "there" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		if err := l.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Accept past its deadline: %v", err)
		}
		if err := l.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		waits := make(chan error, 1)
		go func() {
			_, err := l.Accept()
			waits <- err
		}()
		time.Sleep(10 * time.Millisecond)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-waits; !errors.Is(err, net.ErrClosed) {
			t.Errorf("who waited when it was closed was told %v", err)
		}
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			_ = c.Close()
			t.Error("somebody still listens")
		}
		for deed, err := range map[string]error{"Close": l.Close(), "SetDeadline": l.SetDeadline(time.Time{})} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s after Close: %v", deed, err)
			}
		}
	}
}

// Without descriptors a listener does not accept, and tells that this may pass.
func TestAcceptFailsForAWhile(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	_, failed := l.AcceptConn()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	var passing interface{ Temporary() bool }
	if !errors.Is(failed, unix.EMFILE) || !errors.As(failed, &passing) || !passing.Temporary() {
		t.Errorf("AcceptConn = %v, of which the caller is not told that it passes", failed)
	}
	c, err := l.AcceptConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// A socket that nobody waits for is not in Go's poller, and works all the same; one in the middle of
// whose use it is closed stays open until that is over.
func TestConnWithoutThePoller(t *testing.T) {
	far, c := connected(t, listen(t, "127.0.0.1:0"))
	var p [10]byte
	if n, err := c.Recv(p[:]); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("read %d, %v of nothing", n, err)
	}
	if n, err := c.Send([]byte("hello"), false); n != 5 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	if n, err := io.ReadFull(far, p[:5]); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := c.Send(make([]byte, 64<<20), false); n == 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("wrote %d, %v to who reads nothing", n, err)
	}
	if err := c.Use(func(fd int) {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			t.Errorf("a socket in use was closed: %v", err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Recv(p[:]); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Recv after Close: %v", err)
	}
	if _, err := c.Send(p[:], false); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send after Close: %v", err)
	}
	if c.Local().IsValid() {
		t.Errorf("a closed socket has the address %v", c.Local())
	}
	if _, err := io.Copy(io.Discard, far); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the other end read %v", err)
	}
}
