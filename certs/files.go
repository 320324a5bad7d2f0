package certs

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/certs/filewatch"
)

// maxFileBytes bounds what is read of a roots or revocations file.
const maxFileBytes = 8 << 20

// FileRoots is a RootSource that reads PEM files and reloads them while it runs. Path is
// either one file with the roots of TrustDomain, or a directory: there, root-cert.pem holds
// the roots of TrustDomain, and every <trust domain>.pem those of that domain. What does not
// parse is logged, and the last good roots stay in force.
type FileRoots struct {
	path, trustDomain string
	log               *slog.Logger
	watch             *filewatch.Watcher
	current           latest[*Bundle]
}

// OwnRootsFile is the file, in a directory of roots, that belongs to the own trust domain.
const OwnRootsFile = "root-cert.pem"

// NewFileRoots reads path, which must hold roots of trustDomain, and begins to watch it.
// Run follows it, Close releases it.
func NewFileRoots(path, trustDomain string, log *slog.Logger) (*FileRoots, error) {
	watch, err := filewatch.New(path)
	if err != nil {
		return nil, fmt.Errorf("trust roots: %w", err)
	}
	f := &FileRoots{path: path, trustDomain: trustDomain, log: log, watch: watch}
	bundle, err := f.read()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("trust roots: %w", err), watch.Close())
	}
	f.current.set(bundle)
	return f, nil
}

// Load implements RootSource.
func (f *FileRoots) Load() (*Bundle, <-chan struct{}) { return f.current.load() }

// Run reloads the roots when they change, until ctx ends.
func (f *FileRoots) Run(ctx context.Context) error {
	var lastErr string
	return f.watch.Run(ctx, func() {
		bundle, err := f.read()
		if err != nil {
			if err.Error() != lastErr {
				f.log.Error("trust roots not reloaded, the last good ones stay in force", "path", f.path, "error", err)
			}
			lastErr = err.Error()
			return
		}
		lastErr = ""
		if old, _ := f.current.load(); old.equal(bundle) {
			return
		}
		f.current.set(bundle)
		f.log.Info("trust roots reloaded", "path", f.path, "trustDomains", bundle.TrustDomains(), "ownRoots", len(bundle.Roots(f.trustDomain)))
	})
}

// Close ends the watch. It may be called again.
func (f *FileRoots) Close() error { return f.watch.Close() }

func (f *FileRoots) read() (*Bundle, error) {
	info, err := os.Stat(f.path)
	if err != nil {
		return nil, err
	}
	roots := map[string][]*x509.Certificate{}
	if info.IsDir() {
		err = f.readDir(roots)
	} else {
		roots[f.trustDomain], err = readCertificates(f.path)
	}
	if err != nil {
		return nil, err
	}
	if len(roots[f.trustDomain]) == 0 {
		return nil, fmt.Errorf("%s has no roots of the own trust domain %s: neither %s nor %s.pem is there", f.path, f.trustDomain, OwnRootsFile, f.trustDomain)
	}
	return NewBundle(roots)
}

func (f *FileRoots) readDir(roots map[string][]*x509.Certificate) error {
	names, err := filepath.Glob(filepath.Join(f.path, "*.pem"))
	if err != nil {
		return err
	}
	for _, name := range names {
		certs, err := readCertificates(name)
		if err != nil {
			return err
		}
		domain := strings.TrimSuffix(filepath.Base(name), ".pem")
		if filepath.Base(name) == OwnRootsFile {
			domain = f.trustDomain
		}
		roots[domain] = append(roots[domain], certs...)
	}
	return nil
}

func readCertificates(name string) ([]*x509.Certificate, error) {
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	certs, err := ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return certs, nil
}

func readFile(name string) (data []byte, err error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	data, err = io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxFileBytes)
	}
	return data, nil
}

// FileRevocations is a RevocationSource that reads a file of CRLs, PEM or DER, and reloads
// it while it runs. What does not parse is logged, and the last good lists stay in force.
type FileRevocations struct {
	path    string
	log     *slog.Logger
	watch   *filewatch.Watcher
	current latest[*Revocations]
}

// NewFileRevocations reads path, which must exist (an empty file revokes nothing), and
// begins to watch it. Run follows it, Close releases it.
func NewFileRevocations(path string, log *slog.Logger) (*FileRevocations, error) {
	watch, err := filewatch.New(path)
	if err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	f := &FileRevocations{path: path, log: log, watch: watch}
	data, err := readFile(path)
	if err == nil {
		var r *Revocations
		if r, err = ParseRevocations(data); err == nil {
			f.set(r)
			return f, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("revocations: %s: %w", path, err), watch.Close())
}

// Load implements RevocationSource.
func (f *FileRevocations) Load() (*Revocations, <-chan struct{}) { return f.current.load() }

// Run reloads the revocations when they change, until ctx ends.
func (f *FileRevocations) Run(ctx context.Context) error {
	last, _ := readFile(f.path) // a failure here only means that the first look parses again
	var lastErr string
	return f.watch.Run(ctx, func() {
		data, err := readFile(f.path)
		if err == nil && lastErr == "" && string(data) == string(last) {
			return
		}
		var r *Revocations
		if err == nil {
			r, err = ParseRevocations(data)
		}
		if err != nil {
			if err.Error() != lastErr {
				f.log.Error("revocations not reloaded, the last good ones stay in force", "path", f.path, "error", err)
			}
			lastErr = err.Error()
			return
		}
		last, lastErr = data, ""
		f.set(r)
		f.log.Info("revocations reloaded", "path", f.path, "lists", len(r.lists))
	})
}

func (f *FileRevocations) set(r *Revocations) {
	for _, issuer := range r.stale(time.Now()) {
		f.log.Warn("revocation list is past its next update", "path", f.path, "issuer", issuer)
	}
	f.current.set(r)
}

// Close ends the watch. It may be called again.
func (f *FileRevocations) Close() error { return f.watch.Close() }
