package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"

	"github.com/raceway-mesh/raceway/dataplane/netns"
	"github.com/raceway-mesh/raceway/e2e/space"
)

// Host is one network namespace: a node, a pod, the fabric or control.
type Host struct {
	Name  string
	Addrs []netip.Addr // in the order of the lab's families

	lab     *Lab
	space   *space.Space
	hostEnd string // of a pod's veth pair, in its node
}

// NetNS is the path of the namespace, as `ip netns` and setns(2) want it.
func (h *Host) NetNS() string { return h.space.Path }

// Addr is the host's address in the lab's primary family.
func (h *Host) Addr() netip.Addr { return h.Addrs[0] }

// AddrPort is port on Addr.
func (h *Host) AddrPort(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.Addr(), port) }

// HostEnd is the name of the node's end of a pod's veth pair, "" for other hosts.
func (h *Host) HostEnd() string { return h.hostEnd }

// Namespace makes sockets in the namespace with every option that there is. It is the
// host's: nobody else closes it.
func (h *Host) Namespace() *netns.Namespace { return h.space.NS }

// Do runs fn on a locked thread in the namespace. A socket that fn makes stays in the
// namespace; a goroutine that fn starts is not in it.
func (h *Host) Do(fn func() error) error { return h.space.NS.Do(fn) }

// Dial connects from the namespace.
func (h *Host) Dial(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error) {
	return h.space.NS.Dial(ctx, netns.DialConfig{Remote: remote})
}

// Listen listens on a port of all the host's addresses, IPv4 and IPv6.
func (h *Host) Listen(port uint16) (*net.TCPListener, error) {
	return h.space.NS.Listen(netns.ListenConfig{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), port)})
}

// ListenPacket opens a packet socket, such as UDP's, in the namespace.
func (h *Host) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var conn net.PacketConn
	err := h.Do(func() (err error) {
		conn, err = new(net.ListenConfig).ListenPacket(ctx, network, address)
		return err
	})
	return conn, err
}

// Sysctl sets net.… values of the namespace, given as name, value, name, value, in order.
func (h *Host) Sysctl(pairs ...string) error { return h.space.Sysctl(pairs...) }

// Exec runs a command in the namespace to its end and returns what it wrote to both outputs.
func (h *Host) Exec(ctx context.Context, command string, args ...string) ([]byte, error) {
	var output bytes.Buffer
	cmd := exec.Command(command, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	p, err := h.Start(cmd)
	if err != nil {
		return nil, err
	}
	if err := p.Wait(ctx); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w (and then: %w)", err, p.Kill())
			<-p.Done()
		}
		return output.Bytes(), fmt.Errorf("run %s on %s: %w", command, h.Name, err)
	}
	return output.Bytes(), nil
}

// Start starts cmd in the namespace. Outputs that cmd does not name go to the process's log
// file. cmd must not be from exec.CommandContext: the process lives until Stop, Kill or the
// lab's Close.
func (h *Host) Start(cmd *exec.Cmd) (*Process, error) {
	return h.start(cmd, applicationProcess, "")
}
