package hbone

import (
	"fmt"
	"syscall"
)

// Protocol is what a request asks to have carried.
type Protocol uint8

// The protocols of a request.
const (
	TCP Protocol = iota // CONNECT: bytes
	UDP                 // extended CONNECT with :protocol connect-udp: datagrams (RFC 9298)
)

// String is the protocol's name in the logs.
func (p Protocol) String() string {
	if p == UDP {
		return "udp"
	}
	return "tcp"
}

// MaxDatagram is the longest UDP payload that is tunnelled, in bytes (RFC 9298 section 5).
const MaxDatagram = 65527

// DatagramStream is one tunnelled UDP flow (RFC 9298). A datagram arrives whole, once at the
// most, in any order, or not at all. Its methods may be called from any goroutine, but Send
// from one at a time.
//
//	            ┌─ fits a QUIC packet ─► QUIC DATAGRAM frame (RFC 9221)
//	Send(p) ────┼─ may be fragmented ──► DATAGRAM capsule on the stream (RFC 9297 section 3.2)
//	            └─ may not ────────────► *TooLargeError
//
// Over HTTP/2 there are capsules alone, and no datagram is too large.
type DatagramStream interface {
	// Send sends one datagram's payload of at most MaxDatagram bytes, none included; p is the
	// caller's again when it returns. fragment allows a datagram that no packet of the path
	// holds to be cut: without it (the application's sender set DF) such a one is a
	// *TooLargeError. It may wait for the connection to have room for a frame, and never for
	// the peer's reader: what would have to wait for that is dropped and counted. Another
	// error than *TooLargeError is the flow's end.
	Send(p []byte, fragment bool) error
	// Deliver has sink take what arrives, from now on. Before it a few datagrams wait, and
	// more are dropped. It is called once.
	Deliver(sink DatagramSink)
	// Refuse ends the flow and tells the peer that its application's datagram met a closed
	// port: the peer's End gets an error that is syscall.ECONNREFUSED.
	Refuse() error
	// Drops is what was not handed on or sent so far.
	Drops() DatagramDrops
	// Close ends the flow; the peer's End gets nil. It may be called again.
	Close() error
}

// DatagramSink takes a flow's datagrams on the goroutine that received them, for all flows of
// a connection the same one: its methods must not wait, and are not called at the same time,
// End with an error excepted. They may call the stream's methods. None is called after Close
// has returned but those that run.
type DatagramSink interface {
	// Datagram is given one payload, which is the transport's again when it returns.
	Datagram(p []byte)
	// End tells that nothing comes any more: nil when the peer closed the flow, an error that
	// is syscall.ECONNREFUSED when its application's port is closed, any other error for any
	// other end.
	End(err error)
}

// DatagramDrops counts datagrams of one flow by why they were dropped.
type DatagramDrops struct {
	SendFull    uint64 // no room on the way to the peer
	ReceiveFull uint64 // nobody took it yet, and enough waited
	Foreign     uint64 // a context that was not agreed on (RFC 9298 section 4)
}

// TooLargeError is a datagram that does not fit a packet of the path and must not be cut.
type TooLargeError struct {
	Max int // the longest payload that does fit now, in bytes
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("datagram does not fit the tunnel's path: at most %d bytes do", e.Max)
}

// Is reports whether target is EMSGSIZE, which is what the application's sender is told.
func (e *TooLargeError) Is(target error) bool { return target == syscall.EMSGSIZE }

// PortClosedError ends a flow whose application the peer found to be absent: its end of
// DatagramStream.Refuse.
type PortClosedError struct{}

func (PortClosedError) Error() string { return "nothing listens at the peer's UDP port" }

// Is reports whether target is ECONNREFUSED, which is what the application's sender is told.
func (PortClosedError) Is(target error) bool { return target == syscall.ECONNREFUSED }
