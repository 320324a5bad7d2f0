package proxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// Datagrams is the captured UDP of a pod; *kernel.Datagrams is one. Nothing but Wait, Receive and
// Refused waits.
type Datagrams interface {
	// Wait waits until Receive has something: nobody need hold a buffer for it meanwhile.
	Wait() error
	// Receive waits for what an application sends to a peer and reads it into b.
	Receive(b []byte) (int, dataplane.Datagram, error)
	// Deliver gives payload to the application at to, which sees from as its sender.
	Deliver(from, to netip.AddrPort, payload []byte) error
	// Refuse tells the application at app that nothing listens at peer's port, TooBig that of a
	// datagram of size bytes to peer only longest would have fit.
	Refuse(app, peer netip.AddrPort) error
	TooBig(app, peer netip.AddrPort, size, longest int) error
	// Refused waits until what Deliver gave in client's name met a closed port of the pod; one
	// call waits for one address family, of which Families has those that there are.
	Refused(v4 bool) (client, app netip.AddrPort, err error)
	Families() (v4, v6 bool)
	// Keep has what the application at app says to client come to Receive, whoever client is.
	// Forget undoes it, once what is answered late has come as well.
	Keep(app, client netip.AddrPort) error
	Forget(app, client netip.AddrPort)
	// QUIC is the socket of the tunnel's UDP port, which the caller closes; nil when there is none.
	// Packets to connection IDs that begin with mark still come to it when another agent has the pod.
	QUIC() (conn *net.UDPConn, mark [2]byte, err error)
	// SetDeadline has Receive and Refused fail with os.ErrDeadlineExceeded from t on.
	SetDeadline(t time.Time) error
}

// maxDatagrams is the longest that Receive may read: several in one buffer included.
const maxDatagrams = 65535

// receiveBuffers are for pods that receive something just now.
var receiveBuffers = sync.Pool{New: func() any { return new([maxDatagrams]byte) }}

// datagramPod is the UDP of a pod that is served:
//
//	application ─► Receive ─┬─► its flow's queue ─► tunnel
//	                        └─► no flow: a new one, through route
//	tunnel ─► flow ─► Deliver ─► application
//
// A flow is two addresses and ports, the application's and the peer's. Either side may have
// begun it: what an application says to a client that came by the tunnel is that flow's answer.
type datagramPod struct {
	s       *servedPod
	d       Datagrams
	ctx     context.Context // of its flows
	workers sync.WaitGroup
	quic    *quicTunnels // nil: it has no socket for them
	rooms   sync.Pool    // of *datagramRoom, for what is queued

	mu     sync.Mutex
	closed bool
	flows  map[ends]*datagramFlow
	live   map[*datagramFlow]struct{} // those included that others took the place of
}

// ends are the addresses of a flow.
type ends struct{ app, peer netip.AddrPort }

// errNotCaptured is a pod whose UDP is left alone, or not yet captured.
var errNotCaptured = errors.New("the pod's UDP is not captured")

// ServeUDP carries the UDP of a pod that ServePod serves, or is about to, until ctx ends or d is
// closed; also the connections that go by QUIC. When ctx ends it takes nothing new, tells peers so,
// and returns when those connections have ended, or once force is done, which resets them. Its flows
// of UDP have no drain: they end when peers know that others are to be begun elsewhere.
func (p *Proxy) ServeUDP(ctx, force context.Context, uid string, d Datagrams) error {
	s, err := p.awaitServed(ctx, uid)
	if err != nil {
		return nil // it was ctx that ended
	}
	defer s.udpWork.Done()
	if err := s.serveUDP(ctx, force, d); err != nil {
		return fmt.Errorf("serve UDP of pod %s: %w", uid, err)
	}
	return nil
}

func (s *servedPod) serveUDP(ctx, force context.Context, d Datagrams) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(s.serving, stop)()
	force, cut := context.WithCancel(force)
	defer cut()
	if err := d.SetDeadline(time.Time{}); err != nil {
		return err
	}
	live, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	u := &datagramPod{s: s, d: d, ctx: live, flows: make(map[ends]*datagramFlow), live: make(map[*datagramFlow]struct{})}
	var err error
	if u.quic, err = s.newQUIC(d); err != nil {
		return err
	}
	s.udp.Store(u)
	var tunnels errgroup.Group
	drained := make(chan struct{})
	tunnels.Go(func() error {
		defer close(drained)
		err := u.quic.serve(ctx, force, s.server)
		if err != nil { // nothing of it works any more
			cut()
			stop()
		}
		return err
	})
	err = u.capture(ctx)
	if ctx.Err() == nil { // d is closed, or broken
		cut()
		stop()
	}
	select { // while peers learn of it, who asks for a flow gets one
	case <-drained:
	case <-time.After(lingerTime):
	case <-force.Done():
	}
	s.udp.CompareAndSwap(u, nil)
	u.close()
	cancel(errForced)
	u.workers.Wait()
	err = errors.Join(err, tunnels.Wait())
	select {
	case <-s.settled:
	case <-force.Done():
	}
	return errors.Join(err, u.quic.close())
}

// lingerTime is how long flows go on, and may be begun by peers, after applications are not listened
// to any more: peers whose requests are refused would not ask again for retryPause.
const lingerTime = time.Second

// capture takes what applications send, until ctx ends or d is closed.
func (u *datagramPod) capture(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = u.d.SetDeadline(time.Unix(1, 0)) })()
	var group errgroup.Group
	stop := func(err error) error {
		_ = u.d.SetDeadline(time.Unix(1, 0)) // the others end as well
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		return err
	}
	group.Go(func() error { return stop(u.receive(ctx)) })
	v4, v6 := u.d.Families()
	for family, there := range map[bool]bool{true: v4, false: v6} {
		if there {
			group.Go(func() error { return stop(u.hearRefusals(family)) })
		}
	}
	return group.Wait()
}

// awaitServed waits for a serving of the pod that takes more, and joins it.
func (p *Proxy) awaitServed(ctx context.Context, uid string) (*servedPod, error) {
	for {
		p.mu.Lock()
		pods, changed := p.pods[uid], p.added
		p.mu.Unlock()
		if len(pods) > 0 && pods[len(pods)-1].joinUDP() {
			return pods[len(pods)-1], nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// receive hands what applications send to its flows.
func (u *datagramPod) receive(ctx context.Context) error {
	for {
		err := u.d.Wait()
		if err == nil {
			err = u.receiveOne()
		}
		switch {
		case err == nil:
		case ctx.Err() != nil, errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return err
		default: // a datagram that makes no sense, as one with a forged source
			u.drop(telemetry.Outbound, dropForeign, 1)
			u.s.cfg.Log.Debug("datagram of an application", "pod", u.s.uid, "error", err)
		}
	}
}

func (u *datagramPod) receiveOne() error {
	b := receiveBuffers.Get().(*[maxDatagrams]byte)
	defer receiveBuffers.Put(b)
	n, d, err := u.d.Receive(b[:])
	if err == nil {
		u.dispatch(b[:n], d)
	}
	return err
}

func (u *datagramPod) dispatch(b []byte, d dataplane.Datagram) {
	f, fresh := u.flowFor(ends{app: d.From, peer: d.To})
	if f == nil {
		u.drop(telemetry.Outbound, dropLimit, 1)
		return
	}
	size := d.Segment
	if size <= 0 || size > len(b) {
		size = len(b)
	}
	for {
		f.push(b[:size], !d.Whole)
		b = b[size:]
		if len(b) == 0 {
			break
		}
		size = min(size, len(b))
	}
	if fresh {
		u.spawn(f.open)
	}
}

// flowFor is the flow between e, a new one of the application's if there is none; nil when there
// are too many.
func (u *datagramPod) flowFor(e ends) (f *datagramFlow, fresh bool) {
	u.mu.Lock()
	f = u.flows[e]
	u.mu.Unlock()
	if f != nil {
		return f, false
	}
	f = u.newFlow(e, telemetry.Outbound)
	if err := u.enter(f); err != nil {
		f.flow.cancel(nil)
		return nil, false
	}
	if err := u.install(f); err != nil {
		return nil, false
	}
	return f, true
}

// enter counts f, whose end must be called after nil.
func (u *datagramPod) enter(f *datagramFlow) error {
	if err := u.s.beginDatagrams(f.flow); err != nil {
		return err
	}
	u.mu.Lock()
	closed, full := u.closed, len(u.live) >= u.s.cfg.Limits.PodFlows
	if !closed && !full {
		u.live[f] = struct{}{}
	}
	u.mu.Unlock()
	switch {
	case closed:
		u.s.end(f.flow)
		return errNotCaptured
	case full:
		u.s.end(f.flow)
		return u.s.exceeded(limitPodFlows, int64(u.s.cfg.Limits.PodFlows))
	}
	return nil
}

// install makes f, which was entered, the flow between its ends. An earlier one that the peer began
// ends: the peer has forgotten it, or it would not begin another.
func (u *datagramPod) install(f *datagramFlow) error {
	before, err := u.replace(f)
	if before != nil && before.direction == telemetry.Inbound {
		before.end(nil)
	}
	return err
}

// replace returns the flow whose place f has now. What is kept changes with u.flows, so that nothing
// is that no flow needs.
func (u *datagramPod) replace(f *datagramFlow) (before *datagramFlow, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.live[f]; !ok { // it was cut meanwhile
		return nil, errFlowEnded
	}
	before = u.flows[f.ends]
	u.flows[f.ends] = f
	switch {
	case f.direction == telemetry.Inbound:
		err = u.d.Keep(f.ends.app, f.ends.peer)
	case before != nil && before.direction == telemetry.Inbound:
		u.d.Forget(f.ends.app, f.ends.peer)
	}
	return before, err
}

// leave forgets f.
func (u *datagramPod) leave(f *datagramFlow) {
	u.mu.Lock()
	delete(u.live, f)
	if u.flows[f.ends] == f {
		delete(u.flows, f.ends)
		if f.direction == telemetry.Inbound {
			u.d.Forget(f.ends.app, f.ends.peer)
		}
	}
	u.mu.Unlock()
	u.s.end(f.flow)
}

func (u *datagramPod) close() {
	u.mu.Lock()
	u.closed = true
	flows := slices.Collect(maps.Keys(u.live))
	u.mu.Unlock()
	for _, f := range flows {
		f.end(errForced)
	}
}

// hearRefusals ends flows whose application is not there.
func (u *datagramPod) hearRefusals(v4 bool) error {
	for {
		client, app, err := u.d.Refused(v4)
		if err != nil {
			return err
		}
		u.mu.Lock()
		f := u.flows[ends{app: app, peer: client}]
		u.mu.Unlock()
		if f != nil {
			f.refuse()
		}
	}
}

// Why a datagram was dropped, as metric labels.
const (
	dropForeign = "foreign"   // from an address that is none of the pod's
	dropLimit   = "limit"     // too many flows
	dropQueue   = "queue"     // the tunnel is slower than the application
	dropRoute   = "no_route"  // its flow did not come up, or has ended
	dropTooBig  = "too_big"   // it does not fit and must not be fragmented; its sender was told
	dropDeliver = "deliver"   // the pod's lo has no room
	dropSend    = "transport" // the tunnel dropped it, on either side of it
	dropQUIC    = "received"  // it came faster than it was taken from quic-go; see Config.CountQUICDrops
)

func (u *datagramPod) drop(d telemetry.Direction, cause string, n uint64) {
	if n > 0 {
		u.s.cfg.Telemetry.DatagramsDropped(d, cause, n)
	}
}

// datagrams is the pod's captured UDP, or nil.
func (s *servedPod) datagrams() *datagramPod { return s.udp.Load() }

// beginDatagrams is begin for a flow of UDP, which needs no file of its own.
func (s *servedPod) beginDatagrams(f *flow) error {
	if err := s.claim(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f.datagrams = true
	s.flows[f] = struct{}{}
	s.datagramFlows++
	return nil
}

// spawn runs work that close waits for, and nothing any more once the pod's UDP is closed.
func (u *datagramPod) spawn(work func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.closed {
		u.workers.Go(work)
	}
}
