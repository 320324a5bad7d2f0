package hbone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
)

// ErrRefused marks an Open that the peer certainly did not process, or whose pooled
// connection died before the answer: nothing was sent through it, so it may be tried again
// on another session.
var ErrRefused = errors.New("stream refused before it was processed")

// ErrNoDatagrams is a peer, or a session with it, that carries no UDP.
var ErrNoDatagrams = errors.New("peer does not carry UDP")

// ErrClosed is returned by Open after Close.
var ErrClosed = errors.New("hbone client is closed")

// StatusError is a peer's answer to CONNECT other than 200.
type StatusError struct{ Status int }

func (e *StatusError) Error() string {
	switch e.Status {
	case 400:
		return "peer answered 400: it did not accept the request (authority, address or port)"
	case 401:
		return "peer answered 401: its authorization policy denies this connection"
	case 431:
		return "peer answered 431: request headers are too large"
	case 503:
		return "peer answered 503: it could not reach the application, or does not serve this workload"
	default:
		return fmt.Sprintf("peer answered %d", e.Status)
	}
}

// DialError is a tunnel connection that did not come up at the TCP level.
type DialError struct {
	Remote netip.AddrPort
	Err    error
}

func (e *DialError) Error() string {
	switch {
	case e.Timeout():
		return fmt.Sprintf("connect to %s timed out: a NetworkPolicy may be blocking port %d: %v", e.Remote, e.Remote.Port(), e.Err)
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("connect to %s: nothing accepts tunnels there (is its agent running?): %v", e.Remote, e.Err)
	default:
		return fmt.Sprintf("connect to %s: %v", e.Remote, e.Err)
	}
}

func (e *DialError) Unwrap() error { return e.Err }

// Timeout reports whether the peer did not answer at all.
func (e *DialError) Timeout() bool { return isTimeout(e.Err) }

// TLSCause says why a handshake did not succeed, as a short stable word for metrics.
type TLSCause string

// Causes of a TLS failure.
const (
	TLSExpired       TLSCause = "certificate_expired" // a certificate is outside its validity
	TLSUnknownCA     TLSCause = "unknown_authority"   // a chain does not end in a trusted root
	TLSWrongIdentity TLSCause = "wrong_identity"      // a valid certificate of somebody else
	TLSNoCertificate TLSCause = "no_certificate"      // we, or the peer, had none to show
	TLSRejected      TLSCause = "rejected_by_peer"    // the peer sent an alert about our certificate
	TLSProtocol      TLSCause = "protocol"            // versions, ALPN, or no TLS at all
	TLSTimeout       TLSCause = "timeout"             // the peer accepted and then kept silent
	TLSClosed        TLSCause = "closed"              // the peer hung up during the handshake
	TLSOther         TLSCause = "other"               // none of these
)

// ErrWrongIdentity is what a VerifyConnection wraps to have the failure classed as
// TLSWrongIdentity.
var ErrWrongIdentity = errors.New("peer's certificate carries another identity")

// ErrNoCertificate is what a source of *tls.Config wraps when it has no valid certificate
// of our own.
var ErrNoCertificate = errors.New("no valid certificate")

// errALPN marks a peer that did not agree to speak h2.
var errALPN = errors.New("peer did not negotiate ALPN h2")

// TLSError is a handshake that did not succeed. In TLS 1.3 a server's verdict on the
// client's certificate arrives after the client's handshake is over; it is a TLSError too.
type TLSError struct {
	Remote netip.AddrPort
	Cause  TLSCause
	Err    error
}

// NewTLSError classifies a handshake's error.
func NewTLSError(remote netip.AddrPort, err error) *TLSError {
	return &TLSError{Remote: remote, Cause: tlsCause(err), Err: err}
}

func (e *TLSError) Error() string {
	msg := fmt.Sprintf("TLS with %s", e.Remote)
	switch e.Cause {
	case TLSTimeout:
		msg += " timed out: a NetworkPolicy or a proxy between may be holding port " + fmt.Sprint(e.Remote.Port())
	case TLSExpired:
		msg += ": a certificate is expired or not yet valid (compare the nodes' clocks)"
	case TLSUnknownCA:
		msg += ": the peer's certificate is not from a trusted root"
	case TLSRejected:
		msg += ": the peer rejected our certificate"
	case TLSProtocol:
		msg += ": the peer does not speak HBONE"
	case TLSWrongIdentity, TLSNoCertificate, TLSClosed, TLSOther: // Err says it
	}
	return fmt.Sprintf("%s: %v", msg, e.Err)
}

func (e *TLSError) Unwrap() error { return e.Err }

// Timeout reports whether the peer kept silent.
func (e *TLSError) Timeout() bool { return e.Cause == TLSTimeout }

func tlsCause(err error) TLSCause {
	var (
		invalid   x509.CertificateInvalidError
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		record    tls.RecordHeaderError
		op        *net.OpError
	)
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return TLSExpired
	case errors.As(err, &authority):
		return TLSUnknownCA
	case errors.Is(err, ErrWrongIdentity), errors.As(err, &hostname):
		return TLSWrongIdentity
	case errors.Is(err, ErrNoCertificate), says(err, "tls: client didn't provide a certificate"):
		return TLSNoCertificate
	case errors.Is(err, errALPN), errors.As(err, &record), says(err, "tls: client requested unsupported application protocols"):
		return TLSProtocol
	case errors.As(err, &op) && op.Op == "remote error":
		return alertCause(op.Err)
	case isTimeout(err):
		return TLSTimeout
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, net.ErrClosed), errors.Is(err, syscall.EPIPE):
		return TLSClosed
	case errors.As(err, &invalid):
		return TLSUnknownCA
	default:
		return TLSOther
	}
}

// says knows an error of crypto/tls that has no type of its own by the start of its text.
func says(err error, text string) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if strings.HasPrefix(err.Error(), text) {
			return true
		}
	}
	return false
}

// alertCause classifies an alert that the peer sent: crypto/tls wraps it in a net.OpError
// whose inner type is not exported, so its text (RFC 8446 section 6) is all there is.
func alertCause(alert error) TLSCause {
	switch alert.Error() {
	case "tls: expired certificate":
		return TLSExpired
	case "tls: certificate required":
		return TLSNoCertificate
	case "tls: no application protocol", "tls: protocol version not supported", "tls: handshake failure", "tls: unexpected message":
		return TLSProtocol
	default:
		return TLSRejected
	}
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.Is(err, syscall.ETIMEDOUT) || errors.As(err, &t) && t.Timeout()
}

// ResetError is a stream that the peer ended with RST_STREAM, or that broke the protocol.
type ResetError struct {
	Code   uint32 // RFC 9113 section 7
	Name   string // of Code
	Remote bool   // whether the peer did it
}

func (e *ResetError) Error() string {
	if e.Remote {
		return "stream reset by peer: " + e.Name
	}
	return "stream reset: " + e.Name
}

// ErrPeerSilent ends a connection whose peer did not answer a PING in time.
var ErrPeerSilent = errors.New("peer did not answer the keepalive PING in time")
