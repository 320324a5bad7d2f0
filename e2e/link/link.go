// Package link emulates a network path between two network namespaces, for tests and benchmarks:
// delay, loss, reordering and rate, by a TUN pair in Go, since not every kernel has netem.
//
//	namespace a                                    namespace b
//	  link0 ── TUN ── read ── schedule ── heap ── write ── TUN ── link0
//	  10.99.0.1         (one Path for each way)              10.99.0.2
//	  fd99::1                                                fd99::2
package link

import (
	"container/heap"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

// device is the name of both ends.
const device = "link0"

// MTU is that of both ends, in bytes.
const MTU = 1500

// maxUnderWay bounds the packets that are under way in one direction; more are dropped.
const maxUnderWay = 1 << 15

// End is one end of a link.
type End struct{ V4, V6 netip.Addr }

// Addrs are the end's addresses, IPv4 first.
func (e End) Addrs() []netip.Addr { return []netip.Addr{e.V4, e.V6} }

// Stats counts the packets of one way.
type Stats struct{ Carried, Lost, Overflow uint64 }

// Link is a path between two namespaces. Close ends it.
type Link struct {
	A, B End

	files  []*os.File
	ways   [2]*way // from a, from b
	closed sync.Once
	work   sync.WaitGroup
}

// New connects a and b. there is the way from a to b, back the one from b to a.
func New(a, b *netns.Namespace, there, back Path) (*Link, error) {
	if err := errors.Join(there.Validate(), back.Validate()); err != nil {
		return nil, fmt.Errorf("emulate a link: %w", err)
	}
	l := &Link{
		A: End{netip.AddrFrom4([4]byte{10, 99, 0, 1}), netip.MustParseAddr("fd99::1")},
		B: End{netip.AddrFrom4([4]byte{10, 99, 0, 2}), netip.MustParseAddr("fd99::2")},
	}
	for _, side := range []struct {
		ns  *netns.Namespace
		end End
	}{{a, l.A}, {b, l.B}} {
		var file *os.File
		if err := side.ns.Do(func() (err error) {
			file, err = open(side.end)
			return err
		}); err != nil {
			return nil, errors.Join(fmt.Errorf("make %s in %s: %w", device, side.ns.Path(), err), l.Close())
		}
		l.files = append(l.files, file)
	}
	l.ways = [2]*way{newWay(l.files[0], l.files[1], there), newWay(l.files[1], l.files[0], back)}
	for _, w := range l.ways {
		l.work.Go(w.receive)
		l.work.Go(w.deliver)
	}
	return l, nil
}

// Stats counts what went from a to b, and back.
func (l *Link) Stats() (there, back Stats) { return l.ways[0].stats(), l.ways[1].stats() }

// Cut has all packets get lost from now on, both ways.
func (l *Link) Cut() {
	for _, w := range l.ways {
		w.cut.Store(true)
	}
}

// Close removes the devices and waits for the goroutines. It may be called again.
func (l *Link) Close() error {
	var err error
	l.closed.Do(func() {
		for _, f := range l.files {
			err = errors.Join(err, f.Close())
		}
		l.work.Wait()
	})
	return err
}

// open makes the device in the namespace of the calling thread. It is gone with the file.
func open(end End) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := configure(fd, end); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil // not before: the poller wants the device
}

func configure(fd int, end End) error {
	req, err := unix.NewIfreq(device)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	dev, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetMTU(dev, MTU), netlink.LinkSetTxQLen(dev, 1000)); err != nil {
		return err
	}
	for addr, bits := range map[netip.Addr]int{end.V4: 24, end.V6: 64} {
		ip := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, addr.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(dev, ip); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(dev)
}

// packet is one that is under way.
type packet struct {
	at   time.Time
	seq  uint64
	data []byte
}

// packets is a heap by arrival, and by order for those that arrive at once.
type packets []packet

func (p packets) Len() int      { return len(p) }
func (p packets) Swap(i, j int) { p[i], p[j] = p[j], p[i] }
func (p *packets) Push(x any)   { *p = append(*p, x.(packet)) }
func (p packets) Less(i, j int) bool {
	return p[i].at.Before(p[j].at) || p[i].at.Equal(p[j].at) && p[i].seq < p[j].seq
}

func (p *packets) Pop() any {
	last := (*p)[len(*p)-1]
	(*p)[len(*p)-1] = packet{}
	*p = (*p)[:len(*p)-1]
	return last
}

// way is one direction. receive and deliver each have a goroutine, until the files are closed.
type way struct {
	from, to *os.File
	schedule *schedule // receive's
	buffers  sync.Pool

	cut                     atomic.Bool
	carried, lost, overflow atomic.Uint64

	mu       sync.Mutex
	underWay packets
	seq      uint64
	over     bool
	changed  chan struct{} // something comes sooner than was known, or nothing more
}

func newWay(from, to *os.File, p Path) *way {
	return &way{
		from: from, to: to, schedule: newSchedule(p), changed: make(chan struct{}, 1),
		buffers: sync.Pool{New: func() any { return new([MTU]byte) }},
	}
}

func (w *way) stats() Stats {
	return Stats{Carried: w.carried.Load(), Lost: w.lost.Load(), Overflow: w.overflow.Load()}
}

func (w *way) receive() {
	defer w.end()
	for {
		buf := w.buffers.Get().(*[MTU]byte)
		n, err := w.from.Read(buf[:])
		if err != nil {
			return
		}
		at, fate := w.schedule.admit(time.Now(), n)
		if w.cut.Load() {
			fate = lost
		}
		if fate == carried && !w.enter(packet{at: at, data: buf[:n]}) {
			fate = overflow
		}
		switch fate {
		case carried:
			w.carried.Add(1)
			continue
		case lost:
			w.lost.Add(1)
		case overflow:
			w.overflow.Add(1)
		}
		w.buffers.Put(buf)
	}
}

func (w *way) enter(p packet) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.underWay) >= maxUnderWay {
		return false
	}
	w.seq++
	p.seq = w.seq
	heap.Push(&w.underWay, p)
	if w.underWay[0].seq == p.seq {
		w.tell()
	}
	return true
}

func (w *way) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	w.tell()
}

func (w *way) tell() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

func (w *way) deliver() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		p, wait, over := w.due(time.Now())
		switch {
		case over:
			return
		case p.data != nil:
			_, _ = w.to.Write(p.data) // a device that is down loses it
			w.buffers.Put((*[MTU]byte)(p.data[:MTU]))
			continue
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-w.changed:
		}
	}
}

// due is a packet that has arrived, or how long until the next.
func (w *way) due(now time.Time) (packet, time.Duration, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.over:
		return packet{}, 0, true
	case len(w.underWay) == 0:
		return packet{}, time.Hour, false
	}
	if wait := w.underWay[0].at.Sub(now); wait > 0 {
		return packet{}, wait, false
	}
	return heap.Pop(&w.underWay).(packet), 0, false
}
