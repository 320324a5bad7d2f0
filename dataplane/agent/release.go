package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// enrol captures and releases the node's pods until ctx ends. Once the mesh is being taken
// off the cluster it only releases, whatever is asked for later, and then takes the agent's
// traces off the node:
//
//	serving ──released: "true"──► releasing ──no pod left──► removing ──► idle
//
// Going back takes another agent, that is a restart: half of the cluster may be clean by then.
func (a *Agent) enrol(ctx context.Context) error {
	wanted, stop := context.WithCancel(ctx)
	defer stop()
	var beside sync.WaitGroup
	beside.Go(func() { a.repair(wanted) })
	beside.Go(func() {
		if a.awaitRelease(wanted) {
			a.released.Store(true)
			stop()
		}
	})
	err := a.reconciler.Run(wanted)
	stop()
	beside.Wait() // a repair would put back what is removed
	if err != nil || !a.released.Load() || ctx.Err() != nil {
		return err
	}
	return a.leave(ctx)
}

func (a *Agent) awaitRelease(ctx context.Context) bool {
	for {
		s, changed := a.store.Load()
		if s != nil && s.Released() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

// leave releases every pod gently and removes what is on the node. It returns when ctx ends.
func (a *Agent) leave(ctx context.Context) error {
	a.cfg.Log.Warn("the mesh is being taken off the cluster: releasing every pod of this node")
	if err := a.reconciler.ReleaseAll(ctx); err != nil {
		return err
	}
	for _, step := range []struct {
		deed string
		do   func(context.Context) error
	}{
		{"remove the CNI plugin", a.removePlugin},
		{"remove the data plane", a.unload},
		{"remove the agent's files", a.removeFiles},
		{"say that this node is released", a.markReleased},
	} {
		if !a.insist(ctx, step.deed, step.do) {
			return fmt.Errorf("%s: %w", step.deed, context.Cause(ctx))
		}
	}
	a.cfg.Log.Warn("nothing of the mesh is left on this node; the agent can be stopped")
	<-ctx.Done()
	return nil
}

func (a *Agent) removePlugin(context.Context) error {
	if a.plugin == nil {
		return nil
	}
	return a.plugin.remove()
}

// unload falls back to what works without loaded programs: what Unload began it cannot end.
func (a *Agent) unload(context.Context) error {
	if a.unloaded.CompareAndSwap(false, true) {
		err := a.datapath.Unload()
		if err == nil {
			return nil
		}
		a.cfg.Log.Warn("unload the data plane", "error", err)
	}
	removed, err := kernel.Remove(a.cfg.kernel())
	for _, what := range removed {
		a.cfg.Log.Info("removed", "what", what)
	}
	return err
}

func (a *Agent) removeFiles(context.Context) error { return removeFile(a.cfg.SnapshotFile) }

func (a *Agent) markReleased(ctx context.Context) error {
	if a.cluster == nil {
		return nil
	}
	return a.cluster.MarkReleased(ctx)
}

func removeFile(path string) error {
	if path == "" {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
