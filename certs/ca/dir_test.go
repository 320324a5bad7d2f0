package ca

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/certs"
)

func TestFirstStartMakesARootThatLaterStartsKeep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "data")
	first := open(t, dir, Config{}).Roots()[0]
	for name, mode := range map[string]os.FileMode{KeyFile: 0o600, CertFile: 0o644, RootFile: 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %#o, want %#o", name, info.Mode().Perm(), mode)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
		t.Errorf("directory holds %v, %v", left, err)
	}
	if again := open(t, dir, Config{}).Roots()[0]; !again.Equal(first) {
		t.Error("the second start made another root")
	}
}

func TestFirstStartsAtOnceAgree(t *testing.T) {
	dir := t.TempDir()
	roots := make([]*x509.Certificate, 8)
	var group sync.WaitGroup
	for i := range roots {
		group.Go(func() {
			a, err := try(t, dir, Config{})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = a.Roots()[0]
		})
	}
	group.Wait()
	for _, r := range roots[1:] {
		if !r.Equal(roots[0]) {
			t.Fatal("two starts made different roots")
		}
	}
}

// crash leaves a directory as a first start that died at the given point would.
func crash(t *testing.T, point string) (dir string, root *x509.Certificate) {
	t.Helper()
	dir = t.TempDir()
	if err := create(dir, Root{TrustDomain: td}); err != nil {
		t.Fatal(err)
	}
	committed := filepath.Join(dir, committedDir)
	text, err := os.ReadFile(filepath.Join(committed, CertFile))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := certs.ParseCertificates(text)
	if err != nil {
		t.Fatal(err)
	}
	move := func(names ...string) {
		for _, name := range names {
			if err := os.Rename(filepath.Join(committed, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	switch point {
	case "before the commit":
		if err := os.Rename(committed, filepath.Join(dir, stagingDir)); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, stagingDir, CertFile), nil, 0o600) // torn
	case "after the commit":
	case "half moved":
		move(CertFile)
	case "all moved":
		move(CertFile, KeyFile, RootFile)
	default:
		t.Fatal(point)
	}
	return dir, parsed[0]
}

func TestCrashAtTheFirstStartIsHealed(t *testing.T) {
	for _, point := range []string{"before the commit", "after the commit", "half moved", "all moved"} {
		t.Run(point, func(t *testing.T) {
			dir, root := crash(t, point)
			a := open(t, dir, Config{})
			if committed := point != "before the commit"; a.Roots()[0].Equal(root) != committed {
				t.Errorf("root kept: %v, want %v", !committed, committed)
			}
			sign(t, a, 0)
			if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
				t.Errorf("directory holds %v, %v", left, err)
			}
		})
	}
}

func TestUnsafeOrIncompleteDirectoriesAreRefused(t *testing.T) {
	root := newAuthority(t, "root", nil, time.Hour)
	other := newAuthority(t, "other", nil, time.Hour)
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		text  string
	}{
		{"key readable by everyone", func(t *testing.T, dir string) { chmod(t, filepath.Join(dir, KeyFile), 0o604) }, "chmod 600"},
		{"key writable by its group", func(t *testing.T, dir string) { chmod(t, filepath.Join(dir, KeyFile), 0o620) }, "chmod 600"},
		{"directory writable by everyone", func(t *testing.T, dir string) { chmod(t, dir, 0o777) }, "chmod o-w"},
		{"no key", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, KeyFile)) }, "ca-cert.pem and root-cert.pem is there but ca-key.pem is not"},
		{"no root", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, RootFile)) }, "root-cert.pem is not"},
		{"another key", func(t *testing.T, dir string) { write(t, filepath.Join(dir, KeyFile), other.keyPEM(t), 0o600) }, "not the certificate of the key"},
		{"another root", func(t *testing.T, dir string) { write(t, filepath.Join(dir, RootFile), encode(other.cert), 0o644) }, "chain to root-cert.pem"},
		{"no PEM key", func(t *testing.T, dir string) { write(t, filepath.Join(dir, KeyFile), []byte("x"), 0o600) }, "no PEM encoded private key"},
		{"encrypted key", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, KeyFile), pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}), 0o600)
		}, "not an unencrypted private key"},
		{"torn certificate", func(t *testing.T, dir string) { write(t, filepath.Join(dir, CertFile), encode(root.cert)[:100], 0o644) }, "no PEM encoded certificate"},
		{"torn chain", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, ChainFile), encode(root.cert)[:100], 0o644)
		}, "cert-chain.pem"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			install(t, dir, root, nil, root)
			tt.spoil(t, dir)
			if _, err := try(t, dir, Config{}); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want one with %q", err, tt.text)
			}
		})
	}
}

// Kubernetes mounts a secret as a sticky directory of mode 0777 with symlinks in it, read-only.
func TestSecretAsKubernetesMountsIt(t *testing.T) {
	root := newAuthority(t, "root", nil, time.Hour)
	dir := t.TempDir()
	data := filepath.Join(dir, "..data")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	install(t, data, root, nil, root)
	chmod(t, filepath.Join(data, KeyFile), 0o440)
	for _, name := range []string{KeyFile, CertFile, RootFile, ChainFile} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	chmod(t, dir, 0o777|os.ModeSticky)
	sign(t, open(t, dir, Config{}), 0)

	empty := t.TempDir()
	chmod(t, empty, 0o777|os.ModeSticky)
	if _, err := try(t, empty, Config{}); err == nil || !strings.Contains(err.Error(), "chmod o-w") {
		t.Errorf("made an authority where everyone may write: %v", err)
	}
}

func chmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

func TestACertificateThatMayNotSignIsNoAuthority(t *testing.T) {
	root := newAuthority(t, "root", nil, time.Hour)
	key := p256(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{Subject: pkix.Name{CommonName: "leaf"}, NotAfter: time.Now().Add(time.Hour)}, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	install(t, dir, &authority{leaf, key}, nil, root)
	if _, err := try(t, dir, Config{}); err == nil || !strings.Contains(err.Error(), "not a CA certificate") {
		t.Errorf("error %v", err)
	}
}

func TestKeysInTheFormsThatOpenSSLWrites(t *testing.T) {
	key := p256(t)
	ec, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	params := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 42, 134, 72, 206, 61, 3, 1, 7}})
	for name, data := range map[string][]byte{
		"SEC 1": append(params, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ec})...),
		"PKCS1": pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)}),
		"PKCS8": (&authority{key: key}).keyPEM(t),
	} {
		if _, err := parseKey(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
