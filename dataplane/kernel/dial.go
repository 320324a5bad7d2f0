package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// DialTunnel connects from the pod to the tunnel port of another workload.
func (p *Pod) DialTunnel(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error) {
	return p.dialOut(ctx, remote)
}

// DialDirect connects from the pod to a destination in clear, past the capture.
func (p *Pod) DialDirect(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error) {
	return p.dialOut(ctx, remote)
}

func (p *Pod) dialOut(ctx context.Context, remote netip.AddrPort) (*net.TCPConn, error) {
	return p.ns.Dial(ctx, netns.DialConfig{
		Remote:  remote,
		Control: p.d.claimSocket(bpf.RacewayListenerLISTENER_NONE),
	})
}

// attempts bounds how often DialApp tries another source port.
const attempts = 8

var errCollision = errors.New("the source port belongs to a connection of the client itself")

// DialApp connects to the application at one of the pod's addresses from the address of
// the client, which is what the application then sees. The source port is the kernel's choice.
//
// A client whose plaintext connection was captured has a socket here already, with the
// client's port. Should the kernel choose that port for us, our SYN would meet that socket
// and never the application; it is found out, and another port is tried.
func (p *Pod) DialApp(ctx context.Context, client, app netip.AddrPort) (*net.TCPConn, error) {
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	app = netip.AddrPortFrom(app.Addr().Unmap(), app.Port())
	if !slices.Contains(p.addrs, app.Addr()) {
		return nil, fmt.Errorf("dial the application at %v: %v is not an address of the pod", app, app.Addr())
	}
	var err error
	for range attempts {
		var conn *net.TCPConn
		conn, err = p.ns.Dial(ctx, netns.DialConfig{
			Remote:      app,
			Local:       netip.AddrPortFrom(client.Addr(), 0),
			Transparent: true,
			Device:      loopback,
			Mark:        markApp,
			Control:     p.d.claimSocket(bpf.RacewayListenerLISTENER_NONE),
			Pending:     p.checkCollision(client.Addr(), app),
		})
		if !errors.Is(err, errCollision) {
			return conn, err
		}
	}
	return nil, err
}

// checkCollision looks at a dial that did not complete at once, which over loopback is
// rare: has the agent a socket in the pod whose peer is the address and port that we
// connect from?
func (p *Pod) checkCollision(client netip.Addr, app netip.AddrPort) func(fd int) error {
	return func(fd int) error {
		port, err := localPort(fd)
		if err != nil {
			return err
		}
		connections, err := p.connections()
		if err != nil {
			return err
		}
		local, remote := toAddr(app.Addr()), toAddr(client)
		for _, c := range connections {
			if c.Own != 0 && c.LocalPort == app.Port() && c.RemotePort == port && c.Local == local && c.Remote == remote {
				return errCollision
			}
		}
		return nil
	}
}

func localPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	default:
		return 0, fmt.Errorf("a TCP socket with a %T", sa)
	}
}
