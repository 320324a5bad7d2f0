package yardstick

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Names of the files: certificate and key of a side are apart and together, because each
// program wants them in its own way.
func rootFile(dir string) string         { return filepath.Join(dir, "root.pem") }
func certFile(dir string, s Side) string { return filepath.Join(dir, string(s)+"-cert.pem") }
func keyFile(dir string, s Side) string  { return filepath.Join(dir, string(s)+"-key.pem") }
func pairFile(dir string, s Side) string { return filepath.Join(dir, string(s)+".pem") }

// name is what the certificate of a side is issued to.
func (s Side) name() string { return string(s) + ".yardstick.invalid" }

// WriteCredentials writes a root, and a certificate with its key for each side, into dir:
// ECDSA on P-256, as the mesh's are.
func WriteCredentials(dir string) error {
	now := time.Now()
	template := func(name string) *x509.Certificate {
		serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62)) // never fails, see crypto/rand
		return &x509.Certificate{
			SerialNumber: serial, Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Minute), NotAfter: now.Add(7 * 24 * time.Hour), BasicConstraintsValid: true,
		}
	}
	root := template("yardstick")
	root.IsCA, root.KeyUsage = true, x509.KeyUsageCertSign
	rootKey, rootDER, err := sign(root, root, nil)
	if err != nil {
		return err
	}
	files := map[string][]byte{rootFile(dir): encode("CERTIFICATE", rootDER)}
	for _, side := range []Side{ClientSide, ServerSide} {
		leaf := template(side.name())
		leaf.DNSNames = []string{side.name()}
		leaf.KeyUsage = x509.KeyUsageDigitalSignature
		leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
		key, der, err := sign(leaf, root, rootKey)
		if err != nil {
			return err
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("write the key of %s: %w", side, err)
		}
		certPEM, keyPEM := encode("CERTIFICATE", der), encode("PRIVATE KEY", keyDER)
		files[certFile(dir, side)], files[keyFile(dir, side)] = certPEM, keyPEM
		files[pairFile(dir, side)] = append(append([]byte(nil), certPEM...), keyPEM...)
	}
	for path, content := range files {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return fmt.Errorf("write a yardstick's credentials: %w", err)
		}
	}
	return nil
}

// sign makes a key and its certificate; without a key of the parent's, one that signs itself.
func sign(template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	if parentKey == nil {
		parentKey = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		return nil, nil, fmt.Errorf("certify %s: %w", template.Subject.CommonName, err)
	}
	return key, der, nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// tlsConfig is of a Go relay's side: TLS 1.3 alone, each side verified. Go takes
// AES-128-GCM where the processor has AES. Records are full from the first on.
func tlsConfig(dir string, s Side) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(certFile(dir, s), keyFile(dir, s))
	if err != nil {
		return nil, fmt.Errorf("read the credentials of %s: %w", s, err)
	}
	root, err := os.ReadFile(rootFile(dir))
	if err != nil {
		return nil, fmt.Errorf("read the root: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(root) {
		return nil, fmt.Errorf("read the root: %s has no certificate", rootFile(dir))
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		RootCAs: roots, ServerName: ServerSide.name(),
		ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert,
		DynamicRecordSizingDisabled: true,
	}, nil
}
