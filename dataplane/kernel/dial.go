package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	return p.ns.Dial(ctx, p.outward(remote))
}

// DialDirect connects from the pod to a destination in clear, past the capture.
func (p *Pod) DialDirect(ctx context.Context, remote netip.AddrPort) (*netns.Conn, error) {
	return p.ns.Connect(ctx, p.outward(remote))
}

func (p *Pod) outward(remote netip.AddrPort) netns.DialConfig {
	return netns.DialConfig{Remote: remote, Control: p.d.claimSocket(bpf.RacewayListenerLISTENER_NONE)}
}

// attempts bounds how often DialApp tries another source port.
const attempts = 32

// DialApp chooses source ports below those that clients choose from, Linux (32768 on) as
// well as others (49152 on, RFC 6335 section 6).
const (
	firstAppPort = 1024
	endAppPorts  = 32768
)

var errCollision = errors.New("the source port belongs to a connection of the client itself")

// DialApp connects to the application at one of the pod's addresses from the address of
// the client, which is what the application then sees. Where the client has begun to speak, its
// first bytes are to come right behind.
//
// The client may have connections to the application that are not ours: it connected
// before the enrolment, or after a release. Their sockets are here too, and a SYN of ours
// with the same addresses and ports would meet one of them, as would a SYN of the client
// meet our connection: both hang. So the port must be one that the client does not use for
// the application: client's own, if it is that of a connection that the client tunnels
// (it cannot use it twice); else, when client has port 0 or its port is taken, one from a
// range that clients do not choose from. What collides even so is found out, and another
// port is tried.
func (p *Pod) DialApp(ctx context.Context, client, app netip.AddrPort, begun bool) (*netns.Conn, error) {
	client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
	app = netip.AddrPortFrom(app.Addr().Unmap(), app.Port())
	if !slices.Contains(p.addrs, app.Addr()) {
		return nil, fmt.Errorf("dial the application at %v: %v is not an address of the pod", app, app.Addr())
	}
	local, bound := client, loopbackIfindex
	if slices.Contains(p.addrs, client.Addr()) {
		// The pod itself, by way of a service. What goes from one of its own addresses to
		// another is looked up in the local table before ours, and then counts as received
		// on the interface that has the address, though it passes through lo.
		bound = 0
	}
	var err error
	for range attempts {
		if local.Port() < firstAppPort {
			local = netip.AddrPortFrom(client.Addr(), uint16(firstAppPort+rand.N(endAppPorts-firstAppPort)))
		}
		var conn *netns.Conn
		conn, err = p.ns.Connect(ctx, netns.DialConfig{
			Remote:      app,
			Local:       local,
			Transparent: true,
			Interface:   bound,
			DeferACK:    begun,
			Mark:        markApp,
			Control:     p.d.claimSocket(bpf.RacewayListenerLISTENER_NONE),
			Pending:     p.checkCollision(client.Addr(), app),
		})
		switch {
		case err == nil:
			return conn, nil
		case !errors.Is(err, errCollision) && !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL):
			return nil, err
		}
		local = netip.AddrPort{}
	}
	return nil, err
}

// checkCollision looks at a dial that did not complete at once, which over loopback is
// rare: has the pod a socket, not the application's end of this very dial, whose peer is
// the address and port that we connect from?
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
			same := c.LocalPort == app.Port() && c.RemotePort == port && c.Local == local && c.Remote == remote
			opening := c.State == tcpSynRecv || c.State == tcpNewSynRecv
			if same && (c.Own != 0 || !opening && c.Mark&markMask != markRedirect) {
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
