package certs

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/certs/spiffe"
)

// protocol is the one ALPN protocol of an HBONE tunnel over TCP, protocolQUIC of one over QUIC.
// Which of them a connection has its transport sees to; there is no third.
const (
	protocol     = "h2"
	protocolQUIC = "h3"
)

// ClientTLS returns the configuration to reach, as self, a peer that must prove one of the
// identities peers (one at least). It fails with a *NoCertificateError when there is no
// valid certificate for self now. It is for one dial or many: the certificate, the roots and
// the revocations are looked up at each handshake.
func (k *Keeper) ClientTLS(self spiffe.ID, peers []spiffe.ID) (*tls.Config, error) {
	if _, err := k.certificate(self); err != nil {
		return nil, err
	}
	expected := slices.Clone(peers)
	if len(expected) == 0 {
		// Nobody is expected: the zero identity, which no certificate carries, rather
		// than the empty list, which would accept everybody.
		expected = []spiffe.ID{{}}
	}
	config := k.baseTLS()
	// No ServerName: HBONE sends no SNI. crypto/tls then insists on InsecureSkipVerify,
	// which leaves everything to VerifyConnection.
	config.InsecureSkipVerify = true
	// Always our certificate, also when the server's list of acceptable CAs does not
	// contain its issuer: during a root's rotation the list may lag behind.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return k.certificate(self)
	}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return k.verifier.connection(state, x509.ExtKeyUsageServerAuth, expected)
	}
	return config, nil
}

// ServerTLS returns the configuration to accept tunnels for self from every identity of an
// accepted trust domain. While there is no valid certificate for self, handshakes fail with
// a *NoCertificateError.
func (k *Keeper) ServerTLS(self spiffe.ID) *tls.Config {
	config := k.baseTLS()
	config.ClientAuth = tls.RequireAnyClientCert // VerifyConnection verifies it
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return k.certificate(self)
	}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return k.verifier.connection(state, x509.ExtKeyUsageClientAuth, nil)
	}
	return config
}

func (k *Keeper) baseTLS() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos:       []string{protocol},
		// Small records in the beginning are for pages that a browser shows before they are whole.
		DynamicRecordSizingDisabled: true,
		// No resumption: see ARCHITECTURE.md, "Why not". Without SNI crypto/tls files a client's
		// sessions under the peer's address, so identities that share a cache would resume
		// each other's, and a resumed session keeps the certificate of its first handshake
		// while that is refreshed.
		SessionTicketsDisabled: true,
	}
}

func join(ids []spiffe.ID) string {
	text := make([]string, len(ids))
	for i, id := range ids {
		if text[i] = id.String(); id.IsZero() {
			text[i] = "nobody"
		}
	}
	return strings.Join(text, " or ")
}
