package nonblock_test

import (
	"bytes"
	"errors"
	"net/netip"
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

// socket is one of TCP, bound to a port of loopback.
func socket(t *testing.T, loopback netip.Addr) (uintptr, netip.AddrPort) {
	t.Helper()
	family := unix.AF_INET6
	if loopback.Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nonblock.Close(uintptr(fd)); err != nil {
			t.Error(err)
		}
	})
	if err := nonblock.Bind(uintptr(fd), netip.AddrPortFrom(loopback, 0)); err != nil {
		t.Fatal(err)
	}
	local, err := nonblock.Local(uintptr(fd))
	if err != nil || local.Addr() != loopback || local.Port() == 0 {
		t.Fatalf("bound to %v, %v", local, err)
	}
	return uintptr(fd), local
}

func TestConnectionsOfBothFamilies(t *testing.T) {
	for _, loopback := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		listener, at := socket(t, loopback)
		client, _ := socket(t, loopback)
		if err := nonblock.Connect(client, at); !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EINPROGRESS) {
			t.Errorf("connected to nobody: %v", err)
		}
		if err := unix.Listen(int(listener), 1); err != nil {
			t.Fatal(err)
		}
		if fd, who, err := nonblock.Accept(listener); fd != -1 || who.IsValid() || !errors.Is(err, unix.EAGAIN) {
			t.Errorf("accepted %d of %v, %v, where nobody connects", fd, who, err)
		}
		client, from := socket(t, loopback)
		if who, err := nonblock.Remote(client); who.IsValid() || !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("the peer is %v, %v, before there is one", who, err)
		}
		if err := nonblock.Connect(client, at); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		accepted, who, err := nonblock.Accept(listener)
		if err != nil || who != from {
			t.Fatalf("accepted %v, which is %v, %v", who, from, err)
		}
		if who, err := nonblock.Remote(client); who != at || err != nil {
			t.Errorf("the peer is %v, %v, and not %v", who, err, at)
		}
		on := int32(1)
		if err := nonblock.Set(client, unix.SOL_TCP, unix.TCP_NODELAY, &on); err != nil {
			t.Error(err)
		}
		if on, err := unix.GetsockoptInt(int(client), unix.SOL_TCP, unix.TCP_NODELAY); on == 0 || err != nil {
			t.Errorf("TCP_NODELAY is %d, %v", on, err)
		}
		if info, err := nonblock.TCPInfo(client); info.State != unix.BPF_TCP_ESTABLISHED || info.Snd_mss == 0 || err != nil {
			t.Errorf("TCP_INFO has state %d, MSS %d, %v", info.State, info.Snd_mss, err)
		}
		if err := nonblock.CloseWrite(client); err != nil {
			t.Error(err)
		}
		if n, err := nonblock.Read(uintptr(accepted), make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("read %d bytes and %v at the end", n, err)
		}
		if err := nonblock.Close(uintptr(accepted)); err != nil {
			t.Error(err)
		}
		if err := nonblock.Close(^uintptr(0)); !errors.Is(err, unix.EBADF) {
			t.Errorf("closed what is no socket: %v", err)
		}
	}
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
