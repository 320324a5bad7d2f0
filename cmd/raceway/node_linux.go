package main

import (
	"context"

	nodeagent "github.com/raceway-mesh/raceway/dataplane/agent"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

func (r *nodeRelease) run(ctx context.Context) (removed []string, err error) {
	return nodeagent.ReleaseNode(ctx, nodeagent.ReleaseConfig{
		Kernel:       kernel.Config{Dir: r.bpfDir, StateDir: r.stateDir},
		CNI:          r.cni(),
		SnapshotFile: r.snapshotFile,
		Files:        []string{r.agentSocket, r.cniSocket},
	})
}

func (r *nodeRelease) cni() nodeagent.CNIConfig {
	if r.cniConfDir == "" {
		return nodeagent.CNIConfig{}
	}
	return nodeagent.CNIConfig{ConfDir: r.cniConfDir, BinDir: r.cniBinDir, StateDir: r.cniStateDir}
}
