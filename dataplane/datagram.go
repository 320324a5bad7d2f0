package dataplane

import "net/netip"

// Datagram tells of one that an application has sent, or of several of one size.
type Datagram struct {
	From, To netip.AddrPort
	// Segment is the size of each in a buffer of several, in bytes, of which the last may be
	// shorter; 0 when there is one.
	Segment int
	// Whole says that it must not be fragmented: the application wants to hear when it is too
	// large (IP_PMTUDISC_DO and PROBE).
	Whole bool
}

// PortRange is ports, both ends included.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}
