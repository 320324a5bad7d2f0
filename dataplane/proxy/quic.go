package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
)

// quicTunnels are a pod's tunnels over QUIC, on one socket, which carry its flows of UDP, and its
// connections where that was asked for. Where nothing answers there they go by HTTP/2 (RFC 9298
// section 3.4). There is an endpoint, which takes memory, once there is something for it: a packet
// on the socket, or a tunnel to open.
type quicTunnels struct {
	conn   *net.UDPConn
	make   func() (*h3.Endpoint, error)
	client *hbone.Client

	up       chan struct{} // closed when endpoint or err is set
	endpoint *h3.Endpoint
	err      error

	mu      sync.Mutex
	woken   bool                         // nobody waits for the first packet any more
	blocked map[netip.AddrPort]time.Time // peers that did not answer, until when
}

const (
	// quicPatience bounds the wait for a peer's first answer.
	quicPatience = 3 * time.Second
	// maxConnFlows is how many flows and streams share a connection: nearly as many as a peer of ours takes
	// (h3.Config.MaxStreams), since each connection costs more than a flow.
	maxConnFlows = 900
	// blockedPause is how long a peer that did not answer is not asked again.
	blockedPause = time.Minute
	// maxBlocked bounds the memory of them.
	maxBlocked = 4096
)

// newQUIC is nil where d has no socket.
func (s *servedPod) newQUIC(d Datagrams) (*quicTunnels, error) {
	conn, mark, err := d.QUIC()
	if conn == nil || err != nil {
		return nil, err
	}
	q := &quicTunnels{conn: conn, up: make(chan struct{}), blocked: make(map[netip.AddrPort]time.Time)}
	q.make = func() (*h3.Endpoint, error) {
		cfg := h3.Config{
			Conn: conn, Mark: mark, Budget: windows{&s.buffers}, ResetKey: s.cfg.ResetKey, Datagrams: true, Log: s.cfg.Log,
		}
		if s.cfg.CountQUICDrops {
			cfg.QueueDropped = s.quicDropped
		}
		return h3.New(cfg)
	}
	cfg := s.clientConfig()
	cfg.Connector = q
	cfg.ConnectTimeout = min(cfg.ConnectTimeout, quicPatience)
	cfg.MaxStreamsPerConn = maxConnFlows
	q.client = hbone.NewClient(cfg)
	return q, nil
}

// quicDropped counts a datagram of a tunnel that the pod opened, or a peer.
func (s *servedPod) quicDropped(client bool) {
	d := telemetry.Inbound
	if client {
		d = telemetry.Outbound
	}
	s.cfg.Telemetry.DatagramsDropped(d, dropQUIC, 1)
}

// serve waits for something to do and serves what peers ask for, until ctx ends and what lives has
// ended, or force is done.
func (q *quicTunnels) serve(ctx, force context.Context, server *hbone.Server) error {
	if q == nil {
		return nil
	}
	q.endpoint, q.err = q.begin(ctx)
	close(q.up)
	if ctx.Err() != nil && q.err != nil {
		return nil // there was nothing to do
	}
	if q.err != nil {
		return q.err
	}
	return server.ServeEndpoint(ctx, force, q.endpoint)
}

func (q *quicTunnels) begin(ctx context.Context) (*h3.Endpoint, error) {
	defer context.AfterFunc(ctx, q.wake)()
	if err := netns.AwaitDatagram(q.conn); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, err
	}
	q.mu.Lock()
	q.woken = true
	q.mu.Unlock()
	if err := cmp.Or(context.Cause(ctx), q.conn.SetReadDeadline(time.Time{})); err != nil {
		return nil, err
	}
	return q.make()
}

// wake ends the wait for the first packet.
func (q *quicTunnels) wake() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.woken {
		q.woken = true
		_ = q.conn.SetReadDeadline(time.Unix(1, 0)) // fails when it is closed, which ends the wait
	}
}

// Connect implements hbone.Connector.
func (q *quicTunnels) Connect(ctx context.Context, key hbone.Key, cfg *tls.Config) (hbone.Session, *hbone.Conn, error) {
	q.wake()
	select {
	case <-q.up:
	case <-ctx.Done():
		return nil, nil, &hbone.DialError{Remote: key.Remote, Err: context.Cause(ctx)}
	}
	if q.err != nil {
		return nil, nil, &hbone.DialError{Remote: key.Remote, Err: q.err}
	}
	return q.endpoint.Connect(ctx, key, cfg)
}

// close is called after serve has returned.
func (q *quicTunnels) close() error {
	if q == nil {
		return nil
	}
	err := q.client.Close()
	if q.endpoint == nil {
		return errors.Join(err, q.conn.Close())
	}
	return errors.Join(err, q.endpoint.Close())
}

func (q *quicTunnels) isBlocked(peer netip.AddrPort) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	until, there := q.blocked[peer]
	if there && time.Now().After(until) {
		delete(q.blocked, peer)
		there = false
	}
	return there
}

func (q *quicTunnels) block(peer netip.AddrPort) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.blocked) >= maxBlocked {
		clear(q.blocked)
	}
	q.blocked[peer] = time.Now().Add(blockedPause)
}

// byQUIC has open ask by QUIC, and by HTTP/2 where no connection to the peer comes up.
func byQUIC[T any](ctx context.Context, s *servedPod, q *quicTunnels, key hbone.Key, open func(*hbone.Client) (T, error)) (T, error) {
	if q == nil || q.isBlocked(key.Remote) {
		return open(s.client)
	}
	t, err := open(q.client)
	var dial *hbone.DialError
	switch {
	case errors.Is(err, hbone.ErrClosed): // the pod's UDP was released meanwhile
	case err == nil, !errors.As(err, &dial), ctx.Err() != nil:
		return t, err
	default:
		q.block(key.Remote)
		s.cfg.Log.Warn("tunnels to a peer go by HTTP/2: nothing answers at its UDP port 15008, which a NetworkPolicy may be blocking",
			"pod", s.uid, "peer", key.Remote, "for", blockedPause, "error", err)
	}
	t, slow := open(s.client)
	if slow != nil {
		return t, fmt.Errorf("%w; and over HTTP/2: %w", err, slow)
	}
	return t, nil
}
