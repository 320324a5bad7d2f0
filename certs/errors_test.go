package certs_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/certs"
	"github.com/raceway-mesh/raceway/certs/certstest"
)

func TestCauseOfErrorsThatAreNotOurs(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want certs.Cause
	}{
		{io.EOF, certs.CauseClosed},
		{fmt.Errorf("read: %w", io.ErrUnexpectedEOF), certs.CauseClosed},
		{&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, certs.CauseClosed},
		{&net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)}, certs.CauseClosed},
		{net.ErrClosed, certs.CauseClosed},
		{&net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}, certs.CauseRejected},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, certs.CauseTimeout},
		{context.DeadlineExceeded, certs.CauseTimeout},
		{tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, certs.CauseNotTLS},
		{&certs.NoCertificateError{Identity: web, Err: context.DeadlineExceeded}, certs.CauseOwnCertificate},
		{errors.New("tls: client offered only unsupported versions"), certs.CauseOther},
	} {
		if got := certs.CauseOf(tt.err); got != tt.want {
			t.Errorf("CauseOf(%v) = %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestPlaintextOnTheTunnelPortIsNotTLS(t *testing.T) {
	k := certstest.New(t, td).Keeper(t, web)
	a, b := connect(t)
	if _, err := a.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := tls.Server(b, k.ServerTLS(web)).Handshake(); certs.CauseOf(err) != certs.CauseNotTLS {
		t.Errorf("%v is of cause %q", err, certs.CauseOf(err))
	}
}
