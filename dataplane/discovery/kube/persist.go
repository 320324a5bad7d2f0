package kube

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// snapshotVersion is of the file's form; another's file is not read.
const snapshotVersion = 1

// maxSnapshot bounds what is read of a file, unpacked.
const maxSnapshot = 1 << 30

// savingFactor bounds what writing the file costs: the pause after it, in times what it took.
const savingFactor = 20

// header is the first line of the file: JSON, packed. Each line after it is an API object,
// trimmed; as many as Objects says.
type header struct {
	Version  int       `json:"version"`
	Written  time.Time `json:"written"`
	Captured []string  `json:"captured"`      // UIDs
	UDP      []string  `json:"udp,omitempty"` // those of them that take UDP
	Objects  int       `json:"objects"`
}

// restore takes the last good snapshot for the cluster until the API server has told of it.
func (s *Source) restore() {
	if s.config.SnapshotFile == "" {
		return
	}
	f, err := os.Open(s.config.SnapshotFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var head header
	var items []*item
	if err == nil {
		defer f.Close() //nolint:errcheck // opened for reading
		head, items, err = readSnapshot(f, maxSnapshot)
	}
	if err != nil {
		s.config.Log.Error("the last good snapshot cannot be used: nothing is in force until the API server has told of all of the cluster",
			"file", s.config.SnapshotFile, "error", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, it := range items {
		s.takeLocked(it)
	}
	s.captured, s.udp = setOf(head.Captured), setOf(head.UDP)
	// Who was captured and is not wanted any more was being released: peers go on tunnelling
	// until its annotation is seen to be gone.
	for key, pod := range s.pods {
		pod.annotated = mark{captured: s.captured[pod.uid], udp: s.udp[pod.uid]}
		s.pods[key] = pod
	}
	s.stale = head.Written
	s.changedLocked(urgent)
	s.config.Log.Info("the last good snapshot is in force until the API server has told of all of the cluster",
		"file", s.config.SnapshotFile, "written", head.Written, "objects", len(items))
}

// readSnapshot reads a file as a whole or not at all: what is missing could be a policy. It
// takes less than limit bytes, unpacked.
func readSnapshot(r io.Reader, limit int64) (header, []*item, error) {
	unpacked, err := gzip.NewReader(r)
	if err != nil {
		return header{}, nil, err
	}
	limited := &io.LimitedReader{R: unpacked, N: limit}
	lines := json.NewDecoder(limited)
	var head header
	if err := lines.Decode(&head); err != nil {
		return header{}, nil, fmt.Errorf("header: %w", err)
	}
	if head.Version != snapshotVersion {
		return header{}, nil, fmt.Errorf("it has version %d, and only %d is understood", head.Version, snapshotVersion)
	}
	if head.Written.IsZero() {
		return header{}, nil, errors.New("it does not say when it was written")
	}
	var items []*item
	for {
		var raw json.RawMessage
		err := lines.Decode(&raw)
		if limited.N == 0 {
			return header{}, nil, fmt.Errorf("unpacked it has %d bytes or more", limit)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return header{}, nil, fmt.Errorf("object %d: %w", len(items), err)
		}
		it, err := decodeItem(raw)
		if err != nil {
			return header{}, nil, fmt.Errorf("object %d: %w", len(items), err)
		}
		items = append(items, it)
	}
	if len(items) != head.Objects {
		return header{}, nil, fmt.Errorf("it has %d objects and says that it has %d", len(items), head.Objects)
	}
	return head, items, nil
}

func decodeItem(raw json.RawMessage) (*item, error) {
	var typ object.TypeMeta
	if err := json.Unmarshal(raw, &typ); err != nil {
		return nil, err
	}
	o, err := object.Decode(typ, raw)
	if err != nil {
		return nil, err
	}
	it := &item{key: o.Key, object: o}
	if w, ok := o.Workload(); ok {
		it.uid = w.UID
	}
	if o.Key.Kind.IsPolicy() {
		it.policy = &policy{raw: raw}
	}
	return it, nil
}

// save writes the file when a snapshot was published, at a pace.
func (s *Source) save(ctx context.Context) {
	if s.config.SnapshotFile == "" {
		return
	}
	failed, pause := false, s.pace.saving
	for {
		select {
		case <-s.saves:
		case <-ctx.Done():
			select {
			case <-s.saves: // the last state is worth a moment
			default:
				return
			}
		}
		sleep(ctx, pause)
		start := time.Now()
		err := s.write()
		pause = max(s.pace.saving, savingFactor*time.Since(start))
		if err != nil && !failed {
			s.config.Log.Error("keep the last good snapshot: after a restart without the API server an older one, or none, is in force",
				"file", s.config.SnapshotFile, "error", err)
		}
		failed = err != nil
	}
}

// write replaces the file by what is known now, unless that is itself the file's. Of a mesh
// that is being taken off there is to be none: whether it still is, or has been installed
// anew, an agent that starts has to be told.
func (s *Source) write() error {
	select {
	case <-s.released:
		return removeFiles(s.config.SnapshotFile)
	default:
	}
	head, objects, ok := s.state()
	if !ok {
		return nil
	}
	return writeFile(s.config.SnapshotFile, func(w io.Writer) error { return encodeSnapshot(w, head, objects) })
}

// state lists what is to be kept. Nothing that it returns changes any more.
func (s *Source) state() (header, []any, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.syncedLocked() {
		return header{}, nil, false
	}
	head := header{Version: snapshotVersion, Written: time.Now(), Captured: []string{}}
	head.Captured = slices.AppendSeq(head.Captured, maps.Keys(s.captured))
	slices.Sort(head.Captured)
	head.UDP = slices.Sorted(maps.Keys(s.udp))
	keys := s.set.Keys()
	list := make([]any, 0, len(keys))
	for _, key := range keys {
		if p := s.writing[key]; p != nil {
			list = append(list, p.raw)
			continue
		}
		o, _ := s.set.Get(key)
		list = append(list, o)
	}
	head.Objects = len(list)
	return head, list, true
}

func encodeSnapshot(w io.Writer, head header, objects []any) error {
	packed, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	lines := json.NewEncoder(packed)
	if err := lines.Encode(head); err != nil {
		return err
	}
	for _, o := range objects {
		if o, converted := o.(object.Object); converted {
			if err := lines.Encode(o.Encode()); err != nil {
				return err
			}
			continue
		}
		if err := lines.Encode(o); err != nil {
			return err
		}
	}
	return packed.Close()
}

// writeFile writes a file that is there as a whole or not at all, also after a crash, and
// beside another agent that does the same.
func writeFile(path string, content func(io.Writer) error) (err error) {
	if err := removeStrays(path); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+strayPattern)
	if err != nil {
		return err
	}
	if err := errors.Join(content(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

const (
	strayPattern = ".*.tmp"
	// strayAge is that of a file which nobody writes any more.
	strayAge = 10 * time.Minute
)

// removeStrays removes what agents began that ended in the middle.
func removeStrays(path string) error {
	began, err := filepath.Glob(path + strayPattern)
	if err != nil {
		return err
	}
	var errs []error
	for _, stray := range began {
		if info, err := os.Stat(stray); err == nil && time.Since(info.ModTime()) > strayAge {
			errs = append(errs, removeFile(stray))
		}
	}
	return errors.Join(errs...)
}

// removeFiles removes the file and what is left of attempts to write it.
func removeFiles(path string) error {
	began, err := filepath.Glob(path + strayPattern)
	errs := []error{err}
	for _, file := range append(began, path) {
		errs = append(errs, removeFile(file))
	}
	return errors.Join(errs...)
}

func removeFile(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
