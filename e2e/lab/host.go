package lab

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
)

// Host is one network namespace: a node, a pod, the fabric or control.
type Host struct {
	Name  string
	Addrs []netip.Addr // in the order of the lab's families

	lab     *Lab
	space   *space
	hostEnd string // of a pod's veth pair, in its node
}

// NetNS is the path of the namespace, as `ip netns` and setns(2) want it.
func (h *Host) NetNS() string { return h.space.path }

// Addr is the host's address in the lab's primary family.
func (h *Host) Addr() netip.Addr { return h.Addrs[0] }

// AddrPort is port on Addr.
func (h *Host) AddrPort(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.Addr(), port) }

// HostEnd is the name of the node's end of a pod's veth pair, "" for other hosts.
func (h *Host) HostEnd() string { return h.hostEnd }

// Do runs fn on a locked thread in the namespace. A socket that fn makes stays in the
// namespace; a goroutine that fn starts is not in it.
func (h *Host) Do(fn func() error) error { return h.space.do(fn) }

// Dial connects from the namespace to an address (there is no DNS). The thread that is in
// the namespace waits for the connection; ctx bounds it.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", h.Name, err)
	}
	var conn net.Conn
	err := h.space.do(func() (err error) {
		// An address that needs no look-up, in one family, is dialled on the calling thread.
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// DialFrom is Dial with a source address that the namespace may not have (IP_TRANSPARENT
// and the like are up to control, which gets the socket before it is bound).
func (h *Host) DialFrom(ctx context.Context, d net.Dialer, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := h.space.do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens in the namespace.
func (h *Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var listener net.Listener
	err := h.space.do(func() (err error) {
		listener, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err
	})
	return listener, err
}

// ListenPacket opens a packet socket, such as UDP's, in the namespace.
func (h *Host) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var conn net.PacketConn
	err := h.space.do(func() (err error) {
		conn, err = new(net.ListenConfig).ListenPacket(ctx, network, address)
		return err
	})
	return conn, err
}

// Sysctl sets net.… values of the namespace, given as name, value, name, value, in order.
func (h *Host) Sysctl(pairs ...string) error { return h.space.sysctl(pairs...) }

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
