// Package h3 carries HBONE over HTTP/3 (RFC 9114) on QUIC: byte streams by CONNECT, UDP by
// CONNECT-UDP (RFC 9298) with datagrams (RFC 9297, RFC 9221). QUIC is quic-go's, QPACK as well;
// the layer of HTTP/3 is its own, as in package h2: quic-go's http3 speaks net/http, gives every
// stream a queue of 32 datagrams and a goroutine to wait on it, and takes a DATA frame that is
// cut short for its stream's clean end.
//
//	                ┌───────────────── conn ─────────────────┐
//	Sink ◄── pump ◄─┤ a quic.Stream: HEADERS, DATA, DATA, …  │
//	Write ─────────►│                                        ├── QUIC ── Endpoint ── UDP 15008
//	Sink ◄── read ◄─┤ a quic.Stream: HEADERS, capsules       │            (one socket for all
//	Sink ◄──────────┤ one receiveDatagrams for all flows     │             peers of a pod)
//	                └────────────────────────────────────────┘
//
// quic-go's reads block, so that every stream has a goroutine while it is open; it holds no
// buffer while nothing comes. A connection has four more, beside quic-go's own.
//
// What a peer may send unread is bounded by the windows of streams alone, as with h2, and is memory of
// a hbone.Budget; window.go has how. A connection reserves 96 KiB, and each stream or flow 6 KiB of the 32
// KiB that its peer may send at first. So streams that are neither fast nor stopped may hold a bit more
// than five times what they reserve, if their peer means to; all others reserve what they may hold.
package h3

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"

	"github.com/raceway-mesh/raceway/hbone"
)

// alpn is HTTP/3 (RFC 9114 section 3.1).
const alpn = "h3"

// Config is what an Endpoint needs. Conn is required.
type Config struct {
	// Conn is the socket for all of the endpoint's connections, as it is: quic-go finds out
	// how to send and receive in batches (GSO, recvmmsg). It belongs to the endpoint.
	Conn *net.UDPConn
	// PingInterval is how long a connection is silent before the peer is asked for a sign of
	// life, PingTimeout how long it may keep silent thereafter. 0 means 10 and 20 seconds, as
	// with h2, and half of PingTimeout is the longest interval.
	PingInterval, PingTimeout time.Duration
	// MaxStreams bounds the streams and flows of a connection that a peer made. 0 means 1,000.
	MaxStreams int
	// StreamWindow bounds what a peer may send unread on a stream, in bytes. 0 means 4 MiB.
	StreamWindow uint64
	// Budget bounds the memory of all unread bytes. nil means that there is no bound.
	Budget hbone.Budget
	// ResetKey, if set, is the secret by which a later endpoint of the same address and key
	// tells peers of an earlier one that its connections are gone (stateless reset, RFC 9000
	// section 10.3). nil leaves them to find out by PingTimeout.
	ResetKey *[32]byte
	// Mark is what the endpoint's connection IDs begin with: whoever shares a port out among
	// endpoints goes by it.
	Mark [2]byte
	// Datagrams announces CONNECT-UDP to clients (SETTINGS_ENABLE_CONNECT_PROTOCOL).
	Datagrams bool
	// QueueDropped is told of each datagram that came when quic-go had 128 of its connection that nobody
	// had taken yet, and whether the connection is one that the endpoint made. It must not wait. With it
	// quic-go makes an event of each packet, which takes up to a sixth of the time again. It may be nil.
	QueueDropped func(client bool)
	// Log receives what no caller is told. nil discards it.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.PingInterval <= 0 {
		c.PingInterval = 10 * time.Second
	}
	if c.PingTimeout <= 0 {
		c.PingTimeout = 20 * time.Second
	}
	if c.MaxStreams <= 0 {
		c.MaxStreams = 1000
	}
	if c.StreamWindow == 0 {
		c.StreamWindow = 4 << 20
	}
	c.StreamWindow = max(c.StreamWindow, firstWindow)
	if c.Budget == nil {
		c.Budget = hbone.Unlimited{}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Endpoint is one UDP socket and the connections on it, those that it makes and those that it
// accepts. It is a hbone.Connector and a hbone.Endpoint, and safe for concurrent use.
type Endpoint struct {
	cfg       Config
	transport *quic.Transport

	mu       sync.Mutex
	gate     *hbone.Gate // nil while it does not listen
	closed   bool
	sessions sync.WaitGroup // those that it made
}

var (
	_ hbone.Connector = (*Endpoint)(nil)
	_ hbone.Endpoint  = (*Endpoint)(nil)
)

// New makes an endpoint of cfg.Conn, which is closed by its Close.
func New(cfg Config) (*Endpoint, error) {
	if cfg.Conn == nil {
		return nil, errors.New("HTTP/3 endpoint: no socket")
	}
	e := &Endpoint{cfg: cfg.withDefaults()}
	e.transport = &quic.Transport{
		Conn:                  e.cfg.Conn,
		ConnectionIDGenerator: marked(e.cfg.Mark),
		VerifySourceAddress:   e.crowded,
		ConnContext:           e.admit,
	}
	if key := e.cfg.ResetKey; key != nil {
		e.transport.StatelessResetKey = (*quic.StatelessResetKey)(key)
	}
	var token quic.TokenGeneratorKey
	rand.Read(token[:]) // never returns an error (Go 1.24)
	e.transport.TokenGeneratorKey = &token
	return e, nil
}

// marked generates connection IDs: a mark, and enough that is random for them to be unique.
type marked [2]byte

func (m marked) GenerateConnectionID() (quic.ConnectionID, error) {
	var id [8]byte
	rand.Read(id[copy(id[:], m[:]):]) // never returns an error (Go 1.24)
	return quic.ConnectionIDFromBytes(id[:]), nil
}

func (marked) ConnectionIDLen() int { return 8 }

// Close ends all connections at once, and the socket.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	err := e.transport.Close()
	e.sessions.Wait()
	if err = errors.Join(err, e.cfg.Conn.Close()); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close HTTP/3 endpoint: %w", err)
	}
	return nil
}

// config is the transport's configuration with what both ends have in common. Both ask the other for
// a sign of life: quic-go's idle timeout counts from when something was sent that wants an answer.
func (e *Endpoint) config() *quic.Config {
	cfg := &quic.Config{
		MaxIdleTimeout:                 e.cfg.PingTimeout,
		KeepAlivePeriod:                e.cfg.PingInterval,
		InitialStreamReceiveWindow:     firstWindow,
		MaxStreamReceiveWindow:         e.cfg.StreamWindow,
		InitialConnectionReceiveWindow: connWindow,
		MaxConnectionReceiveWindow:     connWindow,
		MaxIncomingUniStreams:          maxUniStreams,
		EnableDatagrams:                true,
	}
	if dropped := e.cfg.QueueDropped; dropped != nil {
		cfg.Tracer = func(_ context.Context, client bool, _ quic.ConnectionID) qlogwriter.Trace {
			return queueTrace(func() { dropped(client) })
		}
	}
	return cfg
}

// queueTrace hears of all that happens in a connection, and is called for what its queue has no room for.
type queueTrace func()

func (t queueTrace) AddProducer() qlogwriter.Recorder { return t }
func (queueTrace) SupportsSchemas(string) bool        { return false }
func (queueTrace) Close() error                       { return nil }

func (t queueTrace) RecordEvent(e qlogwriter.Event) {
	if dropped, ok := e.(qlog.DatagramDropped); ok && dropped.Direction == qlog.DirectionReceiving {
		t()
	}
}
