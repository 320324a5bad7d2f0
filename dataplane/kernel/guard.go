package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/raceway-mesh/raceway/bpf"
)

// quiet is how long Guard waits before it lists connections: a connect() that had passed
// its hook when the hook was switched on has its socket in the kernel's tables by then.
const quiet = 100 * time.Millisecond

// TCP states (include/net/tcp_states.h) that matter here; the dump leaves out those of
// sockets that cannot send.
const (
	tcpSynSent    = 2
	tcpSynRecv    = 3
	tcpNewSynRecv = 12
)

// Guard notes which connections are older than the capture and attaches the guard to the
// host's end of the pod's veth: from then on no other plaintext TCP leaves the pod. Call it
// when outbound and inbound capture are on. A guard that is in force only gets the new
// program: connections made since are none of the older ones.
func (p *Pod) Guard(ctx context.Context) error {
	if err := p.guard(ctx); err != nil {
		return fmt.Errorf("guard pod %s: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) guard(ctx context.Context) error {
	if p.d.cfg.DisableGuard {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return os.ErrClosed
	}
	in, err := p.d.guardInForce(p.rec)
	if err != nil || in {
		return err
	}
	select {
	case <-time.After(quiet):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := p.noteOlder(false); err != nil {
		return err
	}
	return p.attachGuard()
}

// attachGuard also updates one that is attached.
func (p *Pod) attachGuard() error {
	ifindex, err := p.hostEnd()
	if err != nil {
		return err
	}
	prog, err := p.d.loaded.instance(progGuard, p.rec.Cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	p.rec.HostIfindex = ifindex
	if err := p.d.ledger.save(p.rec); err != nil {
		return err
	}
	if err := p.d.attachTC(p.rec, p.d.guardPoint(p.rec), prog); err != nil {
		return fmt.Errorf("attach to interface %d of %s: %w", ifindex, p.d.host.Path(), err)
	}
	return nil
}

// renewGuard puts this agent's program in the place of an earlier agent's. That of another
// layout knows neither our sockets nor our map of older connections. Those are listed
// again, but only connections that are complete: while the old guard was in force nothing
// forged could become one.
func (p *Pod) renewGuard(oldLayout bool) error {
	in, err := p.d.guardInForce(p.rec)
	if err != nil || !in {
		return err
	}
	if oldLayout {
		if err := p.noteOlder(true); err != nil {
			return err
		}
	}
	if err := p.attachGuard(); err != nil {
		return fmt.Errorf("renew the guard: %w", err)
	}
	return nil
}

func (d *Datapath) guardPoint(r *record) point { return point{pinGuard, d.host, r.HostIfindex} }

func (d *Datapath) guardInForce(r *record) (bool, error) {
	if r.HostIfindex == 0 {
		return false, nil
	}
	pin := filepath.Join(d.podDir(r), pinGuard)
	ifindex, err := tcxInterface(pin)
	if err == nil {
		return ifindex == r.HostIfindex, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	in := false
	err = d.host.Do(func() error {
		l, err := netlink.LinkByIndex(r.HostIfindex)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		filter, err := findFilter(r, d.guardPoint(r), l)
		in = filter != nil
		return err
	})
	return in, err
}

// Unguard lets the pod speak in clear again.
func (p *Pod) Unguard() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("unguard pod %s: %w", p.uid, os.ErrClosed)
	}
	err := errors.Join(p.d.detachGuard(p.rec), p.d.forgetOlder(p.rec.Cookie), p.d.ledger.save(p.rec))
	if err != nil {
		return fmt.Errorf("unguard pod %s: %w", p.uid, err)
	}
	clear(p.older)
	return nil
}

func (d *Datapath) detachGuard(r *record) error {
	if r.HostIfindex == 0 {
		return nil
	}
	if err := d.detachTC(r, d.guardPoint(r)); err != nil {
		return fmt.Errorf("detach the guard: %w", err)
	}
	r.HostIfindex = 0
	return nil
}

// Bypassing counts the connections that are older than the capture and go on in clear, as
// of the last Guard or Prune.
func (p *Pod) Bypassing() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.older)
}

// Prune forgets the older connections that have ended. Until then the guard lets through
// whatever carries their addresses, so call it now and then.
func (p *Pod) Prune() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("prune pod %s: %w", p.uid, os.ErrClosed)
	}
	if len(p.older) == 0 {
		return nil
	}
	connections, err := p.connections()
	if err != nil {
		return fmt.Errorf("prune pod %s: %w", p.uid, err)
	}
	live := make(map[bpf.RacewayTuple]struct{}, len(connections))
	for _, c := range connections {
		if c.Own == 0 {
			live[p.tuple(c)] = struct{}{}
		}
	}
	var errs []error
	for t := range p.older {
		if _, ok := live[t]; ok {
			continue
		}
		if err := ignoreMissing(p.d.loaded.maps.Established.Delete(t)); err != nil {
			errs = append(errs, fmt.Errorf("prune pod %s: %w", p.uid, err))
			continue
		}
		delete(p.older, t)
	}
	return errors.Join(errs...)
}

func (p *Pod) loadOlder() error {
	older, err := p.d.olderOf(p.rec.Cookie)
	p.older = older
	return err
}

// noteOlder enters the pod's present connections; with complete, only those whose handshake
// is over.
func (p *Pod) noteOlder(complete bool) error {
	connections, err := p.connections()
	if err != nil {
		return err
	}
	for _, c := range connections {
		opening := c.State == tcpSynSent || c.State == tcpSynRecv || c.State == tcpNewSynRecv
		if !p.isOlder(c) || (complete && opening) {
			continue
		}
		t := p.tuple(c)
		if err := p.d.loaded.maps.Established.Put(t, uint32(1)); err != nil {
			return fmt.Errorf("note a connection older than the enrolment: %w", err)
		}
		p.older[t] = struct{}{}
	}
	return nil
}

// isOlder tells the applications' own direct connections from the agent's sockets, from
// the application's ends of captured connections (they carry our marks, and go by lo), and
// from those still waiting on one of our listeners.
func (p *Pod) isOlder(c bpf.RacewayConnection) bool {
	if c.Own != 0 || c.Mark&markMask == markRedirect || p.isListenerPort(c.ListenerPort) {
		return false
	}
	return slices.Contains(p.addrs, fromAddr(c.Local))
}

func (p *Pod) isListenerPort(port uint16) bool {
	for _, l := range []*net.TCPListener{p.outbound, p.inbound, p.tunnel} {
		if port != 0 && l != nil && l.Addr().(*net.TCPAddr).AddrPort().Port() == port {
			return true
		}
	}
	return false
}

func (p *Pod) tuple(c bpf.RacewayConnection) bpf.RacewayTuple {
	return bpf.RacewayTuple{
		Netns: p.rec.Cookie,
		Local: c.Local, LocalPort: c.LocalPort,
		Remote: c.Remote, RemotePort: c.RemotePort,
	}
}

// connections lists the TCP sockets of the pod's namespace that can send.
func (p *Pod) connections() ([]bpf.RacewayConnection, error) {
	var list io.ReadCloser
	// The iterator is bound to the namespace of the thread that opens it.
	err := p.ns.Do(func() (err error) {
		list, err = p.d.loaded.dump.Open()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open iter/tcp: %w", err)
	}
	data, err := io.ReadAll(list)
	if err := errors.Join(err, list.Close()); err != nil {
		return nil, fmt.Errorf("read iter/tcp: %w", err)
	}
	return readConnections(data)
}
