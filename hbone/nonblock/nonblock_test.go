package nonblock_test

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

func pair(t *testing.T) (a, b uintptr) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, fd := range fds {
			_ = unix.Close(fd) // a test may have closed it
		}
	})
	return uintptr(fds[0]), uintptr(fds[1])
}

func TestReadAndWriteAsTheSystemCallsDo(t *testing.T) {
	a, b := pair(t)
	buf := make([]byte, 100)
	if n, err := nonblock.Read(b, buf); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("read %d bytes and %v where there is nothing", n, err)
	}
	for _, p := range [][]byte{[]byte("short"), bytes.Repeat([]byte("long"), 10_000)} {
		sent := 0
		for sent < len(p) {
			n, err := nonblock.Write(a, p[sent:])
			if err != nil {
				t.Fatal(err)
			}
			sent += n
		}
		var got []byte
		for len(got) < len(p) {
			n, err := nonblock.Read(b, buf)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, buf[:n]...)
		}
		if !bytes.Equal(got, p) {
			t.Errorf("of %d bytes others arrived", len(p))
		}
	}
	if n, err := nonblock.Read(a, nil); n != 0 || err != nil {
		t.Errorf("read %d and %v into no buffer", n, err)
	}
	if n, err := nonblock.Write(a, nil); n != 0 || err != nil {
		t.Errorf("wrote %d and %v of nothing", n, err)
	}
}

func TestWriteStopsWhereThereIsNoRoom(t *testing.T) {
	for _, size := range []int{1 << 10, 100 << 10} {
		a, _ := pair(t)
		p := make([]byte, size)
		for sent := 0; ; {
			n, err := nonblock.Write(a, p)
			if sent += n; sent > 64<<20 {
				t.Fatal("the kernel takes whatever it is given")
			}
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestEndsAreToldApart(t *testing.T) {
	a, b := pair(t)
	if err := unix.Close(int(b)); err != nil {
		t.Fatal(err)
	}
	if n, err := nonblock.Read(a, make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("read %d and %v at the end of a stream", n, err)
	}
	// SIGPIPE on a descriptor above 2 is no signal in a Go program (os/signal).
	for _, size := range []int{1, 100 << 10} {
		if _, err := nonblock.Write(a, make([]byte, size)); !errors.Is(err, unix.EPIPE) {
			t.Errorf("write of %d bytes to nobody: %v", size, err)
		}
	}
}

func TestReady(t *testing.T) {
	a, b := pair(t)
	if nonblock.Ready(b, unix.POLLIN) || !nonblock.Ready(b, unix.POLLOUT) {
		t.Error("a fresh socket has something to read, or no room")
	}
	if _, err := nonblock.Write(a, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if !nonblock.Ready(b, unix.POLLIN) {
		t.Error("a byte that arrived is not seen")
	}
	if err := unix.Close(int(a)); err != nil {
		t.Fatal(err)
	}
	if !nonblock.Ready(b, unix.POLLRDHUP) {
		t.Error("a peer that is gone is not seen")
	}
}

func BenchmarkReadOfNothing(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 100)
	b.Run("nonblock", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = nonblock.Read(uintptr(fds[0]), buf)
		}
	})
	b.Run("unix", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = unix.Read(fds[0], buf)
		}
	})
}
