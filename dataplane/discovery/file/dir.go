package file

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// problem is something wrong in a file, or with it. Until it is solved, the last good
// content of the file stays in force.
type problem struct {
	file  string
	line  int // from 1; 0 when it is about the whole file
	cause string
}

// where is the file and line, for people.
func (p problem) where() string {
	if p.line == 0 {
		return p.file
	}
	return fmt.Sprintf("%s:%d", p.file, p.line)
}

// directory is the parsed content of a directory's files, of each file the last that parsed.
type directory[T any] struct {
	root       string
	skip       string   // a path below root that is not read
	extensions []string // of the files that are
	depth      int      // of subdirectories
	maxSize    int64    // of a file
	maxFiles   int
	settle     time.Duration // how long a file must stay empty to count as empty
	linger     time.Duration // and how long it must be missing to count as gone
	parse      func(name string, data []byte) (T, []fault)

	files map[string]*entry[T]
}

// entry is one file.
type entry[T any] struct {
	hash       [sha256.Size]byte // of the content that value or faults come from
	value      T
	good       bool // value is the content, now or before
	faults     []fault
	emptySince time.Time
	goneSince  time.Time // zero: it is there
}

// state is what a scan found.
type state struct {
	changed  bool
	complete bool     // every file is read and good, now
	unread   []string // files that were never good
	retry    bool     // something was caught in the middle of a write: look again soon
	dirs     []string // to be watched
	problems []problem
}

func (st *state) problem(file string, line int, format string, args ...any) {
	st.problems = append(st.problems, problem{file: file, line: line, cause: fmt.Sprintf(format, args...)})
	st.complete = false
}

// scan reads the whole directory: a few megabytes, from the page cache, and no guess about
// time stamps. Only what has changed is parsed.
func (d *directory[T]) scan(now time.Time) state {
	st := state{complete: true}
	found := &listing{st: &st, files: make(map[string]bool)}
	d.walk(found, d.root, 0)
	if d.files == nil {
		d.files = make(map[string]*entry[T])
	}
	for path, e := range d.files {
		if !found.covers(path) {
			d.miss(path, e, now, &st)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(found.files)) {
		d.load(path, now, &st)
	}
	for _, path := range d.paths() {
		e := d.files[path]
		for _, f := range e.faults {
			st.problem(path, f.line, "%s", f.cause)
		}
		if !e.good {
			st.unread = append(st.unread, path)
			st.complete = false
		}
	}
	return st
}

// paths lists the files in the order in which they count.
func (d *directory[T]) paths() []string { return slices.Sorted(maps.Keys(d.files)) }

// load brings one file's entry up to date.
func (d *directory[T]) load(path string, now time.Time, st *state) {
	data, err := readFile(path, d.maxSize)
	e := d.files[path]
	if errors.Is(err, fs.ErrNotExist) && !isSymlink(path) {
		if e != nil {
			d.miss(path, e, now, st)
		}
		return
	}
	if e == nil {
		e = new(entry[T])
		d.files[path] = e
	}
	e.goneSince = time.Time{}
	switch {
	case errors.Is(err, errBeingWritten):
		st.retry = true
		return
	case err != nil:
		e.hash, e.faults = [sha256.Size]byte{}, []fault{{cause: pathless(err).Error()}}
		return
	}
	// A file that is rewritten in place is empty for a moment, and what it held must not
	// go out of force for that long.
	if len(bytes.TrimSpace(data)) > 0 {
		e.emptySince = time.Time{}
	} else if e.good {
		if e.emptySince.IsZero() {
			e.emptySince = now
		}
		if now.Sub(e.emptySince) < d.settle {
			st.retry = true
			return
		}
	}
	hash := sha256.Sum256(data)
	if hash == e.hash {
		return
	}
	e.hash = hash
	var value T
	if value, e.faults = d.parse(filepath.Base(path), data); len(e.faults) == 0 {
		e.value, e.good = value, true
		st.changed = true
	}
}

// miss forgets a file that is not there any more. Editors move a file away before they write
// it anew, and what it held must not go out of force in between.
func (d *directory[T]) miss(path string, e *entry[T], now time.Time, st *state) {
	if e.goneSince.IsZero() {
		e.goneSince = now
	}
	if e.good && now.Sub(e.goneSince) < d.linger {
		st.retry = true
		return
	}
	delete(d.files, path)
	st.changed = st.changed || e.good
}

// errBeingWritten marks a file that changed while it was read.
var errBeingWritten = errors.New("being written")

// readFile reads a regular file of bounded size, and never blocks on what only looks like one.
func readFile(path string, maxSize int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	before, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if before.Size() > maxSize {
		return nil, fmt.Errorf("%d bytes are more than %d: split the file", before.Size(), maxSize)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	after, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if after.Size() != int64(len(data)) || !after.ModTime().Equal(before.ModTime()) {
		return nil, errBeingWritten
	}
	return data, nil
}

func isSymlink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSymlink != 0
}

// listing is what a walk finds.
type listing struct {
	st         *state
	files      map[string]bool
	unreadable []string // directories whose files stay as they were
}

// covers reports whether path is there, or may be.
func (l *listing) covers(path string) bool {
	if l.files[path] {
		return true
	}
	for _, dir := range l.unreadable {
		if strings.HasPrefix(path, dir+string(filepath.Separator)) {
			return true
		}
	}
	return false
}

// walk lists the files of dir. Hidden ones are editors' and atomic writers' own; a symbolic
// link counts as what it leads to.
func (d *directory[T]) walk(l *listing, dir string, depth int) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if depth > 0 && errors.Is(err, fs.ErrNotExist) {
			return // gone since its parent was read
		}
		l.st.problem(dir, 0, "%s", pathless(err))
		l.unreadable = append(l.unreadable, dir)
		return
	}
	l.st.dirs = append(l.st.dirs, dir)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") || path == d.skip {
			continue
		}
		info, err := os.Stat(path)
		switch {
		case err == nil && info.IsDir():
			if depth < d.depth {
				d.walk(l, path, depth+1)
			} else if d.depth > 0 {
				l.st.problem(path, 0, "not read: subdirectories of subdirectories are not")
			}
		case !slices.Contains(d.extensions, filepath.Ext(path)):
		case len(l.files) == d.maxFiles:
			l.st.problem(dir, 0, "not all read: there are more than %d files", d.maxFiles)
			l.unreadable = append(l.unreadable, dir)
			return
		default:
			l.files[path] = true
		}
	}
}

// pathless drops the path from an error that is reported beside it.
func pathless(err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
