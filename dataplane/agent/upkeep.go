package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// watchInterval is how often the pods' network namespaces are looked for. Nothing tells of
// their end: the kernel keeps them for as long as the agent has sockets in them.
const watchInterval = time.Second

const (
	// pruneRounds is in how many rounds of that connections older than their pod's enrolment are
	// looked up, so that the guard forgets those that ended.
	pruneRounds = 30
	// openingRounds is the same for those that were not answered yet, whose SYNs pass the guard.
	openingRounds = 2
	// orphansAge is how long after a predecessor has ended, or is about to, none of its flows of UDP
	// is in use any more.
	orphansAge = 10 * time.Second
)

// repairInterval is how often it is made sure that what capture rests on is still there.
// Rules, routes and sysctls of a pod can be changed by whoever has CAP_NET_ADMIN in it, and
// links by any root of the node. A look at one pod takes a millisecond or two.
const repairInterval = 10 * time.Second

// repair puts back what was taken from the capture, until ctx ends.
func (a *Agent) repair(ctx context.Context) {
	ticker := time.NewTicker(repairInterval)
	defer ticker.Stop()
	r := repairs{log: a.cfg.Log.With("part", "repair"), count: a.telemetry.Repaired}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			things := map[string]repairable{a.cfg.Node: a.datapath}
			for _, s := range a.pods.all() {
				things[s.UID()] = s.Pod
			}
			r.round(things)
		}
	}
}

// repairable is a part of the data plane that can be put in order: Repair says what was
// missing and is there again.
type repairable interface {
	Repair() (mended []string, err error)
}

// repairs tells what was put back, and once what cannot be.
type repairs struct {
	log     *slog.Logger
	count   func(part string)
	trouble map[string]string
}

func (r *repairs) round(things map[string]repairable) {
	trouble := make(map[string]string)
	for name, thing := range things {
		mended, err := thing.Repair()
		for _, part := range mended {
			name, _, _ := strings.Cut(part, ":")
			r.count(name)
		}
		if len(mended) > 0 {
			r.log.Warn("put back what somebody took from the capture", "of", name, "missing", strings.Join(mended, "; "))
		}
		if err == nil || errors.Is(err, net.ErrClosed) { // its listeners are closed first when a pod is released
			continue
		}
		trouble[name] = err.Error()
		if r.trouble[name] != trouble[name] {
			r.log.Error("the capture is not whole, and cannot be repaired", "of", name, "error", err)
		}
	}
	r.trouble = trouble
}

// lookForNode warns once if the first view of the cluster knows nothing of this node.
func (a *Agent) lookForNode(ctx context.Context) error {
	for {
		s, changed := a.store.Load()
		if s != nil {
			if err := knowsNode(s, a.cfg.Node); err != nil {
				a.cfg.Log.Warn("this agent has no pod to serve", "error", err)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// knowsNode is for a --node that is misspelt: nothing else would tell.
func knowsNode(s *dataplane.Snapshot, node string) error {
	workloads := s.Workloads()
	if s.Node(node) != nil || slices.ContainsFunc(workloads, func(w dataplane.Workload) bool { return w.Node == node }) {
		return nil
	}
	return fmt.Errorf("the cluster has no node %q and no pod on it: --node must be the name in the pods' spec.nodeName", node)
}

// watchPods tells enrolment of pods whose network namespace is gone, or a listener in it, and
// lets the kernel forget connections and flows that have ended. One timer does for all of it, so
// that it wakes a node at rest once.
func (a *Agent) watchPods(ctx context.Context) error {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var accompanied time.Time // when there was another agent that had the node before, last
	if a.waits() {            // it may be on its way out before the first round
		accompanied = time.Now()
	}
	for round := 1; ; round++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for _, uid := range a.pods.vanished() {
			a.reconciler.Vanished(uid)
		}
		for uid, err := range a.pods.deaf() {
			a.reconciler.Broken(uid, err)
		}
		all := round%pruneRounds == 0
		if all || round%openingRounds == 0 {
			a.pods.prune(func(s *servedPod) bool { return all || s.Opening() > 0 })
		}
		a.pods.forgetLaterTranslations()
		if a.canGiveBack() {
			accompanied = time.Now()
		}
		if time.Since(accompanied) >= orphansAge {
			if err := a.datapath.ForgetOrphans(); err != nil {
				a.cfg.Log.Warn("prune flows of UDP", "err", err)
			}
		}
	}
}
