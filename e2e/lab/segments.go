package lab

import (
	"context"
	"net/netip"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Segment is a TCP segment that crossed a captured link.
type Segment struct {
	At                  time.Time
	Source, Destination netip.AddrPort
	SYN, ACK            bool
	Payload             []byte // not to be changed; empty when it carries none
}

// Segments lists the TCP segments that the capture holds, in their order.
func (c *Capture) Segments(ctx context.Context) ([]Segment, error) {
	if err := c.sync(ctx); err != nil {
		return nil, err
	}
	c.mu.Lock()
	packets := c.packets[:len(c.packets):len(c.packets)]
	c.mu.Unlock()
	var segments []Segment
	for _, p := range packets {
		if s, ok := segmentOf(p); ok {
			segments = append(segments, s)
		}
	}
	return segments, nil
}

func segmentOf(p captured) (Segment, bool) {
	decoded := gopacket.NewPacket(p.data, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	tcp, ok := decoded.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if !ok {
		return Segment{}, false
	}
	flow := decoded.NetworkLayer().NetworkFlow()
	source, _ := netip.AddrFromSlice(flow.Src().Raw())
	destination, _ := netip.AddrFromSlice(flow.Dst().Raw())
	return Segment{
		At:     p.at,
		Source: netip.AddrPortFrom(source, uint16(tcp.SrcPort)), Destination: netip.AddrPortFrom(destination, uint16(tcp.DstPort)),
		SYN: tcp.SYN, ACK: tcp.ACK, Payload: tcp.Payload,
	}, true
}
