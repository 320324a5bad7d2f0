package ca

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/raceway-mesh/raceway/certs/filewatch"
)

const (
	// stagingDir becomes committedDir when all files in it are on disk.
	stagingDir   = ".making"
	committedDir = ".made"
)

// Dir is a Source that reads files, in the layout of Istio's cacerts.
type Dir struct {
	path  string
	watch *filewatch.Watcher
}

// NewDir begins to watch the directory, in which it makes a root where there is none. Close
// ends the watch.
func NewDir(path string, root Root) (*Dir, error) {
	if path == "" {
		return nil, errors.New("certificate authority: no directory")
	}
	if err := prepare(path, root); err != nil {
		return nil, fmt.Errorf("certificate authority in %s: %w", path, err)
	}
	watch, err := filewatch.New(path)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	return &Dir{path: path, watch: watch}, nil
}

// Load implements Source.
func (d *Dir) Load() (Material, error) {
	key, err := readKey(filepath.Join(d.path, KeyFile))
	if err != nil {
		return Material{}, err
	}
	m := Material{Key: Part{KeyFile, key}, Cert: Part{Name: CertFile}, Chain: Part{Name: ChainFile}, Roots: Part{Name: RootFile}}
	for _, p := range []*Part{&m.Cert, &m.Chain, &m.Roots} {
		p.PEM, err = readFile(filepath.Join(d.path, p.Name))
		if err != nil && (p != &m.Chain || !errors.Is(err, fs.ErrNotExist)) {
			return Material{}, err
		}
	}
	return m, nil
}

// Run implements Source.
func (d *Dir) Run(ctx context.Context, changed func()) error { return d.watch.Run(ctx, changed) }

// Close implements Source.
func (d *Dir) Close() error { return d.watch.Close() }

func (d *Dir) String() string { return "directory " + d.path }

// prepare completes what a crash left half done and makes a new authority in a directory
// that has none.
func prepare(dir string, root Root) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	// Two first starts at once must agree on one authority. Closing releases the lock.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	info, err := lock.Stat()
	if err != nil {
		return err
	}
	// With the sticky bit nobody can replace a file of ours: Kubernetes mounts secrets so.
	writable := info.Mode().Perm()&0o002 != 0
	if writable && info.Mode()&fs.ModeSticky == 0 {
		return openDirError(info)
	}
	if err := discardStaging(dir); err != nil {
		return fmt.Errorf("remove what an interrupted start left: %w", err)
	}
	if err := settle(dir); err != nil {
		return fmt.Errorf("complete an interrupted start: %w", err)
	}
	present, missing, err := inventory(dir)
	switch {
	case err != nil:
		return err
	case len(missing) == 0:
		return nil
	case len(present) > 0:
		return fmt.Errorf("%s is there but %s is not: put it there, or empty the directory to have a new authority made (every certificate in use then loses its root)", strings.Join(present, " and "), strings.Join(missing, " and "))
	}
	if writable { // somebody else could put files there first
		return openDirError(info)
	}
	if err := create(dir, root); err != nil {
		return fmt.Errorf("make a new root: %w", err)
	}
	return settle(dir)
}

func openDirError(info fs.FileInfo) error {
	return fmt.Errorf("everyone may write to the directory (mode %#o), so its key proves nothing: chmod o-w", info.Mode().Perm())
}

// discardStaging looks first: a read-only mount refuses to remove even what is not there.
func discardStaging(dir string) error {
	staging := filepath.Join(dir, stagingDir)
	if _, err := os.Lstat(staging); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return os.RemoveAll(staging)
}

// inventory sorts the files that an authority consists of.
func inventory(dir string) (present, missing []string, err error) {
	for _, name := range []string{KeyFile, CertFile, RootFile} {
		switch _, err := os.Stat(filepath.Join(dir, name)); {
		case err == nil:
			present = append(present, name)
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, name)
		default:
			return nil, nil, err
		}
	}
	return present, missing, nil
}

// create makes a root and commits it by a rename; settle puts it in its place.
func create(dir string, root Root) error {
	m, err := root.Make()
	if err != nil {
		return err
	}
	staging := filepath.Join(dir, stagingDir)
	if err := os.Mkdir(staging, 0o700); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(staging, m.Key.Name), m.Key.PEM, 0o600); err != nil {
		return err
	}
	for _, p := range []Part{m.Cert, m.Roots} {
		if err := writeSynced(filepath.Join(staging, p.Name), p.PEM, 0o644); err != nil {
			return err
		}
	}
	if err := syncDir(staging); err != nil {
		return err
	}
	if err := os.Rename(staging, filepath.Join(dir, committedDir)); err != nil {
		return err
	}
	return syncDir(dir)
}

// settle moves committed files to their places. It may be interrupted and called again.
func settle(dir string) error {
	committed := filepath.Join(dir, committedDir)
	entries, err := os.ReadDir(committed)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(committed, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if err := os.Remove(committed); err != nil {
		return err
	}
	return syncDir(dir)
}

// writeSynced makes a new file. The mode is set apart from the creation, past the umask.
func writeSynced(name string, data []byte, mode fs.FileMode) (err error) {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.Write(data); err != nil {
		return err
	}
	if err := file.Chmod(mode); err != nil {
		return err
	}
	return file.Sync()
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

// maxFileBytes bounds what is read of a file: hundreds of certificates.
const maxFileBytes = 1 << 20

func readFile(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	return readClose(file)
}

// readKey refuses a key that others may have read.
func readKey(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	// Its group may read it: that is how Kubernetes gives a secret to a process that is not root.
	if mode := info.Mode().Perm(); mode&0o037 != 0 {
		return nil, errors.Join(fmt.Errorf("others than its owner may use %s (mode %#o): chmod 600 (in Kubernetes: defaultMode 0400 on the secret's volume), and replace the key if it may have been read", KeyFile, mode), file.Close())
	}
	return readClose(file)
}

func readClose(file *os.File) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", file.Name(), maxFileBytes)
	}
	return data, nil
}
