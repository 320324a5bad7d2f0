package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/dataplane/route"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
)

// open brings up a flow that the application began, and sends what it has said by then.
func (f *datagramFlow) open() {
	s := f.u.s
	trace := hbone.NewTraceParent()
	f.flow.attempt = &telemetry.Attempt{
		ID: traceParentID(trace), Direction: telemetry.Outbound, Started: f.begin, UDP: true,
		Source: telemetry.Peer{Addr: f.ends.app}, Destination: telemetry.Peer{Addr: f.ends.peer},
	}
	_, _, f.flow.attempt.Source.Workload = s.workload()
	stream, sent, err := f.reach(trace)
	if err != nil {
		s.refused(f.ctx, f.flow, err)
		var unroutable *routeError
		if errors.Is(err, syscall.ECONNREFUSED) { // the peer found out before its answer was here
			f.End(err)
			return
		}
		if errors.As(err, &unroutable) {
			_ = f.u.d.Refuse(f.ends.app, f.ends.peer) // or the application waits for an answer
		}
		f.fail()
		return
	}
	if !f.up(stream) {
		return
	}
	for _, p := range sent {
		f.moved(len(p), true)
	}
	f.send()
}

// reach opens the tunnel: endpoints of a service are tried one after the other. The datagrams
// that it returns have gone along.
func (f *datagramFlow) reach(trace string) (hbone.DatagramStream, [][]byte, error) {
	s := f.u.s
	query := route.Flow{Source: f.flow.attempt.Source.Workload, Node: s.cfg.Node, Dst: f.ends.peer, UDP: true}
	first := f.firsts()
	var failed error
	for range maxEndpoints {
		d, err := s.route(f.ctx, query)
		f.flow.routed(d, f.ends.peer)
		switch {
		case err != nil:
			return nil, nil, then(failed, err)
		case d.Action == route.Passthrough:
			return nil, nil, then(failed, &routeError{d.Reason + ", so that it carries no UDP in tunnels"})
		}
		stream, err := f.u.openDatagrams(f.ctx, f.flow, d, trace, first)
		if err == nil {
			return stream, first, nil
		}
		failed = then(failed, err)
		if d.Alternates == 0 || f.ctx.Err() != nil || isFinal(err) || errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
		query.Exclude = append(slices.Clone(query.Exclude), d.Target)
	}
	return nil, nil, failed
}

// openDatagrams asks the peer at d.Target for a flow to it.
func (u *datagramPod) openDatagrams(ctx context.Context, f *flow, d route.Decision, trace string, first [][]byte) (hbone.DatagramStream, error) {
	var tunnel *hbone.Flow
	err := u.s.reachPeer(ctx, f, d, trace, func(ctx context.Context, key hbone.Key, r *hbone.Request) (_ *hbone.Conn, _ io.Closer, err error) {
		tunnel, err = byQUIC(ctx, u.s, u.quic, key, func(c *hbone.Client) (*hbone.Flow, error) { return c.OpenDatagrams(ctx, key, r, first) })
		if err != nil {
			return nil, nil, err
		}
		return tunnel.Conn, tunnel, nil
	})
	if err != nil {
		return nil, err
	}
	return tunnel, nil
}

// serveDatagrams brings up the flow that one request for UDP to the pod asks for.
func (s *servedPod) serveDatagrams(r *hbone.ServerRequest) {
	u := s.datagrams()
	if u == nil {
		r.Reject(statusNoUDP)
		return
	}
	identity, identityErr := certs.PeerIdentity(r.Conn.TLS)
	client := clientOf(r)
	f := u.newFlow(ends{app: r.Target, peer: client}, telemetry.Inbound)
	f.flow.describe(s, telemetry.Peer{Addr: client, Identity: identity}, r.Target, r.Conn.Remote.Addr())
	f.flow.attempt.UDP = true
	f.flow.tunnelled(s, r)
	cancel := f.flow.cancel // of the set-up, whatever it is later
	defer context.AfterFunc(r.Context, func() { cancel(cmp.Or(context.Cause(u.ctx), errStreamEnded)) })()
	if err := u.enter(f); err != nil {
		f.flow.cancel(nil)
		r.Reject(503)
		s.refused(f.ctx, f.flow, err)
		return
	}
	err := f.admit(r, identityErr)
	if err == nil {
		err = u.install(f)
	}
	if err != nil {
		r.Reject(statusOf(err))
		s.refused(f.ctx, f.flow, err)
		f.end(err)
		return
	}
	stream, err := r.AcceptDatagrams(s.response(f.flow))
	if err != nil {
		s.refused(f.ctx, f.flow, fmt.Errorf("answer the peer: %w", err))
		f.end(err)
		return
	}
	if f.up(stream) {
		u.spawn(f.send) // what the application said meanwhile
	}
}

// statusNoUDP is the answer where UDP is not captured: 501, as from an agent that knows none.
const statusNoUDP = 501

// admit is in the order of HBONE's checks.
func (f *datagramFlow) admit(r *hbone.ServerRequest, identityErr error) error {
	s := f.u.s
	if err := s.checkTunnel(r, identityErr); err != nil {
		return err
	}
	return s.permit(f.flow)
}
