package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/route"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/lazyctx"
)

// maxEndpoints is how many endpoints of a service one connection tries.
const maxEndpoints = 3

// serveOutbound owns conn, which the pod's application opened.
func (s *servedPod) serveOutbound(live context.Context, conn *netns.Conn) {
	destination, client := s.addresses(conn)
	trace := hbone.NewTraceParent()
	f := &flow{attempt: &telemetry.Attempt{
		ID:          traceParentID(trace),
		Direction:   telemetry.Outbound,
		Source:      telemetry.Peer{Addr: client},
		Destination: telemetry.Peer{Addr: destination},
		Started:     time.Now(),
	}}
	_, _, f.attempt.Source.Workload = s.workload()
	app, err := newTCPLeg(conn, "the application")
	if err != nil {
		s.cfg.Telemetry.Refuse(*f.attempt, telemetry.FlagsReset, err)
		return
	}
	ctx := lazyctx.New(live, 0)
	f.cancel = ctx.End
	if err := s.begin(f); err != nil {
		f.cancel(nil)
		app.abort()
		s.refused(ctx, f, err)
		return
	}
	out, early, err := s.connect(ctx, f, app, trace)
	if err != nil {
		app.abort()
		s.refused(ctx, f, err)
		s.end(f)
		return
	}
	s.relay(ctx, f, app, out, early)
}

// traceParentID is the parent ID of a traceparent: what a peer sees of a connection's ID.
func traceParentID(trace string) telemetry.ID {
	id, _ := telemetry.ParseID(trace[36:52]) // of our own making
	return id
}

// refused tells of a connection that did not come up.
func (s *servedPod) refused(ctx context.Context, f *flow, err error) {
	if cause := causeOf(ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	s.cfg.Telemetry.Refuse(*f.attempt, flagsOf(err), err)
}

// relay carries f between its source and its destination from now on. early is how many bytes
// the destination has of the source already.
func (s *servedPod) relay(ctx context.Context, f *flow, source, destination leg, early int) {
	s.settle(f)
	work := s.workOf(f)
	work.Add(1)
	record := s.cfg.Telemetry.Open(*f.attempt)
	record.Sent(early)
	f.attempt = nil // it keeps a snapshot
	r := newRelay(source, destination)
	r.share, r.look, r.buffers, r.lot = s.share, s.look, &s.buffers, s.lotOf(f.tunnel)
	r.count = [2]func(int){record.Sent, record.Received}
	r.done = func(err error) {
		flags := telemetry.FlagsNone
		if err != nil {
			flags = endFlags(err)
		}
		record.Close(flags, err)
		s.leave(f)
		work.Done()
	}
	s.carry(ctx, f, r)
}

// workOf is what waits for f, and cannot be over before: a tunnel that came over QUIC is from ServeUDP, which
// ServePod awaits after it has waited for all others.
func (s *servedPod) workOf(f *flow) *sync.WaitGroup {
	if f.attempt.Direction == telemetry.Inbound && f.tunnel != nil && f.tunnel.Raw == nil {
		return &s.udpWork
	}
	return &s.work
}

// connect reaches what app asked for, and returns how many of its bytes went along.
func (s *servedPod) connect(ctx context.Context, f *flow, app *tcpLeg, trace string) (out leg, early int, err error) {
	first, give := s.firstBytes(app)
	defer give()
	out, err = s.reach(ctx, f, trace, first)
	return out, first.Len(), err
}

// reach is through a tunnel or in clear as the route says. Endpoints of a service are tried one
// after the other. A connection that a tunnel was tried for is never made in clear.
func (s *servedPod) reach(ctx context.Context, f *flow, trace string, first *hbone.First) (leg, error) {
	destination := f.attempt.Destination.Addr
	query := route.Flow{Source: f.attempt.Source.Workload, Node: s.cfg.Node, Dst: destination}
	left := s.leftToKernel(query)
	query.Exclude = slices.Clone(left)
	tunnelled := false
	var failed error
	for range maxEndpoints {
		d, err := s.route(ctx, query)
		f.routed(d, destination)
		switch {
		case err != nil:
			return nil, then(failed, err)
		case d.Action == route.Passthrough && tunnelled:
			query.Exclude = append(query.Exclude, d.Target)
			continue
		}
		var out leg
		if d.Action == route.Tunnel {
			tunnelled = true
			out, err = s.openTunnel(ctx, f, d, trace, first)
		} else {
			out, err = s.dialDirect(ctx, f, d.Target)
		}
		if err == nil {
			return out, nil
		}
		failed = then(failed, err)
		if d.Alternates == 0 && left == nil || ctx.Err() != nil || isFinal(err) {
			break
		}
		query.Exclude = append(query.Exclude[len(left):], d.Target)
		left = nil
	}
	return nil, failed
}

// then is the error of one attempt after another.
func then(before, err error) error {
	if before == nil {
		return err
	}
	return fmt.Errorf("%w; then %w", before, err)
}

// routed notes what is known of the connection now.
func (f *flow) routed(d route.Decision, destination netip.AddrPort) {
	f.attempt.Service = d.Service
	f.attempt.Destination = telemetry.Peer{Addr: destination, Workload: d.Workload}
	f.attempt.Tunnel = netip.AddrPort{}
	f.attempt.Source.Identity = spiffe.ID{}
	if d.Target.IsValid() {
		f.attempt.Destination.Addr = d.Target
	}
}

// routeError is a destination that nothing leads to.
type routeError struct{ reason string }

func (e *routeError) Error() string { return e.reason }

// route decides, and waits as long as an undecided destination may become known.
func (s *servedPod) route(ctx context.Context, query route.Flow) (route.Decision, error) {
	var timeout <-chan time.Time
	for {
		snapshot, changed := s.cfg.Store.Load()
		d := route.Decide(snapshot, query, nil)
		switch d.Action {
		case route.Tunnel, route.Passthrough:
			return d, nil
		case route.Refuse:
			return d, &routeError{d.Reason}
		case route.Wait:
		}
		if timeout == nil {
			timer := time.NewTimer(s.cfg.DiscoveryWait)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-changed:
		case <-timeout:
			return d, &routeError{fmt.Sprintf("%s, not even after %v", d.Reason, s.cfg.DiscoveryWait)}
		case <-ctx.Done():
			return d, context.Cause(ctx)
		}
	}
}

func (s *servedPod) dialDirect(ctx context.Context, f *flow, target netip.AddrPort) (leg, error) {
	if err := s.openFiles(f, 2); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ConnectTimeout)
	defer cancel()
	conn, err := s.pod.DialDirect(ctx, target)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", target, err)
	}
	_ = conn.SetKeepAliveConfig(keepAlive()) // without it a dead host is found later
	f.attempt.Socket = conn
	return newTCPLeg(conn, "the destination")
}

// openTunnel asks the peer at d.Target for a stream to it, which first may begin.
func (s *servedPod) openTunnel(ctx context.Context, f *flow, d route.Decision, trace string, first *hbone.First) (leg, error) {
	var tunnel *hbone.Tunnel
	err := s.reachPeer(ctx, f, d, trace, func(ctx context.Context, key hbone.Key, r *hbone.Request) (_ *hbone.Conn, _ io.Closer, err error) {
		mode := s.transportMode(f.attempt.Source.Workload)
		quic, why := s.transport(mode, d.Workload, key.Remote)
		tunnel, err = byQUIC(ctx, s, quic, key, func(c *hbone.Client) (*hbone.Tunnel, error) { return c.OpenWith(ctx, key, r, first) })
		if err != nil {
			return nil, nil, err
		}
		f.attempt.Transport = carriedBy(tunnel.Conn, why)
		if mode == dataplane.TransportAuto {
			s.hearPath(tunnel)
		}
		return tunnel.Conn, tunnel, nil
	})
	if err != nil {
		return nil, err
	}
	tunnel.Response = nil // nobody reads it: not to be held
	return newStreamLeg(tunnel, "the peer"), nil
}

// reachPeer has open ask the peer at d.Target for what f needs: it returns the connection that
// carries it, and what ends it.
func (s *servedPod) reachPeer(ctx context.Context, f *flow, d route.Decision, trace string, open func(context.Context, hbone.Key, *hbone.Request) (*hbone.Conn, io.Closer, error)) error {
	key, request := s.tunnelRequest(f, d, trace)
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ConnectTimeout)
	defer cancel()
	if err := s.cfg.Certs.Ready(ctx, s.identity); err != nil {
		return &credentialError{err}
	}
	s.retireOld()
	conn, opened, err := open(ctx, key, request)
	if err != nil {
		s.countTLSError(err)
		return err
	}
	f.setTunnel(s, conn)
	// From here on recheckTrust sees the tunnel; what was revoked before is seen here.
	if err := s.revoked(conn); err != nil {
		_ = opened.Close()
		return err
	}
	return nil
}

// tunnelRequest is what f asks the peer at d.Target for, and in which session.
func (s *servedPod) tunnelRequest(f *flow, d route.Decision, trace string) (hbone.Key, *hbone.Request) {
	remote := netip.AddrPortFrom(d.Target.Addr(), dataplane.PortTunnel)
	f.attempt.Tunnel = remote
	f.attempt.Source.Identity, f.attempt.Destination.Identity = s.identity, d.Workload.Identity
	source := f.attempt.Source
	key := hbone.Key{
		Source: s.identity.String(), Peer: d.Workload.Identity.String(),
		Remote: remote, Local: sourceAddr(source, remote.Addr()),
	}
	request := &hbone.Request{
		Authority:   d.Target.String(),
		Forwarded:   hbone.Forwarded{For: source.Addr},
		TraceParent: trace,
	}
	if d.Service != nil {
		request.Forwarded.Host = d.Service.Host
	}
	if source.Workload != nil {
		request.Baggage = s.baggage(source.Workload)
	}
	return key, request
}

// sourceAddr is the pod's address of the same family as remote: the application's own
// address for the connection, unless that is not one of the pod's.
func sourceAddr(source telemetry.Peer, remote netip.Addr) netip.Addr {
	local := source.Addr.Addr()
	if w := source.Workload; w != nil {
		for _, a := range w.Addrs {
			if a.Is4() == remote.Is4() {
				local = a
				if a == source.Addr.Addr() {
					break
				}
			}
		}
	}
	return local
}
