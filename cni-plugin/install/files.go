package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// errChanged says that a file is not as it was read any more.
var errChanged = errors.New("another program changed it at the same moment")

// tempMark is in the names of our temporary files, which no container runtime takes for
// configuration.
const tempMark = ".raceway-tmp-"

// withLock keeps the agents of an upgrade, the command line and the plugin from editing dir
// at once. Programs of others do not take the lock.
func withLock(dir string, fn func() error) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open the directory of the network configuration: %w", err)
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

// put makes path a file of that text, whatever it was before, with the owner of like if there
// is one. It is there as a whole or not at all, also after a power cut.
func put(path string, text []byte, mode fs.FileMode, like fs.FileInfo) error {
	temp, err := writeTemp(path, text, mode, like)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return syncDir(filepath.Dir(path))
}

// replace makes text of a file that was was, with its mode and owner. A symbolic link stays,
// and the file that it leads to is replaced. The error is errChanged when the file is
// something else by now, and then it is left as it is.
func replace(path string, was, text []byte) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("follow the link: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	temp, err := writeTemp(path, text, info.Mode().Perm(), info)
	if err != nil {
		return err
	}
	if err := swap(temp, path, was); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// swap puts temp in the place of path if that is was.
func swap(temp, path string, was []byte) error {
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, was) {
		return errors.Join(errChanged, err)
	}
	err := exchange(temp, path, was)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Rename(temp, path) // a file system that cannot exchange
	}
	return err
}

// exchange swaps two files and looks at what came out of path: what another program has written
// there since it was compared goes back. A plain rename would lose it.
func exchange(temp, path string, was []byte) error {
	rename := func() error {
		return unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	}
	if err := rename(); err != nil {
		return err
	}
	if out, err := os.ReadFile(temp); err != nil || !bytes.Equal(out, was) {
		return errors.Join(errChanged, err, rename())
	}
	return nil
}

// writeTemp writes text beside path.
func writeTemp(path string, text []byte, mode fs.FileMode, like fs.FileInfo) (name string, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+tempMark+"*")
	if err != nil {
		return "", explain(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(explain(err), os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(text)
	if err == nil {
		err = chown(f, like)
	}
	if err == nil {
		err = f.Chmod(mode) // after the owner, whose change takes bits away
	}
	if err == nil {
		err = f.Sync()
	}
	return f.Name(), errors.Join(err, f.Close())
}

// chown gives f the owner of like, and asks for no right when it is ours.
func chown(f *os.File, like fs.FileInfo) error {
	if like == nil {
		return nil
	}
	want, ok := like.Sys().(*syscall.Stat_t)
	if !ok || (int(want.Uid) == os.Geteuid() && int(want.Gid) == os.Getegid()) {
		return nil
	}
	return f.Chown(int(want.Uid), int(want.Gid))
}

// explain says what to do about a directory that cannot be written.
func explain(err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: it must be writable for the agent: a hostPath volume that is not readOnly, of a directory that the node's image does not freeze", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: the agent must run as root here, and SELinux or AppArmor must let it write", err)
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil // a file system without
	}
	return errors.Join(err, d.Close())
}

// removeTemps removes what a power cut left.
func removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), tempMark) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
