package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/dataplane/netns"
)

const (
	// captureQueue is the kernel's queue of packets that were not read yet. It is memory
	// that is only used when the reader falls behind.
	captureQueue = 512 << 20
	// captureLimit bounds the packets that are kept; what exceeds it counts as dropped.
	captureLimit = 1 << 30
	// maxPacket is beyond the largest packet that a veth carries: segmentation is left to
	// the last link, so a packet may be as large as GSO allows (gso_max_size, 512 KiB at most).
	maxPacket = 512<<10 + 64
	// markerType is the EtherType of our markers: Local Experimental 1 (IEEE 802).
	markerType = 0x88b5
	// markerTimeout is for a marker to come back; nothing is between but the kernel's queue.
	markerTimeout = 30 * time.Second
)

// Capture holds every packet, whole, that crossed one link in either direction since it was
// made or Reset. Packets are as the link carries them: between namespaces TCP segments are
// not split to the MTU.
//
// Every question first waits until all packets that crossed the link before it have been
// read, so that what a test sent is not missed because it is still in a queue.
type Capture struct {
	link   string
	conn   *packet.Conn // reads
	marker *packet.Conn // sends markers; a socket does not see what it sends itself
	source net.HardwareAddr
	done   chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	packets []captured
	bytes   int
	dropped uint64 // by the kernel, or by captureLimit
	next    uint64 // number of the next marker
	seen    map[uint64]chan struct{}
	readErr error

	closing  sync.Once
	closeErr error
}

type captured struct {
	at   time.Time
	data []byte
}

// Capture captures the link between n and the fabric.
func (l *Lab) Capture(ctx context.Context, n *Node) (*Capture, error) {
	return l.fabric.Capture(ctx, n.Name)
}

// Capture captures a link of the host, named as in the host. The caller may close it before
// the lab does.
func (h *Host) Capture(ctx context.Context, link string) (*Capture, error) {
	c, err := NewCapture(ctx, h.space.NS, link)
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", h.Name, err)
	}
	if err := h.lab.track(func() { h.lab.captures = append(h.lab.captures, c) }); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// NewCapture captures a link of any namespace, until Close.
func NewCapture(ctx context.Context, ns *netns.Namespace, link string) (*Capture, error) {
	c := &Capture{link: link, done: make(chan struct{}), seen: make(map[uint64]chan struct{})}
	if err := ns.Do(func() error { return c.open(link) }); err != nil {
		return nil, fmt.Errorf("capture %s: %w", link, err)
	}
	go c.read()
	if err := c.sync(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Capture) open(link string) error {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return err
	}
	c.source = ifi.HardwareAddr
	c.conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, nil)
	if err != nil {
		return err
	}
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return errors.Join(err, c.conn.Close())
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureQueue)
	})
	if err := errors.Join(err, optErr); err != nil {
		return errors.Join(fmt.Errorf("enlarge the queue: %w", err), c.conn.Close())
	}
	// Protocol 0 receives nothing.
	c.marker, err = packet.Listen(ifi, packet.Raw, 0, nil)
	if err != nil {
		return errors.Join(err, c.conn.Close())
	}
	return nil
}

// read keeps packets until the socket is closed.
func (c *Capture) read() {
	defer close(c.done)
	buffer := make([]byte, maxPacket)
	for {
		n, _, err := c.conn.ReadFrom(buffer)
		if err != nil {
			c.fail(err)
			return
		}
		c.keep(buffer[:n])
	}
}

func (c *Capture) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readErr = fmt.Errorf("read packets of %s: %w", c.link, err)
	for number, seen := range c.seen {
		close(seen)
		delete(c.seen, number)
	}
}

func (c *Capture) keep(data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number, ok := c.markerOf(data); ok {
		if seen := c.seen[number]; seen != nil {
			close(seen)
			delete(c.seen, number)
		}
		return
	}
	if c.bytes+len(data) > captureLimit || len(data) == maxPacket {
		c.dropped++
		return
	}
	c.bytes += len(data)
	c.packets = append(c.packets, captured{time.Now(), bytes.Clone(data)})
}

// A marker is a frame from the link to itself: addresses, EtherType, number. Whoever is at
// the other end drops it.
func (c *Capture) markerOf(data []byte) (uint64, bool) {
	if len(data) < 22 || binary.BigEndian.Uint16(data[12:]) != markerType || !bytes.Equal(data[6:12], c.source) {
		return 0, false
	}
	return binary.BigEndian.Uint64(data[14:]), true
}

// sync sends a marker over the link and waits until the reader sees it.
func (c *Capture) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, markerTimeout)
	defer cancel()
	seen := make(chan struct{})
	c.mu.Lock()
	err := c.readErr
	number := c.next
	c.next++
	if err == nil {
		c.seen[number] = seen
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	frame := make([]byte, 60)
	copy(frame, c.source)
	copy(frame[6:], c.source)
	binary.BigEndian.PutUint16(frame[12:], markerType)
	binary.BigEndian.PutUint64(frame[14:], number)
	if _, err := c.marker.WriteTo(frame, &packet.Addr{HardwareAddr: c.source}); err != nil {
		return fmt.Errorf("mark the end of the capture of %s: %w", c.link, err)
	}
	select {
	case <-seen:
	case <-ctx.Done():
		return fmt.Errorf("wait for the packets of %s: %w", c.link, ctx.Err())
	}
	return c.account()
}

// account adds the kernel's count of drops, which reading resets.
func (c *Capture) account() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readErr != nil {
		return c.readErr
	}
	stats, err := c.conn.Stats()
	if err != nil {
		return fmt.Errorf("count the drops of the capture of %s: %w", c.link, err)
	}
	c.dropped += uint64(stats.Drops)
	return nil
}

// Contains reports whether some packet contains needle. A needle that was split over two
// packets is not found: use one that a single write sends at the start of a connection.
func (c *Capture) Contains(ctx context.Context, needle []byte) (bool, error) {
	if err := c.sync(ctx); err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.packets {
		if bytes.Contains(p.data, needle) {
			return true, nil
		}
	}
	return false, nil
}

// CountPort counts TCP packets from or to a port.
func (c *Capture) CountPort(ctx context.Context, port uint16) (int, error) {
	return c.count(ctx, func(p gopacket.Packet) bool {
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		return ok && (uint16(tcp.SrcPort) == port || uint16(tcp.DstPort) == port)
	})
}

// CountDatagrams counts UDP datagrams from or to a port; one in fragments counts once.
func (c *Capture) CountDatagrams(ctx context.Context, port uint16) (int, error) {
	return c.count(ctx, func(p gopacket.Packet) bool {
		head := udpOf(p)
		return len(head) >= 4 && (binary.BigEndian.Uint16(head) == port || binary.BigEndian.Uint16(head[2:]) == port)
	})
}

// udpOf is what begins with the header of UDP, nil when p has none. gopacket decodes nothing of a
// first fragment.
func udpOf(p gopacket.Packet) []byte {
	if ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok && ip.Protocol == layers.IPProtocolUDP && ip.FragOffset == 0 {
		return ip.Payload
	}
	if f, ok := p.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment); ok && f.NextHeader == layers.IPProtocolUDP && f.FragmentOffset == 0 {
		return f.Payload
	}
	if ip, ok := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6); ok && ip.NextHeader == layers.IPProtocolUDP {
		return ip.Payload
	}
	return nil
}

// count counts the packets that match.
func (c *Capture) count(ctx context.Context, match func(gopacket.Packet) bool) (int, error) {
	if err := c.sync(ctx); err != nil {
		return 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	count := 0
	for _, p := range c.packets {
		if match(gopacket.NewPacket(p.data, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})) {
			count++
		}
	}
	return count, nil
}

// Totals counts packets and their bytes.
func (c *Capture) Totals(ctx context.Context) (packets, bytes int, err error) {
	if err := c.sync(ctx); err != nil {
		return 0, 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.packets), c.bytes, nil
}

// Dropped counts packets that crossed the link and were not kept, since New or Reset. A
// test that proves an absence must demand that it is 0.
func (c *Capture) Dropped(ctx context.Context) (uint64, error) {
	if err := c.sync(ctx); err != nil {
		return 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dropped, nil
}

// Reset forgets what crossed the link before.
func (c *Capture) Reset(ctx context.Context) error {
	if err := c.sync(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets, c.bytes, c.dropped = nil, 0, 0
	return nil
}

// WritePCAP writes what was captured for tcpdump and Wireshark.
func (c *Capture) WritePCAP(ctx context.Context, path string) error {
	if err := c.sync(ctx); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write the capture of %s: %w", c.link, err)
	}
	c.mu.Lock()
	packets := c.packets[:len(c.packets):len(c.packets)]
	c.mu.Unlock()
	w := pcapgo.NewWriterNanos(f)
	err = w.WriteFileHeader(maxPacket, layers.LinkTypeEthernet)
	for _, p := range packets {
		if err != nil {
			break
		}
		err = w.WritePacket(gopacket.CaptureInfo{Timestamp: p.at, CaptureLength: len(p.data), Length: len(p.data)}, p.data)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the capture of %s: %w", c.link, err)
	}
	return nil
}

// Close ends the capture; what it holds is gone. It may be called again.
func (c *Capture) Close() error {
	c.closing.Do(func() {
		c.closeErr = errors.Join(c.conn.Close(), c.marker.Close())
		<-c.done
	})
	return c.closeErr
}
