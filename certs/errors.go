package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// Cause classifies a failed handshake; its text is a metric label.
type Cause string

// Causes of a failed handshake.
const (
	CauseNoCertificate  Cause = "no_certificate"  // the peer presented none
	CauseURISAN         Cause = "uri_san"         // not exactly one URI SAN, or one that is no workload identity
	CauseTrustDomain    Cause = "trust_domain"    // a trust domain that is neither ours, an alias nor federated
	CauseUntrusted      Cause = "untrusted"       // no chain to the roots of its own trust domain
	CauseExpired        Cause = "expired"         // past its validity
	CauseNotYetValid    Cause = "not_yet_valid"   // before its validity
	CauseUsage          Cause = "usage"           // not a leaf, or not meant for this side of a TLS connection
	CauseRevoked        Cause = "revoked"         // on a revocation list
	CauseWrongIdentity  Cause = "wrong_identity"  // authentic, but not who was to be reached
	CauseALPN           Cause = "alpn"            // the peer does not speak h2
	CauseOwnCertificate Cause = "own_certificate" // we have no valid certificate
	CauseRejected       Cause = "rejected"        // the peer ended the handshake with an alert
	CauseNotTLS         Cause = "not_tls"         // the peer does not speak TLS
	CauseTimeout        Cause = "timeout"
	CauseClosed         Cause = "closed" // the connection ended first
	CauseOther          Cause = "other"  // no common TLS version, key exchange or the like
)

// HandshakeError is why a peer was refused.
type HandshakeError struct {
	Cause Cause
	Peer  spiffe.ID // what its certificate claims; zero when it claims nothing
	Err   error
}

func (e *HandshakeError) Error() string {
	if e.Peer.IsZero() {
		return "peer refused: " + e.Err.Error()
	}
	return "peer " + e.Peer.String() + " refused: " + e.Err.Error()
}

func (e *HandshakeError) Unwrap() error { return e.Err }

func refuse(cause Cause, peer spiffe.ID, format string, args ...any) error {
	return &HandshakeError{Cause: cause, Peer: peer, Err: fmt.Errorf(format, args...)}
}

// NoCertificateError says that we have no valid certificate to present.
type NoCertificateError struct {
	Identity spiffe.ID
	Since    time.Time // when it was first asked for, or when the last one expired
	Err      error     // why
}

func (e *NoCertificateError) Error() string {
	return fmt.Sprintf("no valid certificate for %s since %s: %v", e.Identity, e.Since.UTC().Format(time.RFC3339), e.Err)
}

func (e *NoCertificateError) Unwrap() error { return e.Err }

// noClientCertificate is what crypto/tls says, in an error without a type, when a client
// answers RequireAnyClientCert with nothing. Checking in VerifyConnection instead would send
// bad_certificate where RFC 8446 section 4.4.2.4 wants certificate_required.
const noClientCertificate = "client didn't provide a certificate"

// CauseOf classifies the error of a TLS handshake, ours or the peer's.
func CauseOf(err error) Cause {
	var refused *HandshakeError
	var missing *NoCertificateError
	var op *net.OpError
	var record tls.RecordHeaderError
	var netErr net.Error
	switch {
	case errors.As(err, &refused):
		return refused.Cause
	case errors.As(err, &missing):
		return CauseOwnCertificate
	case errors.As(err, &op) && op.Op == "remote error": // how crypto/tls wraps an alert
		return CauseRejected
	case errors.As(err, &record):
		return CauseNotTLS
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &netErr) && netErr.Timeout():
		return CauseTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return CauseClosed
	case err != nil && strings.Contains(err.Error(), noClientCertificate):
		return CauseNoCertificate
	default:
		return CauseOther
	}
}
