package file

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// maxFiles bounds the files of a directory.
const maxFiles = 8192

// lingering is, in debounce intervals, how long a file's objects outlive it.
const lingering = 2

// maxUnquiet bounds, in debounce intervals, how long a busy directory is left to settle.
const maxUnquiet = 5

// Source publishes snapshots of a directory.
type Source struct {
	config Config

	mu       sync.Mutex
	problems []problem

	// What follows belongs to Run.
	cluster       directory[manifest]
	nodes         directory[status]
	set           object.Set
	captured, udp map[string]bool
	published     bool
	waiting       bool // it was said that nothing is published yet
	ignored       map[string]bool
}

// New checks the configuration and the directories.
func New(config Config) (*Source, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("file discovery: %w", err)
	}
	config = config.withDefaults()
	if err := config.prepare(); err != nil {
		return nil, err
	}
	return &Source{
		config: config,
		cluster: directory[manifest]{
			root: config.Dir, skip: config.StatusDir, depth: 1,
			extensions: []string{".yaml", ".yml", ".json"},
			maxSize:    config.MaxFileSize, maxFiles: maxFiles, settle: config.Settle, linger: lingering * config.Debounce, parse: parseManifest,
		},
		nodes: directory[status]{
			root: config.StatusDir, extensions: []string{statusExtension},
			maxSize: config.MaxFileSize, maxFiles: maxFiles, settle: config.Settle, linger: lingering * config.Debounce, parse: parseStatus,
		},
		ignored: make(map[string]bool),
	}, nil
}

// Problems lists what is wrong now, by file and line. Safe for concurrent use.
func (s *Source) Problems() []discovery.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := make([]discovery.Problem, 0, len(s.problems))
	for _, p := range s.problems {
		told = append(told, discovery.Problem{Where: p.where(), Cause: p.cause})
	}
	return told
}

// Run publishes to store until ctx ends, and then returns nil. It is called once.
func (s *Source) Run(ctx context.Context, store *dataplane.Store) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w (fs.inotify.max_user_instances may be too low)", s.config.Dir, err)
	}
	defer watcher.Close() //nolint:errcheck // it cannot fail in a way that matters here
	resync := time.NewTicker(s.config.Resync)
	defer resync.Stop()
	var quiet pause
	defer quiet.end()
	for {
		if retry := s.pass(watcher, store); retry {
			quiet.extend(s.config.Debounce)
		}
	wait:
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-resync.C:
				break wait
			case <-quiet.over():
				break wait
			case _, open := <-watcher.Events:
				if !open {
					return errors.New("watch: the watcher ended")
				}
				quiet.extend(s.config.Debounce)
			case err, open := <-watcher.Errors:
				if !open {
					return errors.New("watch: the watcher ended")
				}
				s.config.Log.Warn("watching the cluster directory: reading all of it", "error", err)
				quiet.extend(s.config.Debounce)
			}
		}
		quiet.end()
	}
}

// pause waits until events have ceased for a while, but not for ever.
type pause struct {
	timer *time.Timer
	last  time.Time // when it is over at the latest
}

func (p *pause) extend(debounce time.Duration) {
	now := time.Now()
	if p.timer == nil {
		p.last = now.Add(maxUnquiet * debounce)
		p.timer = time.NewTimer(debounce)
		return
	}
	p.timer.Reset(min(debounce, p.last.Sub(now)))
}

func (p *pause) over() <-chan time.Time {
	if p.timer == nil {
		return nil
	}
	return p.timer.C
}

func (p *pause) end() {
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}

// pass reads both directories and publishes if that changed anything. It reports whether
// it should be called again soon.
func (s *Source) pass(watcher *fsnotify.Watcher, store *dataplane.Store) (retry bool) {
	// A directory is watched before it is read, or a change in between would be missed:
	// those that a scan finds are new, and are read once more.
	s.watch(watcher, []string{s.config.Dir, s.config.StatusDir})
	cluster := s.cluster.scan(time.Now())
	if s.watch(watcher, cluster.dirs) {
		second := s.cluster.scan(time.Now())
		second.changed = second.changed || cluster.changed
		cluster = second
	}
	nodes := state{complete: true}
	if s.config.StatusDir != "" {
		nodes = s.nodes.scan(time.Now())
	}
	problems := slices.Concat(cluster.problems, nodes.problems)
	ready := s.published || cluster.complete && nodes.complete
	changed, found := s.merge(cluster.unread)
	problems = append(problems, found...)
	contents, conflicts := s.set.Contents(s.config.mesh())
	for _, c := range conflicts {
		problems = append(problems, problem{file: s.config.Dir, cause: c.Key.String() + " " + c.Cause})
	}
	captured, udp := s.capturedIn(&contents)
	s.report(problems)
	switch {
	case !ready:
		s.wait(cluster.retry || nodes.retry)
	case changed || !s.published || !maps.Equal(captured, s.captured) || !maps.Equal(udp, s.udp):
		s.captured, s.udp, s.published = captured, udp, true
		contents.Captured, contents.UDP = captured, udp
		store.Publish(dataplane.NewSnapshot(contents))
		s.config.Log.Debug("published a snapshot", "workloads", len(contents.Workloads),
			"services", len(contents.Services), "captured", len(captured))
	}
	return cluster.retry || nodes.retry
}

// watch adds directories and reports whether one of them was not watched before. What
// cannot be watched is still read at every resync.
func (s *Source) watch(watcher *fsnotify.Watcher, dirs []string) (added bool) {
	watched := watcher.WatchList()
	for _, dir := range dirs {
		if dir == "" || slices.Contains(watched, dir) {
			continue
		}
		if err := watcher.Add(dir); err != nil {
			s.config.Log.Warn("a directory cannot be watched: changes in it are seen late",
				"directory", dir, "within", s.config.Resync, "error", err)
			continue
		}
		added = true
	}
	return added
}

// wait says, once, why nothing is published.
func (s *Source) wait(writing bool) {
	if s.waiting || writing {
		return
	}
	s.waiting = true
	s.config.Log.Error("nothing is published and no connection decided until every file parses: one that does not may hold a policy",
		"directory", s.config.Dir)
}

// merge brings the set up to date with the files. Of two that define one object the earlier
// by name counts. While a file that was never good may hold it, a policy does not go: its
// file may just have been renamed and spoilt.
func (s *Source) merge(unread []string) (changed bool, problems []problem) {
	where := make(map[object.Key]problem)
	for _, path := range s.inForce() {
		e := s.cluster.files[path]
		s.logIgnored(path, e.value.ignored)
		for _, o := range e.value.objects {
			if first, twice := where[o.Key]; twice {
				if !e.goneSince.IsZero() {
					continue // renamed
				}
				problems = append(problems, problem{file: path, line: o.line, cause: fmt.Sprintf(
					"%s is in %s:%d already, which counts", o.Key, first.file, first.line)})
				continue
			}
			where[o.Key] = problem{file: path, line: o.line}
			if cause := o.Invalid(); cause != "" {
				problems = append(problems, problem{file: path, line: o.line, cause: fmt.Sprintf(
					"%s: %s: it is enforced as strictly as it can be meant", o.Key, oneLine(cause))})
			}
			changed = s.set.Put(o.Object) || changed
		}
	}
	for _, key := range s.set.Keys() {
		if _, there := where[key]; there {
			continue
		}
		if s.published && key.Kind.IsPolicy() && len(unread) > 0 {
			problems = append(problems, problem{file: unread[0], cause: fmt.Sprintf(
				"%s is in no file any more but stays in force until this one parses: it may hold it", key)})
			continue
		}
		changed = s.set.Delete(key) || changed
	}
	return changed, problems
}

// inForce lists the files in the order in which they count: those that are gone, but may
// come back, after the others.
func (s *Source) inForce() []string {
	var here, gone []string
	for _, path := range s.cluster.paths() {
		if s.cluster.files[path].goneSince.IsZero() {
			here = append(here, path)
		} else {
			gone = append(gone, path)
		}
	}
	return append(here, gone...)
}

func (s *Source) logIgnored(path string, kinds []string) {
	for _, kind := range kinds {
		if at := path + " " + kind; !s.ignored[at] {
			s.ignored[at] = true
			s.config.Log.Debug("ignored an object", "file", path, "kind", kind)
		}
	}
}

// capturedIn takes from each node's status the pods of that node: an agent speaks for no others.
func (s *Source) capturedIn(contents *dataplane.Contents) (captured, udp map[string]bool) {
	nodes := make(map[string]string, len(contents.Workloads))
	for i := range contents.Workloads {
		nodes[contents.Workloads[i].UID] = contents.Workloads[i].Node
	}
	captured, udp = make(map[string]bool), make(map[string]bool)
	for _, e := range s.nodes.files {
		for set, uids := range map[*map[string]bool][]string{&captured: e.value.Captured, &udp: e.value.UDP} {
			for _, uid := range uids {
				if node, known := nodes[uid]; known && node == e.value.Node {
					(*set)[uid] = true
				}
			}
		}
	}
	return captured, udp
}

// report makes problems the current ones and logs what is new among them, and what is solved.
func (s *Source) report(problems []problem) {
	slices.SortStableFunc(problems, func(a, b problem) int {
		if c := strings.Compare(a.file, b.file); c != 0 {
			return c
		}
		return a.line - b.line
	})
	problems = slices.Compact(problems)
	s.mu.Lock()
	before := s.problems
	s.problems = problems
	s.mu.Unlock()
	if slices.Equal(before, problems) {
		return
	}
	for _, p := range problems {
		if !slices.Contains(before, p) {
			s.config.Log.Warn("problem in the cluster directory", "file", p.file, "line", p.line, "cause", p.cause)
		}
	}
	for _, p := range before {
		if !slices.Contains(problems, p) {
			s.config.Log.Info("problem solved", "file", p.file, "line", p.line, "cause", p.cause)
		}
	}
	if s.config.OnProblems != nil {
		s.config.OnProblems(s.Problems())
	}
}
