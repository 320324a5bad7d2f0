package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
)

// takeOver is how long an agent that starts waits for pods that it should serve, before it
// says that it is ready all the same: one that cannot be served must not hold up an upgrade.
const takeOver = 30 * time.Second

// readyInterval is how often it is looked whether the agent is ready.
const readyInterval = 50 * time.Millisecond

// readiness is whether the agent does for its node what it is there for. It stays ready:
// what comes in between later is reported by checks and metrics.
type readiness struct {
	mu    sync.Mutex
	cause error // why it is not, nil when it is
}

func (r *readiness) set(cause error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cause = cause
}

func (r *readiness) get() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cause
}

var errNoView = errors.New("no complete view of the cluster yet")

// becomeReady waits for all that ready is to mean, and then lets pods come to the node.
func (a *Agent) becomeReady(ctx context.Context) error {
	ticker := time.NewTicker(readyInterval)
	defer ticker.Stop()
	var since time.Time
	left := map[string]bool{}
	for {
		s, _ := a.store.Load()
		if s != nil && since.IsZero() {
			since = time.Now()
			left = a.expected(s)
		}
		cause := a.unready(s, left, time.Since(since) < takeOver)
		a.ready.set(cause)
		if cause == nil {
			a.cfg.Log.Info("ready", "after", time.Since(since).Round(time.Millisecond))
			return a.removeTaint(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// expected are the pods of the node that an earlier agent captured or that are wanted, by UID.
func (a *Agent) expected(s *dataplane.Snapshot) map[string]bool {
	pods := map[string]bool{}
	for uid := range a.reconciler.Status() {
		pods[uid] = true
	}
	for _, w := range s.Workloads() {
		if w.Node == a.cfg.Node && w.Enrolled {
			pods[w.UID] = true
		}
	}
	return pods
}

// unready says what the agent waits for.
func (a *Agent) unready(s *dataplane.Snapshot, left map[string]bool, patient bool) error {
	if s == nil {
		return errNoView
	}
	if s.Released() {
		return nil
	}
	if a.plugin != nil {
		if err := a.plugin.ready(); err != nil {
			return err
		}
	}
	settle(left, s, a.reconciler.Status())
	if len(left) > 0 && patient {
		return fmt.Errorf("%d pods of this node are still to be served: %s", len(left), strings.Join(slices.Sorted(maps.Keys(left)), ", "))
	}
	return nil
}

// settle strikes off the pods that are served, that cannot be for a reason that is known, or
// that are not wanted any more.
func settle(left map[string]bool, s *dataplane.Snapshot, status map[string]enroll.Status) {
	maps.DeleteFunc(left, func(uid string, _ bool) bool {
		st, known := status[uid]
		w := s.Workload(uid)
		switch {
		case w == nil || !w.Enrolled:
			return true // nobody waits for its release
		case !known:
			return false
		}
		return st.InForce || st.State == dataplane.CaptureFailed
	})
}

// removeTaint lets pods be scheduled to the node, and says so once when it may not.
func (a *Agent) removeTaint(ctx context.Context) error {
	if a.cluster == nil || a.cfg.StartupTaint == "" {
		return nil
	}
	a.insist(ctx, "remove the node's startup taint", a.cluster.RemoveTaint)
	return nil
}

// insist does something until it succeeds or ctx ends. It reports whether it succeeded.
func (a *Agent) insist(ctx context.Context, deed string, do func(context.Context) error) bool {
	pause := 200 * time.Millisecond
	for told := ""; ; pause = min(2*pause, maxBackoff) {
		err := do(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			a.cfg.Log.Error("it is tried again", "deed", deed, "error", err)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}
