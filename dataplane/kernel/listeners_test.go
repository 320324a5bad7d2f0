package kernel_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

// destroy does to a listener what ss -K does: it listens no more, and stays open.
func destroy(t *testing.T, l syscall.Conn) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = unix.Shutdown(int(fd), unix.SHUT_RDWR) }); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
}

func TestDestroyedListenersAreReplaced(t *testing.T) {
	inAllModes(t, func(t *testing.T, m mode) {
		f := enrolled(t, m)
		app := dial(t, f.web.Namespace, netip.AddrPortFrom(f.db.V4, 3306))
		captured := accept(t, f.pod.Outbound())
		if err := f.pod.Listening(); err != nil {
			t.Fatal(err)
		}
		for name, listener := range map[string]func() syscall.Conn{
			"outbound": func() syscall.Conn { return f.pod.Outbound() },
			"inbound":  func() syscall.Conn { return f.pod.Inbound() },
			"tunnel":   func() syscall.Conn { return f.pod.Tunnel() },
		} {
			destroy(t, listener())
			if err := f.pod.Listening(); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("destroyed the %s listener: %v", name, err)
			}
			if err := f.pod.Relisten(); err != nil {
				t.Fatal(err)
			}
			if err := f.pod.Listening(); err != nil {
				t.Error(err)
			}
			assertCaptured(t, f)
		}
		send(t, app, captured, "undisturbed")
	})
}

// A start that fails must not leave its hooks at the cgroup, when no pod needs them.
func TestStartThatFailsLeavesNothing(t *testing.T) {
	netnstest.Require(t)
	f := newFixture(t, modes()[0])
	if err := f.dp.Close(); err != nil {
		t.Fatal(err)
	}
	layouts := filepath.Join(pinDir(f), "layout-*")
	made, err := filepath.Glob(layouts)
	if err != nil || len(made) != 1 {
		t.Fatalf("layouts %v: %v", made, err)
	}
	if err := detach(made[0]); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(made[0]); err != nil {
		t.Fatal(err)
	}
	pods := filepath.Join(pinDir(f), "pods")
	if err := os.Symlink("/dev/null", pods); err != nil { // no directory that could be read
		t.Fatal(err)
	}
	if dp, err := kernel.Open(f.cfg); err == nil {
		_ = dp.Close()
		t.Error("nothing was in the way")
	}
	if left, _ := filepath.Glob(layouts); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := os.Remove(pods); err != nil {
		t.Fatal(err)
	}
	f.open(t)
}
