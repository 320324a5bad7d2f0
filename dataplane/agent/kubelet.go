package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/kubelet"
)

// recognizer is the part of the data plane that lets the kubelet's probes through.
type recognizer interface {
	SetKubelet(k kernel.Kubelet) error
	MissKubelet(cause error)
}

// watchKubelet has the data plane recognise the node's kubelet, until ctx ends.
func (a *Agent) watchKubelet(ctx context.Context) (err error) {
	log := a.cfg.Log.With("part", "kubelet")
	if a.cfg.KubeletCgroup == KubeletNone {
		if err := a.datapath.ForgetKubelet(); err != nil {
			log.Error("an earlier agent's kubelet is still let through", "error", err)
		}
		return nil
	}
	c := kubelet.Config{Proc: a.cfg.HostProc, HostNetNS: a.cfg.HostNetNS}
	if a.cfg.KubeletCgroup == KubeletAuto {
		root, release, err := kernel.CgroupRoot(a.cfg.CgroupRoot)
		if err != nil {
			return fmt.Errorf("find the kubelet: cgroup v2 root: %w", err)
		}
		defer func() { err = errors.Join(err, release()) }()
		c.CgroupRoot = root
	} else {
		c.Cgroup = a.cfg.KubeletCgroup
	}
	c.Watch(ctx, func(p kubelet.Place, err error) { recognize(a.datapath, log, p, err) })
	return nil
}

// recognize tells the data plane what was found, and people what comes of it.
func recognize(d recognizer, log *slog.Logger, p kubelet.Place, err error) {
	if err != nil {
		d.MissKubelet(err)
		log.Warn("the kubelet's probes may count as plaintext", "error", err)
		return
	}
	err = d.SetKubelet(kernel.Kubelet{Cgroup: p.Cgroup, PID: p.PID, WithPods: p.WithPods})
	switch {
	case errors.Is(err, os.ErrClosed): // the mesh was taken off the node
	case err != nil:
		log.Warn("the kubelet's probes count as plaintext", "cgroup", p.Path, "error", err)
	case p.PID == 0 && p.Others > 0:
		log.Warn("every process of a cgroup counts as the kubelet", "cgroup", p.Path)
	default:
		log.Info("the kubelet's probes are let through", "cgroup", p.Path, "pid", p.PID)
	}
}
