package kernel

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns/netnstest"
)

func TestSysctlsAreSetWhereAContainerMountsThemReadOnly(t *testing.T) {
	netnstest.Require(t)
	const name = "net/ipv4/fwmark_reflect"
	done := make(chan error, 1)
	onThreadOfItsOwn(func() {
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
				return err
			}
			if err := errors.Join(
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND|unix.MS_REC, ""),
				unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""),
			); err != nil {
				return err
			}
			if err := os.WriteFile(sysctlPath(name), []byte("1"), 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("the test's /proc/sys can be written: %v", err)
			}
			if err := writeSysctl(name, "1"); err != nil {
				return err
			}
			got, err := readSysctl(name)
			if got != "1" {
				t.Errorf("%s is %q", name, got)
			}
			return err
		}()
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// onThreadOfItsOwn calls f on a thread that ends with it, since its namespaces are not ours any
// more then. It is not the first one, which never ends: /proc/self would show its namespaces to
// all tests that follow.
func onThreadOfItsOwn(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		done := make(chan struct{})
		onThreadOfItsOwn(func() { defer close(done); f() })
		<-done
		runtime.UnlockOSThread()
	}()
}
