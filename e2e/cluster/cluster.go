package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/e2e/cluster/image"
	"github.com/raceway-mesh/raceway/e2e/cluster/parts"
)

// Config says what cluster to make. The zero value is two nodes on IPv4.
type Config struct {
	// Nodes is how many; default 2, at most 9.
	Nodes int
	// IPFamilies of nodes, pods and services; default IPv4.
	IPFamilies IPFamilies
	// CNI is "bridge", the default, or "none": nodes are not ready until something in the
	// cluster writes a CNI configuration.
	CNI string
	// ProxyMode of kube-proxy: "nftables", the default, "iptables", or "none".
	ProxyMode string
	// Taints of nodes when they register, as key=value:effect.
	Taints []string
	// Log tells what the cluster does; default nothing.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Nodes == 0 {
		c.Nodes = 2
	}
	if c.CNI == "" {
		c.CNI = "bridge"
	}
	if c.ProxyMode == "" {
		c.ProxyMode = "nftables"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.Nodes < 0 || c.Nodes > 9 {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to 9", c.Nodes))
	}
	if !slices.Contains([]string{"", "bridge", "none"}, c.CNI) {
		errs = append(errs, fmt.Errorf("CNI %q: want bridge or none", c.CNI))
	}
	if !slices.Contains([]string{"", "nftables", "iptables", "none"}, c.ProxyMode) {
		errs = append(errs, fmt.Errorf("proxy mode %q: want nftables, iptables or none", c.ProxyMode))
	}
	return errors.Join(errs...)
}

// Cluster stands until Close.
type Cluster struct {
	config  Config
	parts   parts.Parts
	lock    *lock
	control *control
	nodes   []*Node

	closing  sync.Once
	closeErr error
}

// Start makes a cluster whose nodes are ready and which answers names. It needs root and the
// parts (parts.ErrNotBuilt), and waits while there is another cluster on this machine.
func Start(ctx context.Context, config Config) (_ *Cluster, err error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("start a cluster: namespaces and mounts need root: run this with sudo")
	}
	c := &Cluster{config: config.withDefaults()}
	if c.parts, err = parts.Find(ctx); err != nil {
		return nil, err
	}
	if c.lock, err = acquire(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := clean(); err != nil {
		return nil, err
	}
	start := time.Now()
	if err := c.prepare(ctx); err != nil {
		return nil, fmt.Errorf("prepare a cluster: %w", err)
	}
	if err := c.up(ctx); err != nil {
		return nil, fmt.Errorf("start a cluster: %w", err)
	}
	c.config.Log.Info("the cluster is up", "nodes", c.config.Nodes, "families", c.config.IPFamilies, "seconds", time.Since(start).Seconds())
	return c, nil
}

// pauseRef is the image of every pod's first container.
const pauseRef = "images.test/pause:1"

func (c *Cluster) bin(program string) string { return filepath.Join(stateDir, "bin", program) }
func (c *Cluster) pauseTar() string          { return filepath.Join(stateDir, "images", "pause.tar") }

func (c *Cluster) dnsTar() string { return filepath.Join(stateDir, "images", "coredns.tar") }

// prepare makes the directories, programs and images.
func (c *Cluster) prepare(ctx context.Context) error {
	for _, dir := range []string{"bin", "images", "log"} {
		if err := os.MkdirAll(filepath.Join(stateDir, dir), 0o755); err != nil {
			return err
		}
	}
	if err := Build(ctx, c.bin(""), "./cmd/node", "./pause"); err != nil {
		return err
	}
	return errors.Join(
		image.Write(c.pauseTar(), image.Spec{
			Ref: pauseRef, Files: map[string]string{"/bin/pause": c.bin("pause")}, Entrypoint: []string{"/bin/pause"},
		}),
		image.Write(c.dnsTar(), image.Spec{
			Ref: dnsRef, Files: map[string]string{"/bin/coredns": c.parts.CoreDNS()}, Entrypoint: []string{"/bin/coredns"},
		}))
}

// Build builds static programs of this module into a directory. They are named as from the
// directory of this package.
func Build(ctx context.Context, dir string, programs ...string) error {
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + "/"}
	for _, p := range programs {
		args = append(args, "github.com/raceway-mesh/raceway/"+filepath.Join("e2e/cluster", p))
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %v: %w\n%s", programs, err, out)
	}
	return nil
}

// up starts control plane and nodes side by side, and waits for all of it.
func (c *Cluster) up(ctx context.Context) (err error) {
	if c.control, err = newControl(c); err != nil {
		return err
	}
	if err := errors.Join(c.control.startEtcd(), c.control.startAPI()); err != nil {
		return err
	}
	for i := 1; i <= c.config.Nodes; i++ {
		n, err := c.newNode(i)
		if err != nil {
			return err
		}
		c.nodes = append(c.nodes, n)
		if err := n.boot(); err != nil {
			return err
		}
	}
	if err := c.control.awaitAPI(ctx); err != nil {
		return err
	}
	if err := c.control.startControllers(); err != nil {
		return err
	}
	// Kubelets register at the same time: on the server, one does not get into the other's way.
	manifest := strings.NewReader(c.nodeObjects() + dnsManifest(c.plans()))
	if _, err := c.kubectl(ctx, manifest, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
		return err
	}
	if c.config.CNI == "none" {
		return c.awaitRegistration(ctx)
	}
	if err := c.AwaitNodes(ctx); err != nil {
		return err
	}
	if err := c.LoadImage(ctx, c.dnsTar()); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=60s"); err != nil {
		return fmt.Errorf("wait for DNS: %w", err)
	}
	// Without it no pod is admitted.
	_, err = c.Kubectl(ctx, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	return err
}

func (c *Cluster) plans() []plan { return c.config.IPFamilies.plans() }

func (c *Cluster) apiURL() string {
	return "https://" + netip.AddrPortFrom(c.plans()[0].host(0), apiPort).String()
}

// Nodes lists the nodes, node1 first.
func (c *Cluster) Nodes() []*Node { return slices.Clone(c.nodes) }

// Node returns node<number>, counted from 1, and panics when there is none.
func (c *Cluster) Node(number int) *Node { return c.nodes[number-1] }

// LoadImage gives an image's tar to every node that is on.
func (c *Cluster) LoadImage(ctx context.Context, tar string) error {
	errs := make([]error, len(c.nodes))
	var loads sync.WaitGroup
	for i, n := range c.nodes {
		if n.On() {
			loads.Go(func() { errs[i] = n.load(ctx, tar) })
		}
	}
	loads.Wait()
	return errors.Join(errs...)
}

// Logs are the ends of what the processes of the cluster have written.
func (c *Cluster) Logs() string {
	files, _ := filepath.Glob(filepath.Join(stateDir, "log", "*.log")) // the pattern is good
	for _, n := range c.nodes {
		found, _ := filepath.Glob(n.Disk("/var/log/*.log")) // as above
		files = append(files, found...)
	}
	var logs string
	for _, f := range files {
		logs += filepath.Dir(f) + "/" + tail(f) + "\n"
	}
	return logs
}

// Dir holds everything of the cluster.
func (c *Cluster) Dir() string { return stateDir }

// Close ends everything and removes it. It may be called again.
func (c *Cluster) Close() error {
	c.closing.Do(func() { c.closeErr = c.close() })
	return c.closeErr
}

func (c *Cluster) close() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, c.StopNode(n))
	}
	if c.control != nil {
		errs = append(errs, c.control.close())
	}
	return errors.Join(append(errs, clean(), c.lock.release())...)
}
