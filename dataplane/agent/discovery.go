package agent

import (
	"context"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
)

// cluster is what an API server is to the agent beside a source of snapshots.
type cluster interface {
	discovery.Source
	discovery.Publisher
	discovery.Sandboxes
	// RemoveTaint takes the startup taint from the agent's node.
	RemoveTaint(ctx context.Context) error
	// MarkReleased says on the agent's own pod that its node is released.
	MarkReleased(ctx context.Context) error
	// Staleness is for how long the API server has not answered; 0 while it does.
	Staleness() time.Duration
}

func (a *Agent) newDiscovery() error {
	if a.cfg.ClusterDir == "" {
		return a.newCluster()
	}
	source, err := file.New(file.Config{
		Dir: a.cfg.ClusterDir, StatusDir: a.cfg.StatusDir,
		TrustDomain: a.cfg.TrustDomain, RootNamespace: a.cfg.RootNamespace,
		Log: a.cfg.Log.With("part", "discovery"),
	})
	if err != nil {
		return err
	}
	publisher, err := file.NewPublisher(a.cfg.StatusDir, a.cfg.Node)
	if err != nil {
		return err
	}
	a.source, a.publisher = source, publisher
	a.discover()
	return nil
}

// discover has Run run the source.
func (a *Agent) discover() {
	a.run(func(ctx context.Context) error { return a.source.Run(ctx, &a.store) })
}
