package kube

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// Source publishes snapshots of a cluster as its API server has it.
type Source struct {
	config   Config
	pace     pace
	released chan struct{} // closed once the mesh config says so

	changes signal // something to publish, see due
	repairs signal // an annotation of this node's pods is not as it is to be
	reports signal // the status of a policy may have to be written
	saves   signal // a snapshot was published

	// publishing keeps the annotations of this node's pods to one writer at a time.
	publishing sync.Mutex

	mu sync.Mutex
	// What the cluster has.
	set      object.Set
	faults   map[object.Key]string  // objects that cannot be taken as they are
	writing  map[object.Key]*policy // every policy, beside what the set understood of it
	pods     map[object.Key]podState
	fetched  map[object.Key]bool // what was asked for and no watch has shown
	releases bool                // latched: the pods' agents act on it once
	// What is known of it.
	synced map[object.Kind]bool
	stale  time.Time // when the file that stands in for the API server was written
	begun  time.Time // when Run began
	health health
	// What comes from the node itself.
	sandboxes map[dataplane.Name]*sandbox
	wanted    map[string]mark // by PublishCaptured; nil before its first call
	// What was published last.
	snapshot  *dataplane.Snapshot
	captured  map[string]bool
	udp       map[string]bool // those of captured that take UDP
	conflicts []object.Conflict
	due       schedule
	// edits counts the changes of policies, judged those that the last snapshot has.
	edits, judged int
}

// podState is what of a pod is not in the set.
type podState struct {
	uid       string
	created   time.Time
	annotated mark
	running   bool
}

// mark is what a pod is published as.
type mark struct {
	captured bool
	udp      bool // it takes UDP in tunnels as well
}

var (
	_ discovery.Source    = (*Source)(nil)
	_ discovery.Publisher = (*Source)(nil)
	_ discovery.Sandboxes = (*Source)(nil)
)

// New checks the configuration and reads the snapshot file. It does not talk to the API
// server, which may be away.
func New(config Config) (*Source, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("discovery from Kubernetes: %w", err)
	}
	config = config.withDefaults()
	if err := config.connect(); err != nil {
		return nil, fmt.Errorf("discovery from Kubernetes: %w", err)
	}
	s := &Source{
		config: config, pace: defaultPace(),
		released: make(chan struct{}),
		changes:  newSignal(), repairs: newSignal(), reports: newSignal(), saves: newSignal(),
		faults: make(map[object.Key]string), writing: make(map[object.Key]*policy),
		pods: make(map[object.Key]podState), fetched: make(map[object.Key]bool),
		synced: make(map[object.Kind]bool), sandboxes: make(map[dataplane.Name]*sandbox),
	}
	s.restore()
	return s, nil
}

// Run publishes to store until ctx ends, and then returns nil. It is called once.
func (s *Source) Run(ctx context.Context, store *dataplane.Store) error {
	s.mu.Lock()
	s.begun = time.Now()
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(s.quietly(ctx))
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	for _, r := range s.resources() {
		parts.Go(func() { s.reflect(ctx, r) })
	}
	parts.Go(func() { s.repair(ctx) })
	parts.Go(func() { s.save(ctx) })
	s.publishLoop(ctx, store)
	return nil
}

// publishLoop publishes what is due when it is due.
func (s *Source) publishLoop(ctx context.Context, store *dataplane.Store) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.changes:
		case <-timer.C:
		}
		wait, something := s.until(time.Now())
		switch {
		case !something:
		case wait > 0:
			timer.Reset(wait)
		default:
			s.publish(store)
			s.changes.give() // what changed meanwhile
		}
	}
}

// until tells how long what is due is to be left to gather.
func (s *Source) until(now time.Time) (wait time.Duration, something bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ready, known := s.readyLocked()
	if !known {
		return 0, false
	}
	at, something := s.due.at(s.pace)
	return max(at.Sub(now), ready.Sub(now)), something
}

// readyLocked tells since when, or from when on, something may be published: once every
// policy that there is is known, and all else. What the file tells is not the cluster of now:
// a peer that was captured since would be spoken to in clear. So an API server that answers
// is waited for, in reason.
func (s *Source) readyLocked() (at time.Time, known bool) {
	switch {
	case s.syncedLocked():
		return s.begun, true
	case s.stale.IsZero():
		return time.Time{}, false
	case !s.health.since.IsZero():
		return s.begun, true
	}
	return s.begun.Add(s.pace.trust), true
}

func (s *Source) syncedLocked() bool {
	want := 7
	if s.config.MeshConfig != (dataplane.Name{}) {
		want++
	}
	return len(s.synced) == want
}

func (s *Source) publish(store *dataplane.Store) {
	start := time.Now()
	s.mu.Lock()
	contents := s.contentsLocked()
	edits := s.edits
	s.due.done()
	s.mu.Unlock()
	snapshot := dataplane.NewSnapshot(contents)
	store.Publish(snapshot)
	s.mu.Lock()
	s.snapshot = snapshot
	s.due.published(start, time.Now())
	review := s.judged != edits
	s.judged = edits
	s.mu.Unlock()
	s.saves.give()
	if review {
		s.reports.give()
	}
	s.config.Log.Debug("published a snapshot", "workloads", len(contents.Workloads),
		"services", len(contents.Services), "captured", len(contents.Captured), "took", time.Since(start))
}

func (s *Source) contentsLocked() dataplane.Contents {
	contents, conflicts := s.set.Contents(s.config.mesh())
	contents.EnrollLabels = s.config.EnrollLabels
	contents.Released = s.releases
	contents.Stale = !s.stale.IsZero()
	s.conflicts = conflicts
	s.overlayLocked(contents.Workloads)
	s.captured, s.udp = s.capturedLocked(contents.Workloads)
	contents.Captured, contents.UDP = s.captured, s.udp
	return contents
}

// take takes in one object that a watch shows.
func (s *Source) take(it *item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changedLocked(s.takeLocked(it))
}

// takeLocked returns how soon what changed is to be published.
func (s *Source) takeLocked(it *item) urgency {
	if it.key.Kind == kindMeshConfig {
		return s.releaseLocked(it.released)
	}
	if it.fault != "" {
		if s.faults[it.key] != it.fault {
			s.faults[it.key] = it.fault
			s.config.Log.Warn("an object cannot be taken as it is: what was known of it stays", "object", it.key.String(), "cause", it.fault)
		}
		if pod, there := s.pods[it.key]; there && pod.uid != it.uid && !s.fetched[it.key] {
			how := s.dropLocked(it.key) // that was another pod
			s.faults[it.key] = it.fault
			return how
		}
		return never
	}
	if before := s.pods[it.key]; s.fetched[it.key] && it.uid != before.uid && it.created.Before(before.created) {
		return never // a watch lags behind: this is a predecessor of the pod that was asked for
	}
	delete(s.faults, it.key)
	delete(s.fetched, it.key)
	how := never
	if s.set.Put(it.object) {
		how = s.urgencyLocked(it.key)
	}
	switch {
	case it.key.Kind.IsPolicy():
		s.writing[it.key] = it.policy
		if how != never {
			s.edits++
		}
		s.reports.give()
	case it.key.Kind == object.KindPod:
		how = max(how, s.takePodLocked(it))
	}
	return how
}

// takePodLocked takes in what of a pod is not in the set.
func (s *Source) takePodLocked(it *item) urgency {
	how := never
	before := s.pods[it.key]
	now := podState{uid: it.uid, created: it.created, annotated: it.annotated, running: it.running}
	s.pods[it.key] = now
	if now.annotated != before.annotated || now.uid != before.uid {
		how = soon
	}
	if s.wanted != nil && s.ownLocked(it.key) && now.annotated != s.wanted[now.uid] {
		s.repairs.give()
	}
	if s.settleLocked(it.key) {
		how = urgent
	}
	return how
}

// drop forgets one object that a watch shows to be gone. A pod of its name that was asked
// for since stays.
func (s *Source) drop(key object.Key, uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key.Kind == object.KindPod && s.fetched[key] && s.pods[key].uid != uid {
		return
	}
	s.changedLocked(s.dropLocked(key))
}

func (s *Source) dropLocked(key object.Key) urgency {
	how := s.urgencyLocked(key)
	delete(s.faults, key)
	delete(s.writing, key)
	delete(s.fetched, key)
	if sb := s.sandboxes[key.Name]; key.Kind == object.KindPod && sb != nil && sb.UID == s.pods[key].uid {
		delete(s.sandboxes, key.Name)
	}
	delete(s.pods, key)
	if key.Kind.IsPolicy() {
		s.edits++
	}
	if !s.set.Delete(key) {
		return never
	}
	return how
}

// replace takes in all objects of a kind: what is not among them is gone.
func (s *Source) replace(kind object.Kind, items []*item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	how := never
	there := make(map[object.Key]bool, len(items))
	for _, it := range items {
		there[it.key] = true
		how = max(how, s.takeLocked(it))
	}
	for _, key := range s.set.KeysOf(kind) {
		// What was asked for may be newer than the list.
		if !there[key] && !s.fetched[key] {
			how = max(how, s.dropLocked(key))
		}
	}
	maps.DeleteFunc(s.faults, func(key object.Key, _ string) bool { return key.Kind == kind && !there[key] })
	if !s.synced[kind] {
		s.synced[kind] = true
		how = urgent
		if s.syncedLocked() {
			s.stale = time.Time{}
			s.config.Log.Info("the cluster is known", "pods", len(s.pods))
		}
	}
	s.changedLocked(how)
}

func (s *Source) changedLocked(how urgency) {
	if how == never {
		return
	}
	s.due.add(how, time.Now())
	s.changes.give()
}

// ownLocked reports whether the pod is one of this node.
func (s *Source) ownLocked(key object.Key) bool {
	o, _ := s.set.Get(key)
	w, _ := o.Workload()
	return w.Node == s.config.Node
}

// urgencyLocked tells how soon a change of that object is to be published.
func (s *Source) urgencyLocked(key object.Key) urgency {
	switch {
	case key.Kind.IsPolicy(), key.Kind == object.KindNamespace:
		return urgent
	case key.Kind == object.KindPod && s.ownLocked(key):
		return urgent
	default:
		return whenever
	}
}

// Problems lists what is wrong now. Safe for concurrent use.
func (s *Source) Problems() []discovery.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.health.problems()
	if !s.stale.IsZero() {
		list = append(list, discovery.Problem{Where: s.config.SnapshotFile, Cause: fmt.Sprintf(
			"the cluster as it was at %s is in force until the API server has told of all of it", s.stale.UTC().Format(time.RFC3339))})
	}
	for key, fault := range s.faults {
		list = append(list, discovery.Problem{Where: key.String(), Cause: fault})
	}
	for key := range s.writing {
		if o, _ := s.set.Get(key); o.Invalid() != "" {
			list = append(list, discovery.Problem{Where: key.String(), Cause: o.Invalid() + ": it is enforced as strictly as it can be meant"})
		}
	}
	for _, c := range s.conflicts {
		list = append(list, discovery.Problem{Where: c.Key.String(), Cause: c.Cause})
	}
	slices.SortFunc(list, func(a, b discovery.Problem) int {
		return cmp.Or(cmp.Compare(a.Where, b.Where), cmp.Compare(a.Cause, b.Cause))
	})
	return list
}
