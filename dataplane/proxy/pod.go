package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
)

// servedPod is one pod that is served. A pod that was released and enrolled again may be
// served twice for a while: the older one drains.
type servedPod struct {
	*Proxy
	pod      Pod
	uid      string
	identity spiffe.ID
	client   *hbone.Client // opens tunnels
	server   *hbone.Server // accepts them
	share    *share
	buffers  buffers
	large    budget
	pending  budget
	files    budget
	work     sync.WaitGroup // connections over TCP, plain or tunnelled
	tlsError atomic.Pointer[hbone.TLSError]
	retire   retirement
	udp      atomic.Pointer[datagramPod] // nil while the pod's UDP is not served

	// serving ends when ServePod accepts no more; settled is closed when what it accepted as plain
	// TCP has ended, whatever tunnels that took.
	serving context.Context
	settled chan struct{}
	udpWork sync.WaitGroup // ServeUDP, by joinUDP, and what its tunnels carry

	mu    sync.Mutex
	flows map[*flow]struct{}
	// datagramFlows is how many of flows are of UDP, which nobody waits for.
	datagramFlows int
	known         *dataplane.Workload // as of the last snapshot that had it
	over          bool                // ServePod waits for no more udpWork
}

// errForced is an end that nobody but this agent wanted.
var errForced = errors.New("the agent stops serving the pod and its patience is over")

// ServePod serves the pod's three listeners until ctx ends. Then it accepts no more, tells
// peers to open no more streams, and returns when the connections that live have ended, or
// once force is done, which resets them; those that ServeUDP carries included. The listeners stay
// open.
//
// An error means that a listener broke; the others were stopped because of it.
func (p *Proxy) ServePod(ctx, force context.Context, pod Pod) error {
	w, err := p.awaitWorkload(ctx, pod.UID())
	if err != nil {
		return nil // it was ctx that ended
	}
	s := p.newServedPod(pod, w)
	// Connections live until force, and are told so in these words.
	live, cut := context.WithCancelCause(context.WithoutCancel(force))
	defer cut(nil)
	defer context.AfterFunc(force, func() {
		cut(errForced)
		for _, f := range s.liveFlows() {
			s.cut(f, errForced)
		}
	})()
	s.server = s.tunnelServer()
	group, serving := errgroup.WithContext(ctx)
	s.serving = serving
	p.add(s)
	defer p.remove(s)

	group.Go(func() error { return s.accept(serving, live, pod.Outbound(), s.serveOutbound) })
	group.Go(func() error { return s.accept(serving, live, pod.Inbound(), s.serveInbound) })
	group.Go(func() error { return s.server.Serve(serving, live, pod.Tunnel()) })
	err = group.Wait()
	s.work.Wait()
	close(s.settled)
	s.awaitUDP()
	if err != nil {
		err = fmt.Errorf("serve pod %s: %w", w.Name, err)
	}
	return errors.Join(err, s.client.Close())
}

func (p *Proxy) newServedPod(pod Pod, w *dataplane.Workload) *servedPod {
	limits := p.cfg.Limits
	s := &servedPod{
		Proxy: p, pod: pod, uid: pod.UID(), identity: w.Identity, known: w,
		share:   p.gate.share(limits.PodActive),
		large:   budget{limit: limits.PodBuffers},
		pending: budget{limit: int64(limits.PodPending)},
		files:   budget{limit: limits.PodFiles},
		flows:   make(map[*flow]struct{}),
		settled: make(chan struct{}),
	}
	s.buffers = buffers{pod: &s.large, node: &p.bulk, exhausted: func() { p.warn.bit(limitBuffers, s.uid, limits.PodBuffers) }}
	clientTransport := p.cfg.ClientTransport
	if clientTransport == nil {
		clientTransport = h2.Client{Budget: windows{&s.buffers}}
	}
	cfg := s.clientConfig()
	cfg.Dial, cfg.Transport = s.dialTunnel, clientTransport
	s.client = hbone.NewClient(cfg)
	return s
}

// joinUDP has ServePod wait until udpWork is done, unless it accepts no more.
func (s *servedPod) joinUDP() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.serving.Err() != nil {
		return false
	}
	s.udpWork.Add(1)
	return true
}

func (s *servedPod) awaitUDP() {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.udpWork.Wait()
}

// clientConfig has all but the transport.
func (s *servedPod) clientConfig() hbone.ClientConfig {
	limits := s.cfg.Limits
	return hbone.ClientConfig{
		TLS:            s.clientTLS,
		Stripes:        limits.PairTunnels,
		MaxHandshakes:  max(1, limits.NodeHandshakes/2),
		Handshakes:     s.handshakes,
		IdleTimeout:    s.cfg.TunnelIdle,
		ConnectTimeout: s.cfg.ConnectTimeout,
		Log:            s.cfg.Log,
	}
}

func (p *Proxy) add(s *servedPod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods[s.uid] = append(p.pods[s.uid], s)
	close(p.added)
	p.added = make(chan struct{})
}

func (p *Proxy) remove(s *servedPod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods[s.uid] = slices.DeleteFunc(p.pods[s.uid], func(other *servedPod) bool { return other == s })
	if len(p.pods[s.uid]) == 0 {
		delete(p.pods, s.uid)
	}
}

// workload is the pod as the current snapshot has it. A pod that vanished from the snapshot
// while it is still served is nil then, and what was last known of it comes second.
func (s *servedPod) workload() (snapshot *dataplane.Snapshot, now, last *dataplane.Workload) {
	snapshot, _ = s.cfg.Store.Load()
	if snapshot != nil {
		now = snapshot.Workload(s.uid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now != nil {
		s.known = now
	}
	return snapshot, now, s.known
}

// flow is a connection from its acceptance to its end.
type flow struct {
	cancel  context.CancelCauseFunc // of its set-up; nil after it. Guarded by servedPod.mu from when it is carried
	stop    func(error)             // ends it once it is set up, nil before; guarded by servedPod.mu
	attempt *telemetry.Attempt      // until it is open or refused
	guarded *guarded                // what policy looks at again when it changes; nil for outbound ones
	tunnel  *hbone.Conn
	settled atomic.Bool // it no longer counts as pending
	files   int64       // taken of the budgets
	// datagrams says that it is of UDP.
	datagrams bool
}

// begin admits a connection or says which limit it exceeds. end must be called after nil.
func (s *servedPod) begin(f *flow) error {
	limits := &s.cfg.Limits
	if err := s.claim(); err != nil {
		return err
	}
	s.mu.Lock()
	admitted := len(s.flows)-s.datagramFlows < limits.PodConnections
	if admitted {
		s.flows[f] = struct{}{}
	}
	s.mu.Unlock()
	if !admitted {
		s.pending.give(1)
		s.conns.Add(-1)
		return s.exceeded(limitPodConnections, int64(limits.PodConnections))
	}
	if err := s.openFiles(f, 1); err != nil {
		s.leave(f)
		return err
	}
	return nil
}

// claim counts one more among the node's connections and among the pod's that are being set up.
func (s *servedPod) claim() error {
	limits := &s.cfg.Limits
	if n := s.conns.Add(1); n > int64(limits.NodeConnections) {
		s.conns.Add(-1)
		return s.exceeded(limitNodeConnections, int64(limits.NodeConnections))
	}
	if !s.pending.take(1) {
		s.conns.Add(-1)
		return s.exceeded(limitPodPending, int64(limits.PodPending))
	}
	return nil
}

// openFiles takes of the budgets what f lacks of so many open files; end gives them back.
func (s *servedPod) openFiles(f *flow, n int64) error {
	more := n - f.files
	switch {
	case more <= 0:
		return nil
	case !s.files.take(more):
		return s.exceeded(limitPodFiles, s.files.limit)
	case !s.Proxy.files.take(more):
		s.files.give(more)
		return s.exceeded(limitNodeFiles, s.Proxy.files.limit)
	}
	f.files = n
	return nil
}

// settle is called when a connection is set up: it is not pending any more.
func (s *servedPod) settle(f *flow) {
	if !f.settled.Swap(true) { // a flow of UDP may end while it is set up
		s.pending.give(1)
	}
}

func (s *servedPod) end(f *flow) {
	s.leave(f)
	s.mu.Lock()
	cancel := f.cancel
	s.mu.Unlock()
	if cancel != nil {
		cancel(nil)
	}
}

// leave gives back what f has of all that is bounded.
func (s *servedPod) leave(f *flow) {
	s.settle(f)
	s.mu.Lock()
	delete(s.flows, f)
	if f.datagrams {
		s.datagramFlows--
	}
	s.mu.Unlock()
	s.conns.Add(-1)
	s.files.give(f.files)
	s.Proxy.files.give(f.files)
}

// carried has cut call stop from now on, and lets go of the set-up of f, whose context would keep
// memory. It returns why f was cut before.
func (s *servedPod) carried(ctx context.Context, f *flow, stop func(error)) error {
	s.mu.Lock()
	cancel := f.cancel
	f.cancel, f.stop = nil, stop
	s.mu.Unlock()
	defer cancel(nil)
	return causeOf(ctx)
}

// carry hands f over to r.
func (s *servedPod) carry(ctx context.Context, f *flow, r *relay) {
	if cut := s.carried(ctx, f, r.end); cut != nil {
		r.end(cut)
	}
	r.run()
}

// cut ends f for err, wherever it stands. The set-up is cancelled before it can be over: nobody
// would look at its context any more.
func (s *servedPod) cut(f *flow, err error) {
	s.mu.Lock()
	stop := f.stop
	if stop == nil {
		f.cancel(err)
	}
	s.mu.Unlock()
	if stop != nil {
		stop(err)
	}
}

// limitError is a connection refused because of a limit.
type limitError struct {
	limit string
	bound int64
}

func (e *limitError) Error() string {
	return fmt.Sprintf("limit %s of %d is reached", e.limit, e.bound)
}

func (s *servedPod) exceeded(limit string, bound int64) error {
	s.warn.bit(limit, s.uid, bound)
	return &limitError{limit: limit, bound: bound}
}

func (s *servedPod) liveCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flows) - s.datagramFlows
}

func (s *servedPod) liveFlows() []*flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	flows := make([]*flow, 0, len(s.flows))
	for f := range s.flows {
		flows = append(flows, f)
	}
	return flows
}

// acceptor is a *netns.Listener.
type acceptor interface {
	AcceptConn() (*netns.Conn, error)
	SetDeadline(t time.Time) error
	Addr() net.Addr
}

// accept hands each connection of l to serve, on a goroutine of its own, until ctx ends.
func (s *servedPod) accept(ctx, live context.Context, l acceptor, serve func(context.Context, *netns.Conn)) error {
	if err := l.SetDeadline(time.Time{}); err != nil { // of an earlier ServePod
		return fmt.Errorf("accept on %s: %w", l.Addr(), err)
	}
	defer context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })()
	var retry backoff
	for {
		conn, err := l.AcceptConn()
		switch {
		case err == nil:
			retry = backoff{}
			s.work.Go(func() { serve(live, conn) })
		case ctx.Err() != nil:
			return nil
		case !temporary(err):
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		default:
			s.cfg.Log.Error("accept connections: new ones wait", "pod", s.uid, "listener", l.Addr(), "error", err)
			retry.pause(ctx)
		}
	}
}

// temporary reports whether Accept may succeed later: descriptors or memory ran out, or a
// connection died in the backlog.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return !errors.Is(err, net.ErrClosed) && errors.As(err, &t) && t.Temporary()
}

// backoff doubles a pause from 5 ms to 1 s.
type backoff struct{ last time.Duration }

func (b *backoff) pause(ctx context.Context) {
	b.last = min(max(2*b.last, 5*time.Millisecond), time.Second)
	timer := time.NewTimer(b.last)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
