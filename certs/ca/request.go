package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// RequestError says that a request cannot be certified, whoever sends it.
type RequestError struct{ Err error }

func (e *RequestError) Error() string { return e.Err.Error() }

func (e *RequestError) Unwrap() error { return e.Err }

const (
	// maxRequestBytes is well over a request with an 8192 bit RSA key.
	maxRequestBytes = 16 << 10

	minRSABits = 2048
	maxRSABits = 8192 // verifying costs more than it adds
)

// requestedKey returns the public key that a PEM encoded PKCS #10 request asks to certify,
// after its signature has shown that the sender holds the private one.
func requestedKey(csrPEM []byte) (crypto.PublicKey, error) {
	if len(csrPEM) > maxRequestBytes {
		return nil, fmt.Errorf("certificate request of %d bytes is larger than %d", len(csrPEM), maxRequestBytes)
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil {
		return nil, errors.New("certificate request is not PEM")
	}
	if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("PEM block is a %q, not a CERTIFICATE REQUEST", block.Type)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("certificate request is followed by other data")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signature of the certificate request: %w", err)
	}
	return csr.PublicKey, nil
}

// checkKey admits what every HBONE peer can verify; Envoy's and ztunnel's defaults leave out
// Ed25519 and P-224.
func checkKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		return fmt.Errorf("key on the curve %s: use P-256, P-384 or P-521", key.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("RSA key of %d bits: use %d to %d", bits, minRSABits, maxRSABits)
		}
		return nil
	default:
		return fmt.Errorf("key of type %T: use ECDSA or RSA", key)
	}
}
