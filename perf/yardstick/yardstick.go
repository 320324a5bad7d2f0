// Package yardstick runs what the mesh is compared with: pairs of relays that nobody would
// call slow, on the same way through the same network namespaces.
//
//	client ─► Entry, relay ══ mutual TLS, or QUIC ══► Link, relay ─► Application
//	└── the client's pod ──┘                        └── the server's pod ──┘
//
// The mesh captures a connection inside the client's pod and delivers it inside the
// server's, so the relays stand there too: the hops are the same.
package yardstick

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// Path is where the two relays of a pair listen, and whom they serve.
type Path struct {
	Entry       netip.AddrPort // the first relay, in the client's pod
	Link        netip.AddrPort // the second relay, in the server's pod
	Application netip.AddrPort // as the second relay reaches it
}

// Side is one end of the link.
type Side string

// The sides, as the files of their certificates are named.
const (
	ClientSide Side = "client"
	ServerSide Side = "server"
)

// hop is where the relay of a side listens, and where it connects to.
func (p Path) hop(s Side) (listen, dial netip.AddrPort) {
	if s == ServerSide {
		return p.Link, p.Application
	}
	return p.Entry, p.Link
}

// Pair makes the command lines of a pair's two relays.
type Pair interface {
	// Command writes what the relay of a side needs into dir, which also has the
	// credentials of both (see WriteCredentials), and returns its command.
	Command(dir string, side Side, path Path) (*exec.Cmd, error)
}

// ErrNotInstalled is of a yardstick whose program is not on this machine.
var ErrNotInstalled = errors.New("not installed")

// find looks a program up: where it was said to be, in PATH, and where administrators'
// programs are, which PATH may lack.
func find(name, given, remedy string) (string, error) {
	if given != "" {
		if _, err := os.Stat(given); err != nil {
			return "", fmt.Errorf("%s: %w (%s): %w", name, ErrNotInstalled, remedy, err)
		}
		return given, nil
	}
	candidates := []string{name, filepath.Join("/usr/sbin", name)}
	for _, c := range candidates {
		if path, err := exec.LookPath(c); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w (%s)", name, ErrNotInstalled, remedy)
}

// GoRelay is a pair as a Go programmer writes it: see Relay.
type GoRelay struct {
	// Program is the command line of a program that calls Relay with the arguments that
	// follow it.
	Program []string
	// TLS puts mutual TLS 1.3 on the link, one connection of it for each of TCP; without,
	// the kernel moves the bytes (splice).
	TLS bool
}

// Command is part of Pair.
func (g GoRelay) Command(dir string, side Side, path Path) (*exec.Cmd, error) {
	listen, dial := path.hop(side)
	args := append(slices.Clone(g.Program[1:]), "--listen", listen.String(), "--dial", dial.String())
	if g.TLS {
		args = append(args, "--tls", string(side), "--credentials", dir)
	}
	return exec.Command(g.Program[0], args...), nil
}
