package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/discovery"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/kernelpath"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
	"github.com/raceway-mesh/raceway/dataplane/sandbox"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// maxBackoff is the longest pause between two tries to get a certificate or to enrol a pod:
// how long after the CA is back the last pod is served again.
const maxBackoff = 10 * time.Second

// Agent serves one node.
type Agent struct {
	cfg Config

	store      dataplane.Store
	source     discovery.Source
	publisher  discovery.Publisher
	sandboxes  discovery.Sandboxes // nil when new pods are not told of
	cluster    cluster             // nil without an API server
	keeper     *certs.Keeper
	registry   *prometheus.Registry
	telemetry  *telemetry.Telemetry
	proxy      *proxy.Proxy
	datapath   *kernel.Datapath
	pods       *pods
	udp        *udpKeeper
	paths      *kernelpath.Paths // of connections within the node; nil while another agent has it
	reconciler *enroll.Reconciler
	plugin     *plugin // nil when none is installed
	ready      readiness

	released atomic.Bool // the mesh is being taken off; for good
	unloaded atomic.Bool // and the data plane is

	parts   []func(context.Context) error // what connections rely on
	leads   []func(context.Context) error // what only the agent that has the node does
	closers []io.Closer                   // what was acquired, in that order

	succession

	// stopServing ends the pods' serving gracefully, cutServing at once.
	stopServing, cutServing context.CancelFunc
}

// New loads programs, opens files and sockets, and adopts what an earlier agent left in
// force; traffic flows once Run runs. Where another agent serves the node, and cfg has it taken
// over, that is left to Run. Close releases it.
func New(cfg Config) (*Agent, error) { return newAgent(cfg, nil) }

// newAgent is New; earlier is the agent of this process that had the node before.
func newAgent(cfg Config, earlier *Agent) (_ *Agent, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	a := &Agent{cfg: cfg.withDefaults(), registry: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	a.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	a.ready.set(errNoView)
	a.run(a.lookForNode, a.boundMemory, a.manageHeap)
	a.lead(a.watchPods, a.watchKubelet, a.becomeReady)
	steps := []func() error{a.newDiscovery, a.newCertificates, a.newTelemetry, a.newProxy}
	if err := a.meet(earlier); err != nil {
		return nil, err
	}
	if !a.waits() {
		// The socket comes first: an agent that serves this node already is to be noticed
		// before anything else is touched.
		steps = slices.Concat([]func() error{a.newAdmin}, steps, a.takeSteps())
	}
	if err := inOrder(steps); err != nil {
		return nil, err
	}
	return a, nil
}

func inOrder(steps []func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// takeSteps acquire what one agent of a node at a time can have, beside the admin socket.
func (a *Agent) takeSteps() []func() error {
	return []func() error{a.newMetrics, a.newCapture, a.newKernelPath, a.newPlugin, a.newListener}
}

func (a *Agent) newAdmin() error {
	api, err := admin.New(admin.Config{Socket: a.cfg.Socket, Backend: backend{a}, Log: a.cfg.Log.With("part", "admin")})
	if err != nil {
		return err
	}
	a.own(api)
	a.lead(api.Run)
	return nil
}

// own has Close close what was acquired, last first.
func (a *Agent) own(c io.Closer) { a.closers = append(a.closers, c) }

// run has Run run parts, until the last connection has ended.
func (a *Agent) run(parts ...func(context.Context) error) { a.parts = append(a.parts, parts...) }

// lead has Run run parts for as long as the agent has the node.
func (a *Agent) lead(parts ...func(context.Context) error) { a.leads = append(a.leads, parts...) }

func (a *Agent) newCertificates() (err error) {
	log := a.cfg.Log.With("part", "certs")
	roots, err := certs.NewFileRoots(a.cfg.CARootFile, a.cfg.TrustDomain, log)
	if err != nil {
		return err
	}
	a.own(roots)
	a.run(roots.Run)
	config := certs.Config{Roots: roots, TrustDomain: a.cfg.TrustDomain, TTL: a.cfg.CertTTL, MaxBackoff: maxBackoff, Log: log}
	if a.cfg.CRLFile != "" {
		revocations, err := certs.NewFileRevocations(a.cfg.CRLFile, log)
		if err != nil {
			return err
		}
		a.own(revocations)
		a.run(revocations.Run)
		config.Revocations = revocations
	}
	// It is read anew at every call; that it cannot be read now means a wrong path.
	if _, err := os.ReadFile(a.cfg.CATokenFile); err != nil {
		return fmt.Errorf("token for the CA: %w", err)
	}
	signer, err := istio.NewClient(istio.ClientConfig{
		Address: a.cfg.CAAddress, ServerName: a.cfg.CAName,
		RootFile: a.cfg.CARootFile, TokenFile: a.cfg.CATokenFile, Cluster: a.cfg.ClusterID,
	})
	if err != nil {
		return err
	}
	a.own(signer)
	config.Signer = signer
	if a.keeper, err = certs.New(config); err != nil {
		return err
	}
	a.run(a.keeper.Run)
	return nil
}

func (a *Agent) newMetrics() (err error) {
	if a.cfg.MetricsAddress == "" {
		return nil
	}
	if a.metrics, err = listenMetrics(a.cfg.MetricsAddress, a.registry, a.ready.get); err != nil {
		return err
	}
	a.own(a.metrics)
	a.run(a.metrics.Run)
	return nil
}

func (a *Agent) newTelemetry() (err error) {
	a.telemetry, err = telemetry.New(telemetry.Config{
		Registerer: a.registry, Store: &a.store, Cluster: a.cfg.ClusterID,
		AccessLog: a.cfg.AccessLog, Interval: a.cfg.FlowInterval, Log: a.cfg.Log.With("part", "telemetry"),
	})
	if err != nil {
		return err
	}
	a.run(a.telemetry.Run)
	sources := telemetry.Sources{
		Pods: a.podStates, Certificates: a.certificateExpiry, Pool: func() telemetry.Pool { return a.proxy.Pool() }, Hooks: a.hookCounters,
	}
	if a.cluster != nil {
		sources.Staleness = a.cluster.Staleness
	}
	return a.telemetry.Attach(sources)
}

func (a *Agent) newProxy() (err error) {
	var reset *[32]byte
	if a.cfg.UDP {
		if reset, err = resetKey(a.cfg.StateDir); err != nil {
			return err
		}
	}
	a.proxy, err = proxy.New(proxy.Config{
		Node: a.cfg.Node, Store: &a.store, Certs: a.keeper, Telemetry: a.telemetry,
		Limits: a.cfg.Limits, Cluster: a.cfg.ClusterID, KernelPath: offers{a}, UDP: a.cfg.UDP, CountQUICDrops: a.cfg.CountQUICDrops, ResetKey: reset, Log: a.cfg.Log.With("part", "proxy"),
	})
	if err != nil {
		return err
	}
	a.run(a.proxy.Run)
	return nil
}

func (a *Agent) newCapture() (err error) {
	a.datapath, err = kernel.Open(a.cfg.kernel())
	if err != nil {
		return err
	}
	a.own(a.datapath)
	serve, stop := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	a.stopServing, a.cutServing = stop, cut
	a.pods = &pods{
		datapath: a.datapath, keeper: a.keeper, proxy: a.proxy, publisher: a.publisher,
		log: a.cfg.Log.With("part", "pods"), serve: serve, force: force, served: map[string]*servedPod{},
		adoptedUDP: map[string]bool{}, translations: newTranslations(a.datapath),
	}
	a.newUDP()
	a.own(a.pods)
	if a.cluster != nil {
		a.pods.finder = sandbox.New(sandbox.Config{Proc: a.cfg.HostProc, HostNetNS: a.cfg.HostNetNS, Log: a.pods.log})
	}
	var adopted []enroll.Adopted
	for _, p := range a.datapath.Adopted() {
		// Whatever it had come to, others may hold it for captured: it stays published
		// until its release says otherwise.
		adopted = append(adopted, enroll.Adopted{UID: p.UID, NetNS: p.NetNS, Published: true})
		a.pods.adoptedUDP[p.UID] = p.UDP
	}
	a.reconciler, err = enroll.New(enroll.Config{
		Node: a.cfg.Node, Store: &a.store, Target: a.pods, RequireNetNS: a.pods.finder == nil, Adopted: adopted,
		Settle: a.cfg.Settle, Grace: a.cfg.Grace, MaxDrainAll: a.cfg.DrainTimeout, BackoffMax: maxBackoff, Log: a.cfg.Log.With("part", "enroll"),
	})
	return err
}

// newPlugin starts nothing: the plugin is answered, and put on the node, once there are answers.
func (a *Agent) newPlugin() error {
	if !a.cfg.CNI.enabled() {
		return nil
	}
	a.plugin = newPlugin(a.cfg, &a.store, arrivals{a})
	a.lead(a.plugin.Run)
	return nil
}

// Run serves the node until ctx ends, then lets live connections go on for the drain
// timeout. Pods stay captured, and closed, for the next agent. When a successor takes the node
// over, Run goes on until ctx ends or no connection is left; see Serve.
func (a *Agent) Run(ctx context.Context) error {
	// Connections live on while the node drains, and so must what they rely on.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	background, parts := errgroup.WithContext(parts)
	for _, part := range a.parts {
		background.Go(func() error { return part(parts) })
	}
	had := len(a.parts)
	err := a.takeOver(ctx)
	for _, part := range a.parts[had:] {
		background.Go(func() error { return part(parts) })
	}
	if err == nil && ctx.Err() == nil {
		err = a.reign(ctx, parts)
	}
	stopParts()
	err = errors.Join(err, background.Wait())
	if a.released.Load() { // discovery may have written since
		err = errors.Join(err, removeFile(a.cfg.SnapshotFile))
	}
	return err
}

// drain stops accepting, waits for live connections within the drain timeout, and cuts the rest.
func (a *Agent) drain(ctx context.Context) {
	a.cfg.Log.Info("draining", "connections", a.telemetry.Live(), "timeout", a.cfg.DrainTimeout)
	a.stopServing()
	timeout, cancel := context.WithTimeout(ctx, a.cfg.DrainTimeout)
	defer cancel()
	stop := context.AfterFunc(timeout, a.cutServing)
	defer stop()
	a.pods.wait()
}

// Close releases what New acquired and leaves the pods captured. Run has returned.
func (a *Agent) Close() error {
	var errs []error
	if a.pods != nil {
		a.stopServing()
		a.cutServing()
		a.pods.wait()
	}
	for _, c := range slices.Backward(a.closers) {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
