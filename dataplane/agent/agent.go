package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/istio"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/dataplane/discovery/file"
	"github.com/raceway-mesh/raceway/dataplane/enroll"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/proxy"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// pruneInterval is how often connections older than their pod's enrolment are looked up, so
// that the guard forgets those that ended.
const pruneInterval = 30 * time.Second

// watchInterval is how often the pods' network namespaces are looked for. Nothing tells of
// their end: the kernel keeps them for as long as the agent has sockets in them.
const watchInterval = time.Second

// Agent serves one node.
type Agent struct {
	cfg Config

	store       dataplane.Store
	source      *file.Source
	roots       *certs.FileRoots
	revocations *certs.FileRevocations // nil without a CRL
	signer      *istio.Client
	keeper      *certs.Keeper
	registry    *prometheus.Registry
	telemetry   *telemetry.Telemetry
	proxy       *proxy.Proxy
	datapath    *kernel.Datapath
	pods        *pods
	reconciler  *enroll.Reconciler
	admin       *admin.Server
	metrics     *metricsServer // nil without an address

	// stopServing ends the pods' serving gracefully, cutServing at once.
	stopServing, cutServing context.CancelFunc
}

// New loads programs, opens files and sockets, and adopts what an earlier agent left in
// force; traffic flows once Run runs. Close releases it.
func New(cfg Config) (_ *Agent, err error) {
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
	// The socket comes first: an agent that serves this node already is to be noticed
	// before anything of its capture is touched.
	if a.admin, err = admin.New(admin.Config{Socket: a.cfg.Socket, Backend: backend{a}, Log: a.cfg.Log.With("part", "admin")}); err != nil {
		return nil, err
	}
	for _, step := range []func() error{a.newDiscovery, a.newCertificates, a.newTelemetry, a.newProxy, a.newCapture} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (a *Agent) newDiscovery() (err error) {
	a.source, err = file.New(file.Config{
		Dir: a.cfg.ClusterDir, StatusDir: a.cfg.StatusDir,
		TrustDomain: a.cfg.TrustDomain, RootNamespace: a.cfg.RootNamespace,
		Log: a.cfg.Log.With("part", "discovery"),
	})
	return err
}

func (a *Agent) newCertificates() (err error) {
	log := a.cfg.Log.With("part", "certs")
	if a.roots, err = certs.NewFileRoots(a.cfg.CARootFile, a.cfg.TrustDomain, log); err != nil {
		return err
	}
	config := certs.Config{Roots: a.roots, TrustDomain: a.cfg.TrustDomain, TTL: a.cfg.CertTTL, Log: log}
	if a.cfg.CRLFile != "" {
		if a.revocations, err = certs.NewFileRevocations(a.cfg.CRLFile, log); err != nil {
			return err
		}
		config.Revocations = a.revocations
	}
	// It is read anew at every call; that it cannot be read now means a wrong path.
	if _, err := os.ReadFile(a.cfg.CATokenFile); err != nil {
		return fmt.Errorf("token for the CA: %w", err)
	}
	a.signer, err = istio.NewClient(istio.ClientConfig{
		Address: a.cfg.CAAddress, ServerName: a.cfg.CAName,
		RootFile: a.cfg.CARootFile, TokenFile: a.cfg.CATokenFile, Cluster: a.cfg.ClusterID,
	})
	if err != nil {
		return err
	}
	config.Signer = a.signer
	a.keeper, err = certs.New(config)
	return err
}

func (a *Agent) newTelemetry() (err error) {
	if a.cfg.MetricsAddress != "" {
		if a.metrics, err = listenMetrics(a.cfg.MetricsAddress, a.registry, &a.store); err != nil {
			return err
		}
	}
	a.telemetry, err = telemetry.New(telemetry.Config{
		Registerer: a.registry, Store: &a.store, Cluster: a.cfg.ClusterID,
		AccessLog: a.cfg.AccessLog, Interval: a.cfg.FlowInterval, Log: a.cfg.Log.With("part", "telemetry"),
	})
	if err != nil {
		return err
	}
	return a.telemetry.Attach(telemetry.Sources{
		Pods: a.podStates, Certificates: a.certificateExpiry, Pool: func() telemetry.Pool { return a.proxy.Pool() }, Hooks: a.hookCounters,
	})
}

func (a *Agent) newProxy() (err error) {
	a.proxy, err = proxy.New(proxy.Config{
		Node: a.cfg.Node, Store: &a.store, Certs: a.keeper, Telemetry: a.telemetry,
		Limits: a.cfg.Limits, Cluster: a.cfg.ClusterID, Log: a.cfg.Log.With("part", "proxy"),
	})
	return err
}

func (a *Agent) newCapture() (err error) {
	a.datapath, err = kernel.Open(kernel.Config{
		Dir: a.cfg.BPFDir, StateDir: a.cfg.StateDir, CgroupRoot: a.cfg.CgroupRoot, Inbound: a.cfg.Inbound, TC: a.cfg.TC,
		DisableGuard: a.cfg.DisableGuard, Log: a.cfg.Log.With("part", "kernel"),
	})
	if err != nil {
		return err
	}
	publisher, err := file.NewPublisher(a.cfg.StatusDir, a.cfg.Node)
	if err != nil {
		return err
	}
	serve, stop := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	a.stopServing, a.cutServing = stop, cut
	a.pods = &pods{
		node: a.cfg.Node, datapath: a.datapath, keeper: a.keeper, proxy: a.proxy, publisher: publisher,
		log: a.cfg.Log.With("part", "pods"), serve: serve, force: force, served: map[string]*servedPod{},
	}
	var adopted []enroll.Adopted
	for _, p := range a.datapath.Adopted() {
		// Whatever it had come to, others may hold it for captured: it stays published
		// until its release says otherwise.
		adopted = append(adopted, enroll.Adopted{UID: p.UID, NetNS: p.NetNS, Published: true})
	}
	a.reconciler, err = enroll.New(enroll.Config{
		Node: a.cfg.Node, Store: &a.store, Target: a.pods, RequireNetNS: true, Adopted: adopted,
		Settle: a.cfg.Settle, Grace: a.cfg.Grace, Log: a.cfg.Log.With("part", "enroll"),
	})
	return err
}

// Run serves the node until ctx ends, then lets live connections go on for the drain
// timeout. Pods stay captured, and closed, for the next agent.
func (a *Agent) Run(ctx context.Context) error {
	// Connections live on while the node drains, and so must what they rely on.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	background, parts := errgroup.WithContext(parts)
	run := func(part func(context.Context) error) { background.Go(func() error { return part(parts) }) }
	run(func(ctx context.Context) error { return a.source.Run(ctx, &a.store) })
	run(a.roots.Run)
	if a.revocations != nil {
		run(a.revocations.Run)
	}
	run(a.keeper.Run)
	run(a.telemetry.Run)
	run(a.proxy.Run)
	run(a.admin.Run)
	run(a.prune)
	run(a.watchNamespaces)
	run(a.lookForNode)
	if a.metrics != nil {
		run(a.metrics.Run)
	}
	a.cfg.Log.Info("serving", "node", a.cfg.Node, "version", a.cfg.Version, "inbound", a.datapath.InboundMode())

	enrolling, stopEnrolling := context.WithCancel(ctx)
	defer stopEnrolling()
	context.AfterFunc(parts, stopEnrolling) // a part that failed ends it all
	background.Go(func() error { return a.repair(enrolling) })
	err := a.reconciler.Run(enrolling)
	stopEnrolling()
	a.drain(parts)
	stopParts()
	return errors.Join(err, background.Wait())
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
	closeAll := func(closers ...interface{ Close() error }) {
		for _, c := range closers {
			errs = append(errs, c.Close())
		}
	}
	if a.pods != nil {
		a.stopServing()
		a.cutServing()
		a.pods.wait()
		closeAll(a.pods)
	}
	if a.datapath != nil {
		closeAll(a.datapath)
	}
	if a.metrics != nil {
		closeAll(a.metrics)
	}
	if a.signer != nil {
		closeAll(a.signer)
	}
	if a.revocations != nil {
		closeAll(a.revocations)
	}
	if a.roots != nil {
		closeAll(a.roots)
	}
	if a.admin != nil {
		closeAll(a.admin)
	}
	return errors.Join(errs...)
}

// prune lets the guards forget connections that have ended.
func (a *Agent) prune(ctx context.Context) error {
	ticker := time.NewTicker(pruneInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			a.pods.prune()
		}
	}
}

// watchNamespaces tells enrolment of pods whose network namespace is gone.
func (a *Agent) watchNamespaces(ctx context.Context) error {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			for _, uid := range a.pods.vanished() {
				a.reconciler.Vanished(uid)
			}
		}
	}
}
