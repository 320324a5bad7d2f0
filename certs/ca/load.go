package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/certs"
)

// credentials are one consistent set of files.
type credentials struct {
	key                 crypto.Signer
	cert                *x509.Certificate
	intermediates       []*x509.Certificate // what peers need beside the roots, the signing one first
	roots               []*x509.Certificate
	notBefore, notAfter time.Time // of the whole way to the root
}

func (c *credentials) isRoot() bool { return selfIssued(c.cert) }

func (c *credentials) equal(other *credentials) bool {
	return c.cert.Equal(other.cert) &&
		slices.EqualFunc(c.intermediates, other.intermediates, (*x509.Certificate).Equal) &&
		slices.EqualFunc(c.roots, other.roots, (*x509.Certificate).Equal)
}

func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, c.RawSubject) }

// load reads the files and checks that they fit together.
func load(dir string) (*credentials, error) {
	key, err := loadKey(filepath.Join(dir, keyFile))
	if err != nil {
		return nil, err
	}
	signing, err := loadCerts(filepath.Join(dir, certFile))
	if err != nil {
		return nil, err
	}
	roots, err := loadCerts(filepath.Join(dir, RootFile))
	if err != nil {
		return nil, err
	}
	chain, err := loadCerts(filepath.Join(dir, chainFile))
	if err != nil && !errors.Is(err, errNoCertificates) {
		return nil, err
	}
	creds := &credentials{key: key, cert: signing[0], roots: roots}
	if err := creds.verify(slices.Concat(signing, chain)); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	return creds, nil
}

// verify checks the signing certificate and finds out how long its way to a root is valid.
func (c *credentials) verify(chain []*x509.Certificate) error {
	pub, ok := c.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(c.key.Public()) {
		return fmt.Errorf("it is not the certificate of the key in %s", keyFile)
	}
	if err := checkKey(c.cert.PublicKey); err != nil {
		return err
	}
	if !c.cert.BasicConstraintsValid || !c.cert.IsCA || c.cert.KeyUsage != 0 && c.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("it is not a CA certificate: it may not sign others")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range c.roots {
		if !r.BasicConstraintsValid || !r.IsCA {
			return fmt.Errorf("%s holds %q, which is not a CA certificate", RootFile, r.Subject)
		}
		roots.AddCert(r)
	}
	for _, i := range chain {
		intermediates.AddCert(i)
		known := slices.ContainsFunc(c.intermediates, i.Equal)
		// What issued itself is a root, and roots go last in a reply.
		if !selfIssued(i) && !known {
			c.intermediates = append(c.intermediates, i)
		}
	}
	ways, err := c.cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("chain to %s by %s: %w", RootFile, chainFile, err)
	}
	for _, way := range ways { // of several, the one that lasts longest
		notBefore, notAfter := way[0].NotBefore, way[0].NotAfter
		for _, above := range way[1:] {
			notBefore = latest(notBefore, above.NotBefore)
			notAfter = earliest(notAfter, above.NotAfter)
		}
		if notAfter.After(c.notAfter) {
			c.notBefore, c.notAfter = notBefore, notAfter
		}
	}
	return nil
}

// maxFileBytes bounds what is read of a file: hundreds of certificates.
const maxFileBytes = 1 << 20

var errNoCertificates = errors.New("no certificates")

func loadCerts(name string) ([]*x509.Certificate, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errNoCertificates, err)
	}
	if err != nil {
		return nil, err
	}
	data, err := readClose(file)
	if err != nil {
		return nil, err
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, fmt.Errorf("%w: %s is empty", errNoCertificates, name)
	}
	parsed, err := certs.ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	return parsed, nil
}

func loadKey(name string) (crypto.Signer, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	// Its group may read it: that is how Kubernetes gives a secret to a process that is not root.
	if mode := info.Mode().Perm(); mode&0o037 != 0 {
		return nil, errors.Join(fmt.Errorf("others than its owner may use %s (mode %#o): chmod 600 (in Kubernetes: defaultMode 0400 on the secret's volume), and replace the key if it may have been read", keyFile, mode), file.Close())
	}
	data, err := readClose(file)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	return key, nil
}

func readClose(file *os.File) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", file.Name(), maxFileBytes)
	}
	return data, nil
}

// parseKey reads the forms that openssl writes.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("no PEM encoded private key found")
		}
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS": // `openssl ecparam -genkey` writes them in front
			data = rest
			continue
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			return nil, fmt.Errorf("PEM block is a %q, not an unencrypted private key", block.Type)
		}
		if err != nil {
			return nil, fmt.Errorf("parse private key: %w", err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a key of type %T cannot sign", key)
		}
		return signer, nil
	}
}
