// Package proxy carries the connections of a node's enrolled pods.
//
//	application ─► 15001 outbound ─► route ─┬─► HBONE tunnel ─► the peer's 15008
//	                                        └─► plain TCP
//	peer's tunnel ─► 15008 ─► checks 1-5 ─► authorize ─┐
//	plain TCP ─────► 15006 ─► authorize, no identity ──┴─► the application, from the client's address
//
// A connection that moves much has a goroutine for what its application sends, one that moves
// short messages or nothing waits in a lot. What the goroutines may do at one time is bounded per
// pod (gate), so that one pod's bulk does not become another's latency.
//
// An application's socket has SO_LINGER 0 from accept until the peer's clean end of stream
// has been handed to it. Whatever else ends the connection, the death of this process
// included, the application sees a reset: a truncated transfer never looks complete.
package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/paths"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
)

// Pod is an enrolled pod's network as the proxy needs it; *kernel.Pod is one.
type Pod interface {
	UID() string
	// The listeners stay the pod's. A connection that they accept has the original
	// destination as its local address and the client as its remote one.
	Outbound() *netns.Listener
	Inbound() *netns.Listener
	Tunnel() *net.TCPListener
	// DialTunnel and DialDirect reach remote from the pod's own address.
	DialTunnel(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error)
	DialDirect(ctx context.Context, remote netip.AddrPort) (*netns.Conn, error)
	// DialApp reaches the application at app from the client's address, and from its port
	// where that is not 0 and is free. begun says that the client's first bytes come right behind.
	DialApp(ctx context.Context, client, app netip.AddrPort, begun bool) (*netns.Conn, error)
}

// Certificates is where TLS configurations come from; *certs.Keeper is one.
type Certificates interface {
	// Ready waits until there is a valid certificate for id, or says why there is none.
	Ready(ctx context.Context, id spiffe.ID) error
	ClientTLS(self spiffe.ID, peers []spiffe.ID) (*tls.Config, error)
	ServerTLS(self spiffe.ID) *tls.Config
	// Changed is closed when trust or revocations have changed since the call; Revoked
	// then says whether a connection must be cut, Distrusted whether it may carry what is new.
	Changed() <-chan struct{}
	Distrusted(state tls.ConnectionState) error
	Revoked(state tls.ConnectionState) error
}

// Config is what a Proxy needs. Store, Certs and Telemetry are required.
type Config struct {
	Node      string // the name of this node
	Cluster   string // told to peers of workloads that name none
	Store     *dataplane.Store
	Certs     Certificates
	Telemetry *telemetry.Telemetry
	Limits    Limits

	// DiscoveryWait is how long a connection to an address in a pod range that nobody
	// knows may wait for it to become known, and any connection for the first snapshot.
	// 0 means 5 seconds.
	DiscoveryWait time.Duration
	// ConnectTimeout bounds each attempt to reach an endpoint or the application.
	// 0 means 10 seconds.
	ConnectTimeout time.Duration
	// TunnelIdle is how long a tunnel connection without streams is kept. 0 means 5 minutes.
	TunnelIdle time.Duration
	// DatagramIdle is how long a flow of UDP without datagrams is kept, and DNSIdle one to or
	// from port 53. 0 means 5 minutes and 30 seconds; DatagramIdle is 2 minutes at least (RFC
	// 4787 REQ-5).
	DatagramIdle, DNSIdle time.Duration
	// ClientTransport and ServerTransport carry the tunnels. nil means HTTP/2, each pod's
	// within its buffers.
	ClientTransport hbone.ClientTransport
	ServerTransport hbone.ServerTransport

	// UDP has peers told that HTTP/2 carries UDP too, for where none comes through to the tunnels'
	// UDP port, and of ways that had better be taken by HTTP/3.
	UDP bool
	// CountQUICDrops has datagrams counted that quic-go drops, which makes all others dearer.
	CountQUICDrops bool
	// ResetKey lets peers of an earlier agent's QUIC connections know that they are gone. nil
	// leaves them to find out.
	ResetKey *[32]byte

	// KernelPath takes connections between pods of this node off the proxy. nil takes none.
	KernelPath KernelPath

	// Log receives what no connection's record tells. nil discards it.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	c.Limits = c.Limits.withDefaults()
	if c.DiscoveryWait <= 0 {
		c.DiscoveryWait = 5 * time.Second
	}
	if c.ConnectTimeout <= 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.DatagramIdle <= 0 {
		c.DatagramIdle = 5 * time.Minute
	}
	c.DatagramIdle = max(c.DatagramIdle, 2*time.Minute)
	if c.DNSIdle <= 0 {
		c.DNSIdle = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports everything that is missing.
func (c Config) Validate() error {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("proxy: no snapshot store"))
	}
	if c.Certs == nil {
		errs = append(errs, errors.New("proxy: no certificates"))
	}
	if c.Telemetry == nil {
		errs = append(errs, errors.New("proxy: no telemetry"))
	}
	return errors.Join(errs...)
}

// Proxy serves the pods of one node. It is safe for concurrent use.
type Proxy struct {
	cfg   Config
	gate  *gate
	look  *lookout
	conns atomic.Int64 // of all pods
	bulk  budget       // bytes of large buffers, of all pods
	files budget       // open files of connections, of all pods
	lots  []lot        // sockets without much traffic, of all pods
	warn  limitLog
	paths paths.Judge // of those to peers
	// handshakes has one for each of a tunnel that some pod opens.
	handshakes chan struct{}

	// addresses tells where an accepted connection was going and who opened it.
	addresses func(c *netns.Conn) (destination, client netip.AddrPort)

	mu   sync.Mutex
	pods map[string][]*servedPod // by UID; more than one while an older one still drains
	// added is closed, and made anew, when a pod is served.
	added chan struct{}

	policyMu sync.Mutex
	snapshot *dataplane.Snapshot // of policies
	policies *authz.Set
}

// New makes a Proxy that serves nothing yet. It holds nothing that must be closed.
func New(cfg Config) (*Proxy, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	look, err := newLookout()
	if err != nil {
		return nil, err
	}
	return &Proxy{
		cfg:        cfg,
		look:       look,
		gate:       newGate(cfg.Limits.NodeActive, cfg.Limits.lease),
		bulk:       budget{limit: cfg.Limits.NodeBuffers},
		files:      budget{limit: cfg.Limits.NodeFiles},
		warn:       limitLog{log: cfg.Log, telemetry: cfg.Telemetry},
		lots:       make([]lot, runtime.GOMAXPROCS(0)),
		handshakes: make(chan struct{}, cfg.Limits.NodeHandshakes),
		addresses:  socketAddresses,
		pods:       make(map[string][]*servedPod),
		added:      make(chan struct{}),
	}, nil
}

// Run follows policy and trust until ctx ends: live connections that a new snapshot denies,
// or whose certificate was revoked, are cut. It must run while pods are served.
func (p *Proxy) Run(ctx context.Context) error {
	var followers sync.WaitGroup
	followers.Go(func() { p.followPolicy(ctx) })
	followers.Go(func() { p.followTrust(ctx) })
	followers.Wait()
	return nil
}

// socketAddresses is for listeners that the kernel side steers connections to: getsockname
// is the original destination.
func socketAddresses(c *netns.Conn) (destination, client netip.AddrPort) {
	return c.Local(), c.Remote()
}

// Live is how many connections, those that are still being set up included, the pod has.
func (p *Proxy) Live(uid string) int {
	n := 0
	for _, s := range p.serving(uid) {
		n += s.liveCount()
	}
	return n
}

func (p *Proxy) serving(uid string) []*servedPod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*servedPod(nil), p.pods[uid]...)
}

func (p *Proxy) all() []*servedPod {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*servedPod
	for _, pods := range p.pods {
		all = append(all, pods...)
	}
	return all
}

// Pool sums up the tunnel connections of all pods.
func (p *Proxy) Pool() telemetry.Pool {
	var sum telemetry.Pool
	for _, s := range p.all() {
		stats := s.client.Stats()
		sum.Sessions += stats.Sessions
		sum.Streams += stats.Streams
		sum.Dialing += stats.Dialing
		sum.Waiting += stats.Waiting
	}
	return sum
}

// RetireTunnels takes the pooled tunnel connections that identity id opened out of use:
// streams run on, new ones get connections with the certificate of the day.
func (p *Proxy) RetireTunnels(id spiffe.ID) {
	for _, s := range p.all() {
		if s.identity == id {
			s.retireTunnels()
		}
	}
}

// rulesFor compiles what applies to w once for each snapshot.
func (p *Proxy) rulesFor(s *dataplane.Snapshot, w *dataplane.Workload) *authz.Rules {
	p.policyMu.Lock()
	if p.snapshot != s {
		p.snapshot, p.policies = s, authz.NewSet(s)
	}
	set := p.policies
	p.policyMu.Unlock()
	return set.Rules(w)
}

// awaitWorkload waits until the pod is known, as a restarted agent may open the listeners of
// a pod that it adopts before it knows the cluster again.
func (p *Proxy) awaitWorkload(ctx context.Context, uid string) (*dataplane.Workload, error) {
	for {
		snapshot, changed := p.cfg.Store.Load()
		if snapshot != nil {
			if w := snapshot.Workload(uid); w != nil {
				return w, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for pod %s to be known: %w", uid, context.Cause(ctx))
		}
	}
}
