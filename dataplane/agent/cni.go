package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
	"github.com/raceway-mesh/raceway/cni-plugin/install"
	"github.com/raceway-mesh/raceway/cni-plugin/node"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/sandbox"
)

// CNIConfig says where the CNI plugin goes on the host, and what it needs to decide by itself
// when the agent is away. Paths are as the agent sees them. Without directories there is none.
type CNIConfig struct {
	ConfDir     string // network configuration of the host
	BinDir      string // CNI plugins of the host
	HostConfDir string // ConfDir as the host sees it; default /etc/cni/net.d
	StateDir    string // the plugin's state, on the host at the same path; default /var/lib/raceway/cni
	Binary      string // the plugin, to copy from; default /usr/local/bin/raceway-cni
	Socket      string // where the plugin finds the agent; default /run/raceway/cni.sock

	APIServer string   // URL that the plugin asks while the agent is away
	APICAFile string   // PEM roots of APIServer
	TokenFile string   // the plugin's token for it; "" asks nobody
	Exempt    []string // namespaces whose pods start when nobody can be asked
}

func (c CNIConfig) enabled() bool { return c.ConfDir != "" }

func (c CNIConfig) validate() error {
	var errs []error
	if (c.ConfDir == "") != (c.BinDir == "") {
		errs = append(errs, errors.New("of the CNI directories, for configuration and for plugins, one is set and the other is not"))
	}
	if c.TokenFile != "" && (c.APIServer == "" || c.APICAFile == "") {
		errs = append(errs, errors.New("the CNI plugin has a token, and no API server or no roots of it"))
	}
	return errors.Join(errs...)
}

// installation is where the plugin is put, and found to be removed.
func (c CNIConfig) installation(namespace string, log *slog.Logger) install.Config {
	return install.Config{
		ConfDir: c.ConfDir, BinDir: c.BinDir, StateDir: c.StateDir, Binary: c.Binary, Log: log,
		Entry: conf.Entry{StateDir: c.StateDir, Socket: c.Socket, Namespace: namespace},
	}
}

const (
	// addTimeout is how long a new pod waits for its capture. The plugin waits a little longer (20 s),
	// and so hears why it is not in force.
	addTimeout = 18 * time.Second
	// stateInterval bounds how often the plugin's state is written.
	stateInterval = time.Second
	// tokenInterval is how often its token is read again.
	tokenInterval = time.Minute
	// retryInterval is how long after an error it is all tried again.
	retryInterval = 5 * time.Second
)

// plugin keeps the CNI plugin on the node, and answers it.
type plugin struct {
	cfg       CNIConfig
	node      string
	files     []string // the agent's own, that the plugin removes should it be left alone
	store     *dataplane.Store
	handler   node.Handler
	installer *install.Installer
	log       *slog.Logger
	where     install.Config

	keeping  context.Context // ends when the plugin is to go
	withdraw context.CancelFunc
	putting  sync.Mutex // held by who puts the plugin on the node, or removes it

	mu      sync.Mutex
	trouble error // of the last try
}

func newPlugin(cfg Config, store *dataplane.Store, handler node.Handler) *plugin {
	log := cfg.Log.With("part", "cni")
	p := &plugin{
		cfg: cfg.CNI, node: cfg.Node, store: store, handler: handler, log: log,
		where: cfg.CNI.installation(cfg.Pod.Namespace, log),
	}
	if cfg.SnapshotFile != "" {
		p.files = []string{cfg.SnapshotFile}
	}
	p.installer = install.New(p.where)
	p.keeping, p.withdraw = context.WithCancel(context.Background())
	return p
}

// Run answers the plugin and keeps it in place until ctx ends, and then leaves it there. An
// agent that cannot do it goes on with the pods that it has.
func (p *plugin) Run(ctx context.Context) error {
	if p.awaitSnapshot(ctx) {
		p.again(ctx, p.serve)
	}
	return nil
}

// again does something until it ends without an error, or ctx ends.
func (p *plugin) again(ctx context.Context, do func(context.Context) error) {
	for {
		p.note(nil)
		err := do(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		p.note(err)
		p.log.Error("new pods may not be captured before they start", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
	}
}

// awaitSnapshot waits until the plugin's questions have answers.
func (p *plugin) awaitSnapshot(ctx context.Context) bool {
	for ctx.Err() == nil {
		s, changed := p.store.Load()
		if s != nil {
			return true
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return false
}

// serve listens before the plugin is put where it is used.
func (p *plugin) serve(ctx context.Context) error {
	server, err := node.Listen(node.Config{Socket: p.cfg.Socket, Handler: p.handler, Log: p.log})
	if err != nil {
		return err
	}
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { return server.Run(ctx) })
	parts.Go(func() error { p.again(ctx, p.keep); return nil })
	return errors.Join(parts.Wait(), server.Close())
}

// keep writes the state and keeps the plugin installed until ctx ends or it is withdrawn.
func (p *plugin) keep(ctx context.Context) error {
	p.putting.Lock()
	defer p.putting.Unlock()
	s, _ := p.store.Load()
	if p.keeping.Err() != nil || s.Released() {
		return nil
	}
	// Without it nothing is installed.
	if err := p.writeState(s); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(p.keeping, stop)()
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { return p.writeStates(ctx) })
	parts.Go(func() error { return p.installer.Run(ctx) })
	return parts.Wait()
}

// remove takes the plugin off the node for good. New pods then start without being asked for.
func (p *plugin) remove() error {
	p.withdraw()
	p.putting.Lock()
	defer p.putting.Unlock()
	return install.Remove(p.where)
}

// writeStates keeps what the plugin decides by when the agent is away as new as the snapshot.
func (p *plugin) writeStates(ctx context.Context) error {
	for {
		s, changed := p.store.Load()
		if err := p.writeState(s); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(stateInterval):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(tokenInterval):
		}
	}
}

func (p *plugin) writeState(s *dataplane.Snapshot) error {
	api, err := p.api()
	if err != nil {
		return err
	}
	return install.WriteState(p.cfg.StateDir, install.State{
		API: api, ConfDir: p.cfg.HostConfDir, Files: p.files, Exempt: p.cfg.Exempt, Cluster: install.ClusterOf(s, p.node),
	})
}

func (p *plugin) api() (install.API, error) {
	if p.cfg.TokenFile == "" {
		return install.API{}, nil
	}
	roots, err := os.ReadFile(p.cfg.APICAFile)
	if err != nil {
		return install.API{}, fmt.Errorf("roots of the API server, for the CNI plugin: %w", err)
	}
	token, err := os.ReadFile(p.cfg.TokenFile)
	if err != nil {
		return install.API{}, fmt.Errorf("token of the CNI plugin: %w", err)
	}
	text := strings.TrimSpace(string(token))
	return install.API{Server: p.cfg.APIServer, CA: string(roots), Token: text, Expires: expiry(text)}, nil
}

// expiry is a token's claim exp (RFC 7519, section 4.1.4); zero when it has none, as those of
// Secrets.
func expiry(token string) time.Time {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Exp == 0 {
		return time.Time{}
	}
	return time.Unix(claims.Exp, 0).UTC()
}

func (p *plugin) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trouble = err
}

// ready reports why new pods do not go through the plugin.
func (p *plugin) ready() error {
	p.mu.Lock()
	err := p.trouble
	p.mu.Unlock()
	if err == nil && !p.installer.InPlace() {
		for _, problem := range p.installer.Problems() {
			err = errors.Join(err, errors.New(problem.String()))
		}
	}
	if err != nil {
		return fmt.Errorf("the CNI plugin is not in place: %w", err)
	}
	return nil
}

// check looks at what is on the node now, which ready has from its last look.
func (p *plugin) check() error {
	errs := []error{p.ready()}
	if errs[0] == nil {
		for _, problem := range install.Check(p.where) {
			errs = append(errs, errors.New(problem.String()))
		}
	}
	return errors.Join(errs...)
}

// arrivals is what the CNI plugin talks to: it captures pods before anything runs in them.
type arrivals struct {
	*Agent
}

var _ node.Handler = arrivals{}

// Add returns once nothing of the pod gets past the agent.
func (n arrivals) Add(ctx context.Context, s discovery.Sandbox) (captured bool, err error) {
	if n.released.Load() {
		return false, nil
	}
	if snapshot, _ := n.store.Load(); snapshot == nil {
		return false, node.ErrNotReady
	}
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	s.NetNS, s.Addrs = sandbox.Stable(s.NetNS), reported(s.Addrs)
	w, err := n.sandboxes.Started(ctx, s)
	if err != nil || !w.Enrolled {
		return false, err
	}
	if err := n.reconciler.Await(ctx, &w); err != nil {
		return false, err
	}
	return true, nil
}

// reported are the addresses that the kubelet will report: the first of each family. So the
// pod does not seem to change when the cluster comes to know them.
func reported(addrs []netip.Addr) []netip.Addr {
	var first []netip.Addr
	seen := make(map[int]bool)
	for _, a := range addrs {
		if a = a.Unmap(); !seen[a.BitLen()] {
			seen[a.BitLen()] = true
			first = append(first, a)
		}
	}
	return first
}

// Check looks at what Add left.
func (n arrivals) Check(ctx context.Context, s discovery.Sandbox) error {
	snapshot, _ := n.store.Load()
	if snapshot == nil {
		return node.ErrNotReady
	}
	w := snapshot.WorkloadNamed(s.Pod)
	if n.released.Load() || w == nil || !w.Enrolled {
		return nil
	}
	if st := n.reconciler.Status()[w.UID]; !st.InForce {
		return fmt.Errorf("capture of pod %s is not in force: %s", w.Name, st.Reason)
	}
	pod := n.pods.get(w.UID)
	if pod == nil {
		return fmt.Errorf("pod %s is not open", w.Name)
	}
	var errs []error
	for _, f := range pod.Check(ctx) {
		if !f.OK {
			errs = append(errs, fmt.Errorf("%s: %s", f.Check, f.Detail))
		}
	}
	return errors.Join(errs...)
}

// Del does not wait until the pod is cleaned up: its namespace goes, and all in it.
func (n arrivals) Del(_ context.Context, s discovery.Sandbox) error {
	n.sandboxes.Stopped(s.Pod, s.UID)
	return nil
}
