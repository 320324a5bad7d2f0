package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"time"
)

// Root describes the root that is made where there is none.
type Root struct {
	TrustDomain string        // required
	TTL         time.Duration // 0: ten years
	Backdate    time.Duration // how far its validity begins in the past; 0: 2 min
}

// Make makes a key and its self-signed certificate, named as in Istio's cacerts.
func (r Root) Make() (Material, error) {
	if r.TTL == 0 {
		r.TTL = 10 * 365 * 24 * time.Hour
	}
	if r.Backdate == 0 {
		r.Backdate = defaultBackdate
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Material{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Material{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{r.TrustDomain}, CommonName: "Raceway root CA " + now.UTC().Format("2006-01-02")},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: r.TrustDomain}}, // X509-SVID section 3.1
		NotBefore:             now.Add(-r.Backdate),
		NotAfter:              now.Add(r.TTL),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Material{}, err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return Material{
		Key:   Part{KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})},
		Cert:  Part{CertFile, cert},
		Chain: Part{Name: ChainFile},
		Roots: Part{RootFile, cert},
	}, nil
}
