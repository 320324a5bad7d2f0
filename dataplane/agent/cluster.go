package agent

import "errors"

func (a *Agent) newCluster() error {
	return errors.New("the cluster directory is not set, and this agent cannot ask an API server yet")
}
