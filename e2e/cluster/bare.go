package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"k8s.io/client-go/rest"

	"github.com/raceway-mesh/raceway/e2e/cluster/parts"
	"github.com/raceway-mesh/raceway/e2e/space"
)

// ControlPlane is etcd and an API server with nothing else: what is written to it stays as it
// is, of whatever size. It has a name of its own, so that it can be beside a Cluster.
type ControlPlane struct {
	c *Cluster
}

// StartControlPlane makes one that answers, in a directory that is empty or not there. It
// needs root and the parts (parts.ErrNotBuilt). Close removes the directory.
func StartControlPlane(ctx context.Context, name, dir string) (_ *ControlPlane, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start a control plane: network namespaces need root: run this with sudo")
	}
	c := &Cluster{config: Config{Log: slog.New(slog.DiscardHandler)}}
	if c.parts, err = parts.Find(ctx); err != nil {
		return nil, err
	}
	c.control = &control{c: c, dir: filepath.Join(dir, "control"), logs: dir}
	p := &ControlPlane{c}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start a control plane: %w", err), p.Close())
		}
	}()
	if err := os.MkdirAll(c.control.dir, 0o700); err != nil {
		return nil, err
	}
	if c.control.space, err = space.New(name); err != nil {
		return nil, err
	}
	if err := errors.Join(c.control.wire(), c.control.writeCredentials()); err != nil {
		return nil, err
	}
	if err := errors.Join(c.control.startEtcd(), c.control.startAPI()); err != nil {
		return nil, err
	}
	return p, c.control.awaitAPI(ctx)
}

// RESTConfig calls the API server as the administrator, from any namespace.
func (p *ControlPlane) RESTConfig() *rest.Config { return p.c.RESTConfig() }

// Kubeconfig is the administrator's. It is of use from the network namespace (Start).
func (p *ControlPlane) Kubeconfig() string { return p.c.Kubeconfig() }

// Kubectl runs kubectl as the administrator and returns its output.
func (p *ControlPlane) Kubectl(ctx context.Context, args ...string) (string, error) {
	return p.c.Kubectl(ctx, args...)
}

// Apply applies YAML, one document or many.
func (p *ControlPlane) Apply(ctx context.Context, manifest string) error {
	return p.c.Apply(ctx, manifest)
}

// Start starts a command in the network namespace. The caller waits for it.
func (p *ControlPlane) Start(cmd *exec.Cmd) error { return p.c.control.space.NS.Do(cmd.Start) }

// Processes are the ids of the API server and of etcd.
func (p *ControlPlane) Processes() (api, etcd int) { return p.c.control.api.pid, p.c.control.etcd.pid }

// Close ends everything and removes it. It may be called again.
func (p *ControlPlane) Close() error {
	ctl := p.c.control
	return errors.Join(ctl.close(), os.RemoveAll(filepath.Dir(ctl.dir)))
}
