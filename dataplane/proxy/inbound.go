package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/lazyctx"
)

// serveInbound owns conn, plaintext that somebody opened to the pod.
func (s *servedPod) serveInbound(live context.Context, conn *netns.Conn) {
	destination, client := s.addresses(conn)
	ctx, f := s.inboundFlow(live, telemetry.Peer{Addr: client}, destination, client.Addr())
	f.attempt.Socket = conn
	_ = conn.SetKeepAliveConfig(keepAlive()) // without it a dead host is found later
	source, err := newTCPLeg(conn, "the client")
	if err == nil {
		err = s.begin(f)
		if err != nil {
			source.abort()
		}
	}
	if err != nil {
		f.cancel(nil)
		s.refused(ctx, f, err)
		return
	}
	var app *tcpLeg
	if err = checkPort(destination); err == nil {
		err = s.openFiles(f, 2)
	}
	if err == nil {
		// Not from the client's port: that connection's own socket is in the pod too.
		app, err = s.admit(ctx, f, netip.AddrPortFrom(client.Addr(), 0), false)
	}
	if err != nil {
		source.abort()
		s.refused(ctx, f, err)
		s.end(f)
		return
	}
	s.relay(ctx, f, source, app, 0)
}

// inboundFlow is a connection to the pod, before anything is decided.
func (s *servedPod) inboundFlow(live context.Context, source telemetry.Peer, destination netip.AddrPort, from netip.Addr) (context.Context, *flow) {
	f := &flow{}
	f.describe(s, source, destination, from)
	ctx := lazyctx.New(live, 0)
	f.cancel = ctx.End
	return ctx, f
}

// describe notes what is known of an inbound flow before anything is decided.
func (f *flow) describe(s *servedPod, source telemetry.Peer, destination netip.AddrPort, from netip.Addr) {
	snapshot, _, own := s.workload()
	if snapshot != nil {
		source.Workload = snapshot.WorkloadAt(from)
	}
	f.attempt = &telemetry.Attempt{
		ID: telemetry.NewID(), Direction: telemetry.Inbound, Started: time.Now(), Source: source,
		Destination: telemetry.Peer{Addr: destination, Workload: own},
	}
	f.guarded = &guarded{request: authz.Request{Peer: source.Identity, Source: from, Destination: destination}}
}

// errNotServed is a pod that is not one of this node's any more.
var errNotServed = errors.New("the pod is not one of this node's enrolled pods")

// permit authorizes f, to a pod that is this node's.
func (s *servedPod) permit(f *flow) error {
	if err := s.authorize(f); err != nil {
		return err
	}
	if _, now, _ := s.workload(); now == nil || now.Node != s.cfg.Node && s.cfg.Node != "" {
		return errNotServed
	}
	return nil
}

// admit permits f and dials the application from the client's address; begun says that the client's first
// bytes are there.
func (s *servedPod) admit(ctx context.Context, f *flow, client netip.AddrPort, begun bool) (*tcpLeg, error) {
	if err := s.permit(f); err != nil {
		return nil, err
	}
	patience := lazyctx.New(ctx, s.cfg.ConnectTimeout)
	defer patience.End(nil)
	app := f.guarded.request.Destination
	conn, err := s.pod.DialApp(patience, client, app, begun)
	if err != nil {
		return nil, &appError{app: app, err: err}
	}
	return newTCPLeg(conn, "the application")
}

// appError is an application that could not be reached.
type appError struct {
	app netip.AddrPort
	err error
}

func (e *appError) Error() string {
	return fmt.Sprintf("connect to the application at %s: %v", e.app, e.err)
}
func (e *appError) Unwrap() error { return e.err }

// requestError is a request that makes no sense.
type requestError struct{ err error }

func (e *requestError) Error() string { return e.err.Error() }
func (e *requestError) Unwrap() error { return e.err }

// tunnelServer accepts the pod's tunnels.
func (s *servedPod) tunnelServer() *hbone.Server {
	transport := s.cfg.ServerTransport
	if transport == nil {
		transport = h2.Server{Budget: windows{&s.buffers}, Datagrams: s.cfg.UDP}
	}
	return hbone.NewServer(hbone.ServerConfig{
		TLS:           s.cfg.Certs.ServerTLS(s.identity),
		Transport:     transport,
		Handler:       s.serveTunnel,
		Datagrams:     s.serveDatagrams,
		MaxHandshakes: s.cfg.Limits.PodHandshakes,
		MaxConns:      s.cfg.Limits.PodTunnels,
		OnHandshakeError: func(remote netip.AddrPort, err error) {
			switch {
			case errors.Is(err, hbone.ErrTooManyConns):
				s.warn.bit(limitPodTunnels, s.uid, int64(s.cfg.Limits.PodTunnels))
				return
			case errors.Is(err, hbone.ErrTooManyHandshakes):
				s.warn.bit(limitPodHandshakes, s.uid, int64(s.cfg.Limits.PodHandshakes))
				return
			}
			s.cfg.Telemetry.HandshakeFailed(telemetry.Inbound, string(certs.CauseOf(err)))
			s.cfg.Log.Debug("refuse tunnel connection", "pod", s.uid, "remote", remote, "error", err)
		},
		Log: s.cfg.Log,
	})
}

// serveTunnel serves one CONNECT to the pod.
func (s *servedPod) serveTunnel(r *hbone.ServerRequest) {
	identity, identityErr := certs.PeerIdentity(r.Conn.TLS)
	client := clientOf(r)
	ctx, f := s.inboundFlow(r.Context, telemetry.Peer{Addr: client, Identity: identity}, r.Target, r.Conn.Remote.Addr())
	f.tunnelled(s, r)
	if err := s.begin(f); err != nil {
		f.cancel(nil)
		r.Reject(503)
		s.refused(ctx, f, err)
		return
	}
	err := s.checkTunnel(r, identityErr)
	var app *tcpLeg
	if err == nil {
		app, err = s.admit(ctx, f, client, r.Begun != nil && r.Begun())
	}
	if err != nil {
		r.Reject(statusOf(err))
		s.refused(ctx, f, err)
		s.end(f)
		return
	}
	stream, err := r.Accept(s.response(f))
	if err != nil {
		app.abort()
		s.refused(ctx, f, fmt.Errorf("answer the peer: %w", err))
		s.end(f)
		return
	}
	s.relay(ctx, f, newStreamLeg(stream, "the peer"), app, 0)
}

// tunnelled notes the tunnel of an inbound flow, which is described.
func (f *flow) tunnelled(s *servedPod, r *hbone.ServerRequest) {
	f.attempt.Destination.Identity = s.identity
	f.attempt.Tunnel = r.Conn.Local
	f.attempt.Socket = tcpOf(r.Conn)
	f.attempt.Transport = carriedBy(r.Conn, "")
	f.attempt.Service = s.requestedService(r, f.attempt.Destination.Workload)
	f.tunnel = r.Conn
}

// checkTunnel is HBONE's checks but for authorization, in their order. identityErr is why the peer
// has no identity.
func (s *servedPod) checkTunnel(r *hbone.ServerRequest, identityErr error) error {
	if err := checkRequest(r); err != nil {
		return err
	}
	if identityErr != nil {
		return &deniedError{cause: identityErr.Error()}
	}
	return s.revoked(r.Conn)
}

// response describes the destination of f to the peer.
func (s *servedPod) response(f *flow) hbone.Response {
	r := hbone.Response{Path: s.tellPath(f.tunnel)}
	if w := f.attempt.Destination.Workload; w != nil {
		r.Baggage = s.baggage(w)
	}
	return r
}

// errStreamEnded is a tunnel that its peer gave up, or whose connection was lost.
var errStreamEnded = errors.New("the peer reset the stream or its connection was lost")

// causeOf is why ctx, that of a connection's set-up, has ended. A stream's ends without a cause.
func causeOf(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != context.Canceled { //nolint:errorlint // a cause may wrap it
		return cause
	}
	return errStreamEnded
}

// clientOf is who opened the connection: the forwarded header is believed for the port
// alone, and only when it names the address that the tunnel comes from.
func clientOf(r *hbone.ServerRequest) netip.AddrPort {
	if f := r.Forwarded.For; f.IsValid() && f.Addr().Unmap() == r.Conn.Remote.Addr() {
		return netip.AddrPortFrom(r.Conn.Remote.Addr(), f.Port())
	}
	return r.Conn.Remote
}

func checkRequest(r *hbone.ServerRequest) error {
	switch {
	case !r.Target.IsValid():
		return &requestError{fmt.Errorf("the authority %q is not an address and port", r.Authority)}
	case r.Target.Addr().Unmap() != r.Conn.Local.Addr():
		return &requestError{fmt.Errorf("the authority %s is not the address %s that the tunnel reached", r.Target, r.Conn.Local.Addr())}
	}
	return checkPort(r.Target)
}

// checkPort refuses what would make the data plane talk to itself.
func checkPort(app netip.AddrPort) error {
	if dataplane.IsDataPlanePort(app.Port()) || app.Port() == 0 {
		return &requestError{fmt.Errorf("port %d is not an application's", app.Port())}
	}
	return nil
}

// statusOf is the answer to a request that ended with err.
func statusOf(err error) int {
	var request *requestError
	var denied *deniedError
	switch {
	case errors.As(err, &request):
		return 400
	case errors.As(err, &denied):
		return 401
	default:
		return 503
	}
}

// requestedService is the service that the client says it asked for, if the pod is behind it.
// It is for telemetry only; what is not known here is left out, so that no peer can invent
// labels.
func (s *servedPod) requestedService(r *hbone.ServerRequest, own *dataplane.Workload) *dataplane.Service {
	snapshot, _ := s.cfg.Store.Load()
	name, rest, ok := strings.Cut(r.Forwarded.Host, ".")
	if snapshot == nil || own == nil || !ok {
		return nil
	}
	namespace, _, _ := strings.Cut(rest, ".")
	service := snapshot.Service(dataplane.Name{Namespace: namespace, Name: name})
	if service == nil || service.Host != r.Forwarded.Host {
		return nil
	}
	for i := range service.Endpoints {
		if service.Endpoints[i].WorkloadUID == own.UID {
			return service
		}
	}
	return nil
}
