package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// The listeners are bound to an address that nobody has (RFC 5737), so steer is the only
// way in: an application cannot reach one directly and make the agent connect to itself.
// It is spelt as IPv6, since such a socket takes both families from steer; a true IPv6
// address would make the socket IPv6-only when it is bound. The second is for kernels
// without IPv6.
func listenAddrs() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.1"), netip.MustParseAddr("192.0.2.1")}
}

// listener is one of the pod's three.
type listener struct {
	socket
	name string
	kind bpf.RacewayListener
}

type socket interface {
	net.Listener
	syscall.Conn
}

// listeners are those that there are.
func (p *Pod) listeners() []listener {
	all := make([]listener, 0, 3)
	if p.outbound != nil {
		all = append(all, listener{p.outbound, "outbound", bpf.RacewayListenerLISTENER_OUTBOUND})
	}
	if p.inbound != nil {
		all = append(all, listener{p.inbound, "inbound", bpf.RacewayListenerLISTENER_INBOUND})
	}
	if p.tunnel != nil {
		all = append(all, listener{p.tunnel, "tunnel", bpf.RacewayListenerLISTENER_TUNNEL})
	}
	return all
}

func (p *Pod) listen() error {
	// Where one cannot be made, the closed one that it was to replace stays: whoever accepts is told.
	outbound, err := p.capturing(dataplane.PortOutbound, bpf.RacewayListenerLISTENER_OUTBOUND)
	if err != nil {
		return err
	}
	p.outbound = outbound
	inbound, err := p.capturing(dataplane.PortInbound, bpf.RacewayListenerLISTENER_INBOUND)
	if err != nil {
		return err
	}
	p.inbound = inbound
	tunnel, err := p.listenOn(dataplane.PortTunnel, bpf.RacewayListenerLISTENER_TUNNEL)
	if err != nil {
		return err
	}
	p.tunnel = tunnel
	return p.registerTCP()
}

// capturing is a listener for applications' connections.
func (p *Pod) capturing(port uint16, kind bpf.RacewayListener) (*netns.Listener, error) {
	l, err := p.listenOn(port, kind)
	if err != nil {
		return nil, err
	}
	return netns.TakeListener(l)
}

func (p *Pod) registerTCP() error {
	for _, l := range p.listeners() {
		if err := p.register(l); err != nil {
			return err
		}
	}
	return nil
}

// listenOn prefers IPv6, which takes IPv4 as well, and the usual port, which tells people
// that look at `ss` what it is. Neither matters to steer, so an application that holds the
// port, and a kernel without IPv6, are no obstacle.
func (p *Pod) listenOn(port uint16, kind bpf.RacewayListener) (*net.TCPListener, error) {
	var errs []error
	for _, addr := range listenAddrs() {
		for _, port := range []uint16{port, 0} {
			l, err := p.ns.Listen(netns.ListenConfig{
				Addr:        netip.AddrPortFrom(addr, port),
				Transparent: true,
				Control:     p.d.claimSocket(kind),
			})
			if err == nil {
				return l, nil
			}
			errs = append(errs, err)
		}
	}
	return nil, errors.Join(errs...)
}

func (p *Pod) register(l listener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	key := bpf.RacewayListenerKey{Netns: p.rec.Cookie, Kind: l.kind}
	var putErr error
	err = raw.Control(func(fd uintptr) { putErr = p.d.loaded.maps.Listeners.Put(key, uint64(fd)) })
	if err := errors.Join(err, putErr); err != nil {
		return fmt.Errorf("register the %s listener: %w", l.name, err)
	}
	return nil
}

// Listening returns what became of a listener that listens no more: whoever has CAP_NET_ADMIN
// in the pod can destroy any socket there (ss -K). Relisten is the remedy. Of a pod or a
// listener that was closed it says nothing.
func (p *Pod) Listening() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	for _, l := range p.listeners() {
		listens, err := accepts(l)
		if err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("look at the %s listener: %w", l.name, err)
		}
		if err == nil && !listens {
			return fmt.Errorf("the %s listener was destroyed by somebody in the pod", l.name)
		}
	}
	return nil
}

func accepts(l syscall.Conn) (listens bool, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return false, err
	}
	var value int
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		value, sockErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	})
	return value == 1, errors.Join(err, sockErr)
}

// Relisten replaces the listeners. Connections that they accepted go on; whoever accepts from
// the old ones gets net.ErrClosed, and has to start again with the new.
func (p *Pod) Relisten() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return fmt.Errorf("listen anew in pod %s: %w", p.uid, err)
	}
	if err := errors.Join(p.closeListeners(), p.listen()); err != nil {
		return fmt.Errorf("listen anew in pod %s: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) closeListeners() error {
	var errs []error
	for _, l := range p.listeners() {
		// The proxy may have closed it to stop accepting.
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
