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
	go func() {
		runtime.LockOSThread() // for good: the thread's namespaces are not ours any more
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
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
