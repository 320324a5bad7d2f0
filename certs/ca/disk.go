package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Names of the files, which are Istio's.
const (
	keyFile   = "ca-key.pem"
	certFile  = "ca-cert.pem"
	chainFile = "cert-chain.pem"

	// RootFile holds the roots for agents.
	RootFile = "root-cert.pem"

	// stagingDir becomes committedDir when all files in it are on disk.
	stagingDir   = ".making"
	committedDir = ".made"
)

// prepare completes what a crash left half done and makes a new authority in a directory
// that has none. It reports whether it did the latter.
func (a *Authority) prepare() (made bool, err error) {
	dir := a.cfg.Dir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	// Two first starts at once must agree on one authority. Closing releases the lock.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return false, fmt.Errorf("lock: %w", err)
	}
	info, err := lock.Stat()
	if err != nil {
		return false, err
	}
	// With the sticky bit nobody can replace a file of ours: Kubernetes mounts secrets so.
	writable := info.Mode().Perm()&0o002 != 0
	if writable && info.Mode()&fs.ModeSticky == 0 {
		return false, openDirError(info)
	}
	if err := discardStaging(dir); err != nil {
		return false, fmt.Errorf("remove what an interrupted start left: %w", err)
	}
	if err := settle(dir); err != nil {
		return false, fmt.Errorf("complete an interrupted start: %w", err)
	}
	present, missing, err := inventory(dir)
	switch {
	case err != nil:
		return false, err
	case len(missing) == 0:
		return false, nil
	case len(present) > 0:
		return false, fmt.Errorf("%s is there but %s is not: put it there, or empty the directory to have a new authority made (every certificate in use then loses its root)", strings.Join(present, " and "), strings.Join(missing, " and "))
	}
	if writable { // somebody else could put files there first
		return false, openDirError(info)
	}
	if err := a.create(); err != nil {
		return false, fmt.Errorf("make a new root: %w", err)
	}
	return true, settle(dir)
}

func openDirError(info fs.FileInfo) error {
	return fmt.Errorf("everyone may write to the directory (mode %#o), so its key proves nothing: chmod o-w", info.Mode().Perm())
}

// discardStaging looks first: a read-only mount refuses to remove even what is not there.
func discardStaging(dir string) error {
	staging := filepath.Join(dir, stagingDir)
	if _, err := os.Lstat(staging); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return os.RemoveAll(staging)
}

// inventory sorts the files that an authority consists of.
func inventory(dir string) (present, missing []string, err error) {
	for _, name := range []string{keyFile, certFile, RootFile} {
		switch _, err := os.Stat(filepath.Join(dir, name)); {
		case err == nil:
			present = append(present, name)
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, name)
		default:
			return nil, nil, err
		}
	}
	return present, missing, nil
}

// create makes a root and commits it by a rename; settle puts it in its place.
func (a *Authority) create() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{a.cfg.TrustDomain}, CommonName: "Raceway root CA " + now.UTC().Format("2006-01-02")},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: a.cfg.TrustDomain}}, // X509-SVID section 3.1
		NotBefore:             now.Add(-a.cfg.Backdate),
		NotAfter:              now.Add(a.cfg.RootTTL),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	staging := filepath.Join(a.cfg.Dir, stagingDir)
	if err := os.Mkdir(staging, 0o700); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(staging, keyFile), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		return err
	}
	for _, name := range []string{certFile, RootFile} {
		if err := writeSynced(filepath.Join(staging, name), cert, 0o644); err != nil {
			return err
		}
	}
	if err := syncDir(staging); err != nil {
		return err
	}
	if err := os.Rename(staging, filepath.Join(a.cfg.Dir, committedDir)); err != nil {
		return err
	}
	return syncDir(a.cfg.Dir)
}

// settle moves committed files to their places. It may be interrupted and called again.
func settle(dir string) error {
	committed := filepath.Join(dir, committedDir)
	entries, err := os.ReadDir(committed)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(committed, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if err := os.Remove(committed); err != nil {
		return err
	}
	return syncDir(dir)
}

// writeSynced makes a new file. The mode is set apart from the creation, past the umask.
func writeSynced(name string, data []byte, mode fs.FileMode) (err error) {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.Write(data); err != nil {
		return err
	}
	if err := file.Chmod(mode); err != nil {
		return err
	}
	return file.Sync()
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}
