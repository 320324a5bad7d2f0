// Package parts finds what a Kubernetes cluster is made of and is not ours: Kubernetes with
// etcd and CoreDNS, built from their Go modules, and containerd, runc, the CNI plugins, nft
// and iptables from Debian's packages, unpacked and not installed. All of it is kept below
// the user's cache directory, by a hash of what it was made from.
package parts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const module = "github.com/raceway-mesh/raceway"

// Command builds the parts.
const Command = "go run ./e2e/cluster/cmd/parts"

// ErrNotBuilt says that parts are missing, and how to get them.
var ErrNotBuilt = errors.New("the parts of a Kubernetes cluster are not built: run `" + Command + "` (some minutes, once)")

// packages are Debian's, with the libraries that a small system lacks.
func packages() []string {
	return []string{
		"containerd", "runc", "containernetworking-plugins",
		"nftables", "libnftables1", "libnftnl11", "libmnl0", "libjansson4", "libedit2", "libgmp10",
		"iptables", "libxtables12", "libip4tc2", "libip6tc2", "libnetfilter-conntrack3", "libnfnetlink0",
		"libseccomp2", "libbsd0", "libmd0",
	}
}

// Parts are complete: a directory gets its name when everything is in it.
type Parts struct {
	Dir string
}

// Debian is the root of the unpacked packages.
func (p Parts) Debian() string { return filepath.Join(p.Dir, "debian") }

// Kubernetes is the path of a command of Kubernetes, or of etcd: links to one binary.
func (p Parts) Kubernetes(command string) string {
	return filepath.Join(p.Dir, "kubernetes", command)
}

// CoreDNS is the path of the DNS server, which is static.
func (p Parts) CoreDNS() string { return filepath.Join(p.Dir, "coredns") }

// Find returns the parts, or ErrNotBuilt.
func Find(ctx context.Context) (Parts, error) {
	source, err := source(ctx)
	if err != nil {
		return Parts{}, err
	}
	dir, err := cached(source)
	if err != nil {
		return Parts{}, err
	}
	if _, err := os.Stat(dir); err != nil {
		return Parts{}, ErrNotBuilt
	}
	return Parts{Dir: dir}, nil
}

// source is this package's parent in the clone that the caller is run in.
func source(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", module+"/e2e/cluster")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find the sources of package cluster: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// cached is where the parts made from source belong.
func cached(source string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache: %w", err)
	}
	hash := sha256.New()
	for _, m := range []string{"kubernetes", "coredns"} {
		for _, f := range []string{"go.mod", "go.sum", "main.go"} {
			content, err := os.ReadFile(filepath.Join(source, m, f))
			if err != nil {
				return "", fmt.Errorf("hash what the parts are made from: %w", err)
			}
			hash.Write(content)
		}
	}
	hash.Write([]byte(strings.Join(packages(), " ")))
	return filepath.Join(cache, "raceway", "kubernetes", hex.EncodeToString(hash.Sum(nil))[:16]), nil
}
