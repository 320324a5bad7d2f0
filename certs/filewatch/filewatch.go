// Package filewatch tells when a file or the files of a directory may have changed: by
// inotify, and by a slow tick for what inotify cannot see (a directory that was replaced, a
// file system without events).
//
// The directory that holds a file is watched and not the file: editors and Kubernetes
// replace files by rename, and mounted ConfigMaps swap a symlink beside them.
package filewatch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long the directory must be quiet before a change is told, so that a
	// writer of several files is seen once.
	settle = 50 * time.Millisecond
	// patience bounds settle in a directory that never is quiet.
	patience = time.Second
	// sweep is how often to look without an event.
	sweep = 30 * time.Second
)

// Watcher watches one path. Close releases it.
type Watcher struct {
	dirs  []string
	notes *fsnotify.Watcher
}

// New begins to watch path, which must exist: from its return on no change is missed.
func New(path string) (*Watcher, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	dirs := []string{filepath.Dir(path)}
	if info.IsDir() {
		dirs = append(dirs, path)
	}
	notes, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	w := &Watcher{dirs: dirs, notes: notes}
	if err := w.add(); err != nil {
		return nil, errors.Join(err, notes.Close())
	}
	return w, nil
}

// add may be called again: a directory that was replaced gets a new watch.
func (w *Watcher) add() error {
	for _, dir := range w.dirs {
		if err := w.notes.Add(dir); err != nil {
			return fmt.Errorf("watch %s: %w", dir, err)
		}
	}
	return nil
}

// Run calls changed whenever the path may have changed, and at least twice a minute, until
// ctx ends; changed finds out whether anything did. One call ends before the next begins.
func (w *Watcher) Run(ctx context.Context, changed func()) error {
	tick := time.NewTicker(sweep)
	defer tick.Stop()
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	defer quiet.Stop()
	var first time.Time // of the events not yet told
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.notes.Events:
			if !ok {
				return fmt.Errorf("watch %s: %w", w.dirs[0], fs.ErrClosed)
			}
			if first.IsZero() {
				first = time.Now()
			}
			if time.Since(first) < patience {
				quiet.Reset(settle)
			}
		case _, ok := <-w.notes.Errors:
			if !ok {
				return fmt.Errorf("watch %s: %w", w.dirs[0], fs.ErrClosed)
			}
			quiet.Reset(settle) // events were lost: look at everything
		case <-quiet.C:
			first = time.Time{}
			changed()
		case <-tick.C:
			// A directory that is missing now is tried again at the next tick; what
			// that means for its files is the reader's to say.
			_ = w.add()
			changed()
		}
	}
}

// Close ends the watch. It may be called again.
func (w *Watcher) Close() error { return w.notes.Close() }
