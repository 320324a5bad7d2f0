package kernel

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/raceway-mesh/raceway/bpf"
	"github.com/raceway-mesh/raceway/dataplane"
)

// Capture of UDP (bpf/include/datagram.h). It is off until CaptureUDP, and reaches only those
// that SetPeers names.

// UDPConfig says what of a pod's UDP is captured.
type UDPConfig struct {
	// Strict refuses what peers send in clear, but answers to what the pod sent in clear.
	Strict bool
	// Require captures what the pod sends to others than peers as well, but to multicast,
	// broadcast and link-local addresses, DHCP, and in answer to what they sent in clear. Where
	// that cannot be, the guard drops it, the answers too.
	Require bool
	// Clear is destination ports of the pod, and of its peers as the pod sees them, that are
	// left alone; at most MaxClearPorts.
	Clear []dataplane.PortRange
}

const (
	progDivert    = "divert"
	progReceive   = "receive"
	progNoteOlder = "note_older"
	progListOlder = "list_older"
)

// CanCaptureUDP reports whether this kernel's SK_LOOKUP knows the interface, as since Linux 5.17.
func CanCaptureUDP() bool {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return false
	}
	var lookup *btf.Struct
	if err := spec.TypeByName("bpf_sk_lookup", &lookup); err != nil {
		return false
	}
	return slices.ContainsFunc(lookup.Members, func(m btf.Member) bool { return m.Name == "ingress_ifindex" })
}

// NoUDP says why no pod's UDP can be captured; nil when it can.
func (d *Datapath) NoUDP() error { return d.noUDP() }

// probeUDP loads what the capture takes.
func (d *Datapath) probeUDP() error {
	if d.inbound != InboundSKLookup {
		return errors.New("it needs SK_LOOKUP with ingress_ifindex, Linux 5.17, and inbound connections are redirected with TC")
	}
	if err := settle(d.loaded.spec.Programs[progDivert]); err != nil {
		return fmt.Errorf("settle %s: %w", progDivert, err)
	}
	for _, name := range []string{progDivert, progReceive} {
		prog, err := d.loaded.instance(name, 0)
		if err != nil {
			return err
		}
		if err := prog.Close(); err != nil {
			return err
		}
	}
	_, err := d.loaded.udpIter(progNoteOlder)
	return err
}

// CaptureUDP hands the pod's UDP with peers to the agent, from now on: sockets that exist go on
// in clear until they close. It may be called again with another configuration. It fails where
// NoUDP says why.
func (p *Pod) CaptureUDP(cfg UDPConfig) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.captureUDP(cfg); err != nil {
		return fmt.Errorf("capture UDP of pod %s: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) captureUDP(cfg UDPConfig) error {
	if err := p.usable(); err != nil {
		return err
	}
	if _, err := clearPorts(cfg.Clear); err != nil {
		return err
	}
	before := *p.rec
	err := p.d.NoUDP()
	if err == nil {
		err = p.takeUDP(cfg)
	}
	if err == nil {
		return nil
	}
	if before.UDP {
		*p.rec = before
		return errors.Join(err, p.d.ledger.save(p.rec))
	}
	if !cfg.Require {
		return errors.Join(err, p.releaseUDP())
	}
	if !before.judgesUDP() {
		err = errors.Join(err, p.noteOlderSockets())
	}
	return errors.Join(err, p.refuseUDP(cfg.Clear))
}

func (p *Pod) takeUDP(cfg UDPConfig) error {
	judged := p.rec.judgesUDP()
	p.rec.UDP, p.rec.UDPStrict, p.rec.UDPRequire, p.rec.UDPClear = true, cfg.Strict, cfg.Require, cfg.Clear
	if err := p.d.ledger.save(p.rec); err != nil {
		return err
	}
	if p.udp == nil {
		if err := p.setUpRouting(); err != nil {
			return err
		}
		if err := p.openUDP(); err != nil {
			return err
		}
	}
	if !judged {
		if err := p.noteOlderSockets(); err != nil {
			return err
		}
	}
	return p.d.loaded.maps.Pods.Put(p.rec.Cookie, podValue(p.rec))
}

// ReleaseUDP leaves the pod's UDP alone again.
func (p *Pod) ReleaseUDP() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.usable()
	if err == nil && p.rec.judgesUDP() {
		err = p.releaseUDP()
	}
	if err != nil {
		return fmt.Errorf("release UDP of pod %s: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) releaseUDP() error {
	p.rec.UDPRequire, p.rec.UDPClear = false, nil
	return p.letGoOfUDP()
}

// refuseUDP leaves the pod's UDP to the guard, which drops what should have been captured.
func (p *Pod) refuseUDP(clear []dataplane.PortRange) error {
	p.rec.UDPRequire, p.rec.UDPClear = true, clear
	return p.letGoOfUDP()
}

func (p *Pod) letGoOfUDP() error {
	p.rec.UDP, p.rec.UDPStrict = false, false
	errs := []error{
		p.d.loaded.maps.Pods.Put(p.rec.Cookie, podValue(p.rec)),
		p.d.detachUDP(p.rec, p.ns),
		p.closeUDP(),
		p.d.forgetFlowsOf(p.rec.Cookie),
		restoreSysctl(p.rec, p.ns, sysctlAcceptLocal),
	}
	return errors.Join(append(errs, p.d.ledger.save(p.rec))...)
}

// Datagrams is the pod's captured UDP; nil while it is not captured.
func (p *Pod) Datagrams() *Datagrams {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.udp
}

// adoptUDP goes on with what an earlier agent captured. What cannot be now is no reason to leave
// the pod's connections unserved.
func (p *Pod) adoptUDP() error {
	switch {
	case !p.rec.UDP:
		return nil
	case p.d.NoUDP() == nil:
		if err := p.openUDP(); err != nil {
			p.d.log.Error("UDP that an earlier agent captured is lost for now", "pod", p.uid, "error", err)
		}
		return nil
	case p.rec.UDPRequire:
		return p.refuseUDP(p.rec.UDPClear)
	}
	return p.releaseUDP()
}

// openUDP makes the sockets and attaches the programs, or this agent's in the place of others.
func (p *Pod) openUDP() (err error) {
	if p.udp == nil {
		if p.udp, err = p.openDatagrams(); err != nil {
			return err
		}
	}
	if err := p.registerUDP(); err != nil {
		return err
	}
	return p.attachUDP()
}

func (p *Pod) closeUDP() error {
	if p.udp == nil {
		return nil
	}
	udp := p.udp
	p.udp = nil
	return udp.close()
}

func (p *Pod) registerUDP() error {
	if p.udp == nil {
		return nil
	}
	// The mark first: what is sent to it must not reach whoever has the other place next.
	if err := withFD(p.udp.quic, func(fd int) error { return p.d.loaded.maps.QuicMarks.Put(p.quicKey(p.udp.mark), uint64(fd)) }); err != nil {
		return fmt.Errorf("register the mark of a QUIC socket: %w", err)
	}
	for kind, s := range p.udp.sockets() {
		key := bpf.RacewayListenerKey{Netns: p.rec.Cookie, Kind: kind}
		if err := withFD(s, func(fd int) error { return p.d.loaded.maps.Receivers.Put(key, uint64(fd)) }); err != nil {
			return fmt.Errorf("register UDP socket %d: %w", kind, err)
		}
	}
	return nil
}

func withFD(s syscall.Conn, fn func(fd int) error) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = fn(int(fd)) })
	return errors.Join(err, failure)
}

// noteOlderSockets has the pod's present UDP sockets go on in clear. One that has neither sent
// nor bound yet is none of them.
func (p *Pod) noteOlderSockets() error {
	iter, err := p.d.loaded.udpIter(progNoteOlder)
	if err == nil {
		_, err = p.list(iter)
	}
	if err != nil {
		return fmt.Errorf("note older UDP sockets: %w", err)
	}
	return nil
}

// OlderUDP counts the UDP sockets that are older than the capture and go on in clear.
func (p *Pod) OlderUDP() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.rec.judgesUDP() || p.usable() != nil {
		return 0, nil
	}
	iter, err := p.d.loaded.udpIter(progListOlder)
	if err != nil {
		return 0, fmt.Errorf("count older UDP sockets of pod %s: %w", p.uid, err)
	}
	list, err := p.list(iter)
	if err != nil {
		return 0, fmt.Errorf("count older UDP sockets of pod %s: %w", p.uid, err)
	}
	return len(list), nil
}

// udpIter is made when it is needed first, and ends with l.
func (l *loaded) udpIter(name string) (*link.Iter, error) {
	l.udpItersMu.Lock()
	defer l.udpItersMu.Unlock()
	if iter := l.udpIters[name]; iter != nil {
		return iter, nil
	}
	prog, err := l.program(l.spec.Programs[name].Copy())
	if err != nil {
		return nil, err
	}
	iter, err := link.AttachIter(link.IterOptions{Program: prog})
	if err := errors.Join(err, prog.Close()); err != nil { // the iterator holds it
		return nil, fmt.Errorf("attach %s to iter/udp: %w", name, err)
	}
	l.udpIters[name] = iter
	return iter, nil
}

// list is what an iterator writes of the pod's namespace.
func (p *Pod) list(iter *link.Iter) ([]byte, error) {
	var list io.ReadCloser
	err := p.ns.Do(func() (err error) {
		list, err = iter.Open()
		return err
	})
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(list)
	return data, errors.Join(err, list.Close())
}
