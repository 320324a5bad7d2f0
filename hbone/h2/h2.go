// Package h2 carries HBONE streams over HTTP/2 (RFC 9113). Framing and HPACK are
// golang.org/x/net/http2's; streams, flow control and the connection's life are its own,
// because that package's Server cannot end the response while the request goes on, sends
// one GOAWAY where a graceful drain needs two, and its Transport holds a buffer of up to
// 512 KiB for every open stream.
//
//	           ┌─────────────── conn ───────────────┐
//	Sink  ◄────┴─────────── readLoop ◄── TLS ◄── Wire ◄── peer   DATA straight to who takes it
//	Read  ◄── chunks ◄─────────┘                                 and by a queue where it waits
//	Write ──► frame ──► │     │
//	          control ─► │ wmu ├──► TLS ──► Wire ──► peer        DATA straight from the caller,
//	                                                             all else in the order it was queued
//
// A connection has one goroutine, readLoop, and one more while the kernel has no room for a
// control frame. readLoop never waits for a stream's reader: a peer may send what the window
// allows, and no more. A window is memory:
// every byte of it, and what chunks leave unused, is reserved from a hbone.Budget before the
// peer may send it. Streams start small and grow while they are read as fast as bytes come.
// A stream without a reservation is refused; one that nobody reads holds what it has, and
// holds up no other. Beside that a connection keeps its own fixed buffers and one chunk.
package h2

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
)

// Client makes client sessions. The zero value has HBONE's values.
type Client struct {
	// PingInterval is how often the peer is asked for a sign of life, PingTimeout how
	// long it may keep silent thereafter. 0 means 10 and 20 seconds.
	PingInterval, PingTimeout time.Duration
	// StreamWindow and ConnWindow bound what a peer may send unread on a stream and, beside
	// the smallest windows, on all of a connection, in bytes. 0 means 4 MiB and 16 MiB.
	StreamWindow, ConnWindow int32
	// Budget bounds the memory of all unread bytes. nil means that there is no bound.
	Budget hbone.Budget
}

// Server serves connections. The zero value has HBONE's values.
type Server struct {
	// PingInterval, PingTimeout, StreamWindow, ConnWindow and Budget are as in Client.
	PingInterval, PingTimeout time.Duration
	StreamWindow, ConnWindow  int32
	Budget                    hbone.Budget
	// MaxStreams bounds the streams of one connection. 0 means 200.
	MaxStreams uint32
	// Datagrams announces CONNECT-UDP to clients (RFC 8441, RFC 9298).
	Datagrams bool
}

var (
	_ hbone.ClientTransport = Client{}
	_ hbone.ServerTransport = Server{}
)

// NewSession makes a session of conn, which it owns.
func (c Client) NewSession(_ context.Context, conn *tls.Conn) (hbone.Session, error) {
	return newSession(c, conn)
}
