package kernel

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// writeSysctl sets one of the calling thread's network namespace. In a container that is not
// privileged /proc/sys is mounted over itself, read-only: then we make that mount, which is
// our mount namespace's own, writable. It takes CAP_SYS_ADMIN, and that AppArmor lets us.
func writeSysctl(name, value string) error {
	write := func() error { return os.WriteFile(sysctlPath(name), []byte(value), 0o644) }
	err := write()
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	const flags = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if mount := unix.Mount("", "/proc/sys", "", flags, ""); mount != nil {
		return fmt.Errorf("%w, and making /proc/sys writable: %w", err, mount)
	}
	return write()
}
