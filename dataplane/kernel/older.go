package kernel

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// TCP states (include/net/tcp_states.h) that matter here; the dump leaves out sockets that
// listen or are closed.
const (
	tcpSynSent    = 2
	tcpSynRecv    = 3
	tcpTimeWait   = 6
	tcpNewSynRecv = 12
)

// Bypassing counts the connections that are older than the capture and go on in clear, as
// of the last Guard or Prune.
func (p *Pod) Bypassing() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.older)
}

// Opening counts those of them that were not answered yet. The guard lets their SYNs pass,
// so Prune soon.
func (p *Pod) Opening() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, stage := range p.older {
		if stage == bpf.RacewayStageSTAGE_OPENING {
			n++
		}
	}
	return n
}

// Prune forgets the older connections that have ended, and those that turned out to be
// none. Until then the guard lets through what carries their addresses, so call it now and
// then.
func (p *Pod) Prune() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(); err != nil {
		return fmt.Errorf("prune pod %s: %w", p.uid, err)
	}
	if len(p.older) == 0 {
		return nil
	}
	live, err := p.listOlder()
	if err != nil {
		return fmt.Errorf("prune pod %s: %w", p.uid, err)
	}
	var errs []error
	for t, before := range p.older {
		var err error
		switch stage, ok := live[t]; {
		case !ok:
			if err = ignoreMissing(p.d.loaded.maps.Established.Delete(t)); err == nil {
				delete(p.older, t)
			}
		case stage < before: // never the other way: a SYN for it would be a new connection
			err = p.note(t, stage)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("prune pod %s: %w", p.uid, err))
		}
	}
	return errors.Join(errs...)
}

func (p *Pod) loadOlder() error {
	older, err := p.d.olderOf(p.rec.Cookie)
	p.older = older
	return err
}

// noteOlder enters the pod's present connections.
func (p *Pod) noteOlder() error {
	older, err := p.listOlder()
	if err != nil {
		return err
	}
	for t, stage := range older {
		if err := p.note(t, stage); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pod) note(t bpf.RacewayTuple, stage bpf.RacewayStage) error {
	if err := p.d.loaded.maps.Established.Put(t, stage); err != nil {
		return fmt.Errorf("note a connection older than the enrolment: %w", err)
	}
	p.older[t] = stage
	return nil
}

// listOlder lists the connections of the pod that can be older than its capture.
func (p *Pod) listOlder() (map[bpf.RacewayTuple]bpf.RacewayStage, error) {
	connections, err := p.connections()
	if err != nil {
		return nil, err
	}
	l, err := p.lookAround(connections)
	if err != nil {
		return nil, err
	}
	older := make(map[bpf.RacewayTuple]bpf.RacewayStage)
	for _, c := range connections {
		if !p.isOlder(c, l) {
			continue
		}
		stage := bpf.RacewayStageSTAGE_COMPLETE
		if c.State == tcpSynSent {
			stage = bpf.RacewayStageSTAGE_OPENING
		}
		older[bpf.RacewayTuple{
			Netns: p.rec.Cookie,
			Local: c.Local, LocalPort: c.LocalPort,
			Remote: c.Remote, RemotePort: c.RemotePort,
		}] = stage
	}
	return older, nil
}

// surroundings are what a connection of a pod is judged by.
type surroundings struct {
	exits map[uint32]bool     // the pod's interfaces that lead to the guard
	addrs map[netip.Addr]bool // the pod's own addresses
	ends  map[ends]bool       // of all sockets in the namespace
	mss   uint32              // more than a peer behind one of exits announces, and less than lo does
}

type ends struct{ local, remote netip.AddrPort }

func endsOf(c bpf.RacewayConnection) ends {
	return ends{netip.AddrPortFrom(fromAddr(c.Local), c.LocalPort), netip.AddrPortFrom(fromAddr(c.Remote), c.RemotePort)}
}

func (p *Pod) lookAround(connections []bpf.RacewayConnection) (*surroundings, error) {
	around := &surroundings{exits: make(map[uint32]bool), addrs: make(map[netip.Addr]bool), ends: make(map[ends]bool)}
	exits, err := p.exits()
	if err != nil {
		return nil, err
	}
	if around.mss, err = p.announcedBelow(exits); err != nil {
		return nil, err
	}
	for _, a := range p.addrs {
		around.addrs[a] = true
	}
	for _, e := range exits {
		around.exits[uint32(e.inside)] = true
		for _, a := range e.addrs {
			around.addrs[a] = true
		}
	}
	for _, c := range connections {
		around.ends[endsOf(c)] = true
	}
	return around, nil
}

// headers is the most that IPv6, TCP and its options take of a packet.
const headers = 40 + 60

func (p *Pod) announcedBelow(exits []exit) (uint32, error) {
	most := 0
	for _, e := range exits {
		most = max(most, e.mtu)
	}
	err := p.ns.Do(func() error {
		lo, err := netlink.LinkByIndex(loopbackIfindex)
		if err == nil {
			most = min(most, lo.Attrs().MTU-headers)
		}
		return err
	})
	return uint32(max(most, 0)), err
}

// isOlder tells direct connections of the applications to others from the agent's sockets,
// from the applications' ends of captured connections, and from what a pod makes look like a
// direct connection. Marks are not enough: whoever has CAP_NET_RAW takes ours off. So:
//
//   - a connection that was answered got its segments by an interface that leads to the
//     guard (a captured one, and what a pod plays to itself on lo, got them by lo);
//   - one whose only segment, the SYN-ACK, came while connect() held the socket does not know
//     by which; its peer then announced a segment size that is none of lo's;
//   - its other end is not in the pod's own namespace;
//   - one that was not answered sent its first SYN before connect() was captured;
//   - one that is about to be accepted waits on an application's listener. Where its SYN
//     came from is seen once it is accepted, at the next Prune.
func (p *Pod) isOlder(c bpf.RacewayConnection, around *surroundings) bool {
	at := endsOf(c)
	switch {
	case c.Own != 0, c.Mark&markMask == markRedirect, p.isListenerPort(c.ListenerPort), c.State == tcpTimeWait:
		return false
	case !around.addrs[at.local.Addr()], around.addrs[at.remote.Addr()], at.remote.Addr().IsLoopback():
		return false
	case around.ends[ends{at.remote, at.local}]:
		return false
	case c.State == tcpSynSent:
		return p.precedesCapture(time.Duration(c.Age) * time.Millisecond)
	case c.State == tcpNewSynRecv:
		return true
	case c.Ifindex == 0:
		return c.Mss != 0 && c.Mss < around.mss
	}
	return around.exits[c.Ifindex]
}

// precedesCapture tells whether what began that long ago did so before outbound capture.
func (p *Pod) precedesCapture(age time.Duration) bool {
	if !p.rec.Outbound {
		return true
	}
	since, now := time.Duration(p.rec.OutboundSince), monotonic()
	return age > 0 && since > 0 && now > 0 && now-age <= since+quiet
}

// monotonic is the time since boot, by the clock of the kernel's TCP; the next agent has the
// same. 0 means that it cannot be told.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func (p *Pod) isListenerPort(port uint16) bool {
	if port == 0 {
		return false
	}
	for _, l := range p.listeners() {
		if l.Addr().(*net.TCPAddr).AddrPort().Port() == port {
			return true
		}
	}
	return false
}

// connections lists the TCP sockets of the pod's namespace that can send.
func (p *Pod) connections() ([]bpf.RacewayConnection, error) { return p.d.connections(p.ns) }

func (d *Datapath) connections(ns *netns.Namespace) ([]bpf.RacewayConnection, error) {
	var list io.ReadCloser
	// The iterator is bound to the namespace of the thread that opens it.
	err := ns.Do(func() (err error) {
		list, err = d.loaded.dump.Open()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open iter/tcp: %w", err)
	}
	data, err := io.ReadAll(list)
	if err := errors.Join(err, list.Close()); err != nil {
		return nil, fmt.Errorf("read iter/tcp: %w", err)
	}
	return records[bpf.RacewayConnection]("iter/tcp", data)
}

func (d *Datapath) forgetOlder(cookie uint64) error {
	older, err := d.olderOf(cookie)
	if err != nil {
		return err
	}
	var errs []error
	for t := range older {
		errs = append(errs, ignoreMissing(d.loaded.maps.Established.Delete(t)))
	}
	return errors.Join(errs...)
}

func (d *Datapath) olderOf(cookie uint64) (map[bpf.RacewayTuple]bpf.RacewayStage, error) {
	older := make(map[bpf.RacewayTuple]bpf.RacewayStage)
	var key bpf.RacewayTuple
	var stage bpf.RacewayStage
	entries := d.loaded.maps.Established.Iterate()
	for entries.Next(&key, &stage) {
		if key.Netns == cookie {
			older[key] = stage
		}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read connections older than enrolment: %w", err)
	}
	return older, nil
}

// carryOlder copies the older connections of pods in force from the maps of other layouts
// below dir. They cannot be listed again: the pods had all the time to forge some.
func (l *loaded) carryOlder(dir string, records map[string]*record, log *slog.Logger) error {
	paths, err := filepath.Glob(filepath.Join(dir, layoutPrefix+"*", mapEstablished))
	if err != nil {
		return err
	}
	for _, path := range paths {
		old, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		if err := errors.Join(l.copyOlder(old, records, log), old.Close()); err != nil {
			return fmt.Errorf("carry over %s: %w", path, err)
		}
	}
	return nil
}

func (l *loaded) copyOlder(old *ebpf.Map, records map[string]*record, log *slog.Logger) error {
	if now := l.maps.Established; old.KeySize() != now.KeySize() || old.ValueSize() != now.ValueSize() {
		log.Warn("connections older than their pods' capture end: an earlier agent noted them in a form that cannot be taken over")
		return nil
	}
	var key bpf.RacewayTuple
	var stage bpf.RacewayStage
	inForce := make(map[uint64]bool, len(records))
	for _, r := range records {
		inForce[r.Cookie] = true
	}
	entries := old.Iterate()
	for entries.Next(&key, &stage) {
		if !inForce[key.Netns] {
			continue
		}
		if err := l.maps.Established.Put(key, stage); err != nil {
			return err
		}
	}
	return entries.Err()
}
