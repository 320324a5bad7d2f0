package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
)

// quicTunnels are a pod's tunnels over QUIC, on one socket, which carry its flows of UDP, and its
// connections where that was asked for. Where nothing answers there they go by HTTP/2 (RFC 9298
// section 3.4).
type quicTunnels struct {
	endpoint *h3.Endpoint
	client   *hbone.Client

	mu      sync.Mutex
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
	conn, err := d.QUIC()
	if conn == nil || err != nil {
		return nil, err
	}
	endpoint, err := h3.New(h3.Config{
		Conn: conn, Budget: windows{&s.buffers}, ResetKey: s.cfg.ResetKey, Datagrams: true, Log: s.cfg.Log,
	})
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	cfg := s.clientConfig()
	cfg.Connector = endpoint
	cfg.ConnectTimeout = min(cfg.ConnectTimeout, quicPatience)
	cfg.MaxStreamsPerConn = maxConnFlows
	return &quicTunnels{endpoint: endpoint, client: hbone.NewClient(cfg), blocked: make(map[netip.AddrPort]time.Time)}, nil
}

func (q *quicTunnels) close() error {
	if q == nil {
		return nil
	}
	return errors.Join(q.client.Close(), q.endpoint.Close())
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
