package h3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// code is an error code of HTTP/3 (RFC 9114 section 8.1, RFC 9297 section 5.2, RFC 9204
// section 6).
type code uint64

const (
	codeDatagram       code = 0x33
	codeNo             code = 0x100
	codeProtocol       code = 0x101
	codeInternal       code = 0x102
	codeStreamCreation code = 0x103
	codeClosedCritical code = 0x104
	codeUnexpected     code = 0x105
	codeFrame          code = 0x106
	codeLoad           code = 0x107
	codeID             code = 0x108
	codeSettings       code = 0x109
	codeNoSettings     code = 0x10a
	codeRejected       code = 0x10b
	codeCancelled      code = 0x10c
	codeIncomplete     code = 0x10d
	codeMessage        code = 0x10e
	codeConnect        code = 0x10f
	codeQPACK          code = 0x200
)

// String is the code's name in its RFC.
func (c code) String() string {
	switch c {
	case codeDatagram:
		return "H3_DATAGRAM_ERROR"
	case codeNo:
		return "H3_NO_ERROR"
	case codeProtocol:
		return "H3_GENERAL_PROTOCOL_ERROR"
	case codeInternal:
		return "H3_INTERNAL_ERROR"
	case codeStreamCreation:
		return "H3_STREAM_CREATION_ERROR"
	case codeClosedCritical:
		return "H3_CLOSED_CRITICAL_STREAM"
	case codeUnexpected:
		return "H3_FRAME_UNEXPECTED"
	case codeFrame:
		return "H3_FRAME_ERROR"
	case codeLoad:
		return "H3_EXCESSIVE_LOAD"
	case codeID:
		return "H3_ID_ERROR"
	case codeSettings:
		return "H3_SETTINGS_ERROR"
	case codeNoSettings:
		return "H3_MISSING_SETTINGS"
	case codeRejected:
		return "H3_REQUEST_REJECTED"
	case codeCancelled:
		return "H3_REQUEST_CANCELLED"
	case codeIncomplete:
		return "H3_REQUEST_INCOMPLETE"
	case codeMessage:
		return "H3_MESSAGE_ERROR"
	case codeConnect:
		return "H3_CONNECT_ERROR"
	case codeQPACK:
		return "QPACK_DECOMPRESSION_FAILED"
	}
	return fmt.Sprintf("error %#x", uint64(c))
}

// connError ends a connection whose peer broke the protocol; the peer is told its code.
type connError struct {
	code code
	text string
}

func (e *connError) Error() string {
	return fmt.Sprintf("peer broke the protocol: %s: %s", e.code, e.text)
}

// streamError ends a stream on which the peer broke the protocol.
type streamError struct {
	code code
	text string
}

func (e *streamError) Error() string { return fmt.Sprintf("stream reset: %s: %s", e.code, e.text) }

var (
	errConnClosed = errors.New("tunnel connection closed")
	errPeerClosed = errors.New("peer closed the tunnel connection")
	errDrained    = errors.New("tunnel connection drained")
	errForced     = errors.New("tunnel connection cut: the drain's time is over")
	errFull       = errors.New("session carries all the streams that it may")
	errNoAnswer   = errors.New("tunnel connection lost before the answer")
	errAnswered   = errors.New("request was answered before")
	errTruncated  = errors.New("the stream ends within a frame")
	errWriteEnd   = errors.New("write on a stream after CloseWrite")
)

// refused is the error of a stream that the peer did not process.
func refused(cause error) error { return fmt.Errorf("%w: %w", hbone.ErrRefused, cause) }

// errLost marks the end of a stream by that of its connection.
var errLost = errors.New("tunnel connection lost")

// lost is why the connection ended, of which quic-go says err. It never is io.EOF, or a stream cut
// short could pass for one that ended.
func (c *conn) lost(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	return connCause(err)
}

// ended is lost for a connection whose context has ended.
func (c *conn) ended() error { return c.lost(context.Cause(c.quic.Context())) }

// connCause puts quic-go's error for a connection into the words of hbone.
func connCause(err error) error {
	var app *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(err, &idle):
		return hbone.ErrPeerSilent
	case errors.As(err, &app) && app.Remote && code(app.ErrorCode) == codeNo:
		return errPeerClosed
	case errors.As(err, &app) && app.Remote:
		return fmt.Errorf("peer closed the tunnel connection: %s %.128q", code(app.ErrorCode), app.ErrorMessage)
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, context.Canceled):
		return errConnClosed
	}
	var transport *quic.TransportError
	if errors.As(err, &transport) && transport.ErrorCode.IsCryptoError() {
		return handshakeCause(err)
	}
	return errors.New(err.Error()) // quic-go's wrap net.ErrClosed, which means that we closed it
}

// handshakeCause is the error of crypto/tls in quic-go's error, so that it is classed as on TCP.
func handshakeCause(err error) error {
	var transport *quic.TransportError
	if !errors.As(err, &transport) || !transport.ErrorCode.IsCryptoError() {
		return err
	}
	alert := tls.AlertError(transport.ErrorCode - 0x100)
	if transport.Remote {
		return &net.OpError{Op: "remote error", Err: alert}
	}
	for _, inner := range transport.Unwrap() { // net.ErrClosed, and what crypto/tls said
		if inner != nil && !errors.Is(inner, net.ErrClosed) {
			return inner
		}
	}
	return alert
}

// fault puts an error of a stream into the words of hbone.
func (c *conn) fault(err error) error {
	var reset *quic.StreamError
	switch {
	case errors.As(err, &reset):
		return &hbone.ResetError{Code: uint32(reset.ErrorCode), Name: code(reset.ErrorCode).String(), Remote: reset.Remote}
	case c.quic.Context().Err() != nil:
		return fmt.Errorf("%w: %w", errLost, c.ended())
	case errors.Is(err, net.ErrClosed): // as quic-go's errors for connections are
		return fmt.Errorf("%w: %w", errLost, c.lost(err))
	}
	return err
}

// codeOf is the code of a stream's reset, 0 when it was none.
func codeOf(err error) code {
	var reset *quic.StreamError
	if errors.As(err, &reset) {
		return code(reset.ErrorCode)
	}
	return 0
}
