package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Serving is the certificate that the CA's own API presents. It renews itself when a
// handshake finds it past half of its life or under a signer that was replaced.
type Serving struct {
	authority *Authority
	dns       []string
	ips       []net.IP

	mu      sync.Mutex
	cert    *tls.Certificate
	creds   *credentials // that signed cert
	renewAt time.Time
}

// Serving makes a server certificate for the given DNS names and IP addresses.
func (a *Authority) Serving(names []string) (*Serving, error) {
	if len(names) == 0 {
		return nil, errors.New("serving certificate: no DNS name or IP address given")
	}
	s := &Serving{authority: a}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			s.ips = append(s.ips, ip)
		} else {
			s.dns = append(s.dns, name)
		}
	}
	if _, err := s.GetCertificate(nil); err != nil {
		return nil, err
	}
	return s, nil
}

// GetCertificate is for tls.Config.
func (s *Serving) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	creds := s.authority.current.Load()
	if s.cert != nil && s.creds == creds && time.Now().Before(s.renewAt) {
		return s.cert, nil
	}
	cert, err := s.issue(creds)
	if err != nil {
		return nil, fmt.Errorf("serving certificate: %w", err)
	}
	now := time.Now()
	s.cert, s.creds, s.renewAt = cert, creds, now.Add(cert.Leaf.NotAfter.Sub(now)/2)
	return cert, nil
}

func (s *Serving) issue(creds *credentials) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	leaf, err := s.authority.issue(creds, &x509.Certificate{
		DNSNames:    s.dns,
		IPAddresses: s.ips,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public(), 0)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, c := range creds.intermediates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}
