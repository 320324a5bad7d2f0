// Package hbone is the tunnel: HTTP/2 CONNECT over mutual TLS 1.3, wire-compatible with
// ztunnel, Istio's sidecars and waypoints. It knows nothing of Kubernetes, eBPF or
// workloads: a caller hands it connections, *tls.Config values and addresses.
//
//	Client.Open ──► pool of transport sessions, one per Key ──► CONNECT ──► Stream
//	Server.Serve ─► TLS accept ─► transport session ─► CONNECT ─► Handler(*Request) ─► Stream
//
// The transports carry no policy. Package h2 is on TCP, behind ClientTransport and
// ServerTransport; package h3 is on QUIC, which is connection and TLS in one, behind Connector
// and Endpoint.
package hbone

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
)

// Stream is one tunnelled byte stream. Read and Write may be called concurrently with each
// other and with the rest; Read returns io.EOF only after the peer ended its direction
// cleanly, any other end is an error, so a truncated transfer never looks complete.
type Stream interface {
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
	// Offer takes all of a short p if that needs no waiting, or else nothing. It is sent with
	// what others offer on the same connection, at the latest by Push.
	Offer(p []byte) bool
	// OfferEnd is CloseWrite if that needs no waiting, and sent as what is offered.
	OfferEnd() bool
	// Push sends what was offered.
	Push()
	// CloseWrite ends our direction cleanly (END_STREAM); reading goes on.
	CloseWrite() error
	// Close releases the stream. Unless both directions ended cleanly before, the peer
	// sees RST_STREAM. It may be called again and from any goroutine, and unblocks
	// Read and Write.
	Close() error

	// Deliver has the stream hand what it receives to sink, from now on and in place of
	// Read, which must not be called any more. It is called once.
	Deliver(sink Sink)
	// Resume goes on after Sink.Full, and reports whether the sink has taken all that was
	// waiting. If not, it is called again when there is room. One goroutine calls it.
	Resume() bool
}

// Sink takes what a stream receives, on the goroutine that received it, so that an idle
// stream needs none of its own. Its methods must not wait, or they hold up every stream of
// the connection; they are not called at the same time, End with an error excepted. They may
// call the stream's methods. None is called after Close has returned but those that run.
type Sink interface {
	// Take is given bytes, which are the transport's again when it returns. It returns how
	// many it took: fewer than all when it has no room. last says that End(nil) comes right
	// behind if all is taken; a transport need not know.
	Take(p []byte, last bool) int
	// Full is called after Take took less than all. Take is not called again before
	// Stream.Resume. Until then the peer may send what the stream's window allows.
	Full()
	// End tells that nothing comes any more: nil after the peer ended its direction cleanly
	// and all was taken, an error for any other end. An error may come after nil: the stream
	// was reset while it could be written.
	End(err error)
}

// Request is a CONNECT request's content.
type Request struct {
	// Authority is ip:port, [v6]:port or host:port: the target, never its own port.
	Authority string
	// Forwarded is the original client and the service it asked for.
	Forwarded Forwarded
	// Baggage describes the workload that sends it. Informational: identity comes from
	// the certificate alone.
	Baggage Baggage
	// TraceParent is a W3C trace context, "" to start none.
	TraceParent string
}

// Forwarded is the content of the `forwarded` header (RFC 7239) as HBONE uses it.
type Forwarded struct {
	For  netip.AddrPort // zero: absent
	Host string         // the service that was asked for, "" when none
}

// Baggage is the content of the `baggage` header (W3C Baggage) with the keys that Istio uses.
type Baggage struct {
	Cluster      string // k8s.cluster.name
	Namespace    string // k8s.namespace.name
	WorkloadKind string // deployment, cronjob, pod or job: the middle of k8s.<kind>.name
	WorkloadName string
	Service      string // service.name
	Version      string // service.version
	Region       string // cloud.region
	Zone         string // cloud.availability_zone
}

// Key says which pooled session may carry a stream. Two streams share a TLS connection
// only when all of it is equal.
type Key struct {
	Source string         // our identity, as text
	Peer   string         // the identity (or identities) that the peer must prove, as text
	Remote netip.AddrPort // the peer's tunnel port
	Local  netip.Addr     // the source address
}

// Session is a client's live transport connection to one peer.
type Session interface {
	// Start begins with a CONNECT, which leaves with the first Send. It uses up a
	// reservation; its error is as Answer's.
	Start(r *Request) (Opening, error)
	// OpenDatagrams begins with an extended CONNECT for UDP to r.Authority and waits for the
	// answer. The payloads of first are sent behind it, as far as that does not wait. It uses
	// up a reservation; its error is as Answer's without ErrUncertain, or wraps
	// ErrNoDatagrams, or PortClosedError when the peer has found that out already.
	OpenDatagrams(ctx context.Context, r *Request, first [][]byte) (DatagramStream, *Response, error)
	// Reserve sets a place aside for one Start or OpenDatagrams that follows; false when it is
	// full, draining or dead.
	Reserve() bool
	// Release gives a reservation back that nothing will use.
	Release()
	// Capacity is how many more streams it can carry now; 0 when full, draining or dead.
	Capacity() int
	// Streams is how many it carries now.
	Streams() int
	// Busy reports whether it moved so much lately that what is sent waits behind it.
	Busy() bool
	// Done is closed when its connection has ended. (A draining one still carries the
	// streams that it has: its Capacity is 0, and it ends with the last of them.)
	Done() <-chan struct{}
	// Retire ends it when the streams that it carries have ended, and the peer has what was
	// sent in them. It takes no more.
	Retire() error
	// Close ends it at once, and its streams with an error.
	Close() error
}

// Opening is a stream that the peer has not answered yet. One goroutine uses it, and ends with
// Answer or Close.
type Opening interface {
	// Send sends CONNECT, if it was not sent yet, and first bytes behind it, as many as the
	// peer's window takes: it does not wait for more. With end and all of p it ends our
	// direction as well. It returns how many it sent; why nothing can be sent Answer tells.
	Send(p []byte, end bool) int
	// Settled is closed when Answer would not wait any more.
	Settled() <-chan struct{}
	// Answer waits for the response: a Stream on 200, a *StatusError on another status,
	// ErrRefused when the peer certainly did not process it (REFUSED_STREAM, GOAWAY with a
	// lower last stream), or has got no bytes and is gone, so that it may be tried again
	// elsewhere. Where bytes were sent, any other error is ErrUncertain.
	//
	// ctx bounds the opening alone: the stream outlives it.
	Answer(ctx context.Context) (Stream, *Response, error)
	// Close gives it up; the peer sees RST_STREAM. After Answer it does nothing.
	Close()
}

// Response is what a peer said beside 200.
type Response struct {
	Baggage Baggage
	Path    string // what the peer lost of what it sent, in agents' own words; "" for nothing
}

// ClientTransport makes a Session from a TLS connection on a Wire whose handshake has completed.
// The session owns the connection, also when NewSession fails. ctx bounds the making only.
type ClientTransport interface {
	NewSession(ctx context.Context, conn *tls.Conn) (Session, error)
}

// Connector makes sessions of a transport that is not on TCP.
type Connector interface {
	// Connect makes a session with key.Remote whose peer cfg verifies; NextProtos is the
	// connector's to set. ctx bounds the making only. Its error is or wraps a *DialError when
	// nothing answered in time, a *TLSError when the handshake did not succeed.
	Connect(ctx context.Context, key Key, cfg *tls.Config) (Session, *Conn, error)
}

// ServerTransport serves one TLS connection on a Wire whose handshake has completed until it ends or
// ctx does: then it drains (GOAWAY, streams run on) until drained, or until force is done.
// It owns the connection, returns after the last call of serve has returned, and its error
// is nil unless the peer broke the protocol or vanished.
type ServerTransport interface {
	ServeConn(ctx, force context.Context, conn *tls.Conn, serve func(*ServerRequest)) error
}

// Endpoint accepts connections of a transport that is not on TCP.
type Endpoint interface {
	// Listen begins to accept connections as gate allows, with cfg, whose NextProtos are the
	// endpoint's to set. It is called again after the Listener's Close.
	Listen(cfg *tls.Config, gate *Gate) (Listener, error)
}

// Listener gives the connections of an Endpoint.
type Listener interface {
	// Accept waits for a connection whose handshake has completed. Its error is ctx's, or
	// for good.
	Accept(ctx context.Context) (Accepted, error)
	// Close has the endpoint refuse new connections; those that Accept gave live on.
	Close() error
}

// Accepted is a connection whose handshake has completed. Exactly one of Serve and Refuse is
// called.
type Accepted interface {
	Conn() *Conn
	// Admission is what the gate gave for it.
	Admission() *Admission
	// Serve is as ServerTransport.ServeConn.
	Serve(ctx, force context.Context, serve func(*ServerRequest)) error
	// Refuse closes it unserved.
	Refuse()
}

// ServerRequest is a CONNECT that arrived, not yet answered.
type ServerRequest struct {
	// Request is what the headers say, already parsed. All of it is untrusted. The Authority
	// of a request for UDP is the target that its path names.
	Request
	// Protocol is what it asks to have carried.
	Protocol Protocol
	// Target is Authority when it is ip:port; otherwise zero, and Authority is host:port.
	Target netip.AddrPort
	// Conn is the tunnel connection that carries it.
	Conn *ServerConn
	// Context ends with the stream, the connection, the server's force, or when the Handler
	// has returned.
	Context context.Context
	// Begun, if set, reports whether first bytes of the stream are there.
	Begun func() bool

	// Accept answers 200 and returns the stream; Reject answers with a status and ends it.
	// AcceptDatagrams takes the place of Accept in a request for UDP; each is nil in requests
	// of the other protocol. Exactly one of them is called, once; a later call changes
	// nothing, and a request whose Handler returned without one is reset.
	Accept          func(Response) (Stream, error)
	AcceptDatagrams func(Response) (DatagramStream, error)
	Reject          func(status int)
}

// Conn is what either end knows of a tunnel connection.
type Conn struct {
	Local, Remote netip.AddrPort // unmapped
	TLS           tls.ConnectionState
	Raw           net.Conn // for TCP_INFO; never read, written or closed. nil where it is not TCP
}

// ServerConn is a Conn as a server sees it.
type ServerConn = Conn

// NewConn describes a connection whose handshake has completed.
func NewConn(conn *tls.Conn) *Conn {
	return &Conn{
		Local:  addrPort(conn.LocalAddr()),
		Remote: addrPort(conn.RemoteAddr()),
		TLS:    conn.ConnectionState(),
		Raw:    unwrapped(conn.NetConn()),
	}
}

// unwrapped is the connection beneath a Wire.
func unwrapped(c net.Conn) net.Conn {
	if w, ok := c.(*Wire); ok {
		return w.Conn
	}
	return c
}

// addrPort is a TCP or UDP address unmapped, and zero for one of another kind.
func addrPort(a net.Addr) netip.AddrPort {
	inet, ok := a.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return netip.AddrPort{}
	}
	ap := inet.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Handler decides and serves one CONNECT. A stream that it accepted and left to a sink outlives
// it until it is closed; any other is closed when it returns.
type Handler func(*ServerRequest)
