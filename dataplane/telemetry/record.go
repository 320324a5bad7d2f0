package telemetry

import (
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// record is one moment of a connection. There are two for each connection and nobody may
// ever ask for them, so it is spelled out, as admin.Flow, only for who does.
type record struct {
	facts
	time             time.Time
	event            admin.FlowEvent
	sent, received   uint64
	rtt, retransmits uint32
	flags            Flags
	cause            string
}

func (r *record) duration() time.Duration { return r.time.Sub(r.started) }

func (r *record) flow() admin.Flow {
	f := admin.Flow{Time: r.time, Event: r.event, Connection: r.connection(), Cause: r.cause, Flags: string(r.flags)}
	if r.event != admin.FlowOpen {
		f.Duration = r.duration()
	}
	return f
}

func (r *record) connection() admin.Connection {
	p := r.parties
	c := admin.Connection{
		ID: r.id.String(), Direction: string(p.direction), Protocol: dataplane.ProtocolTCP,
		Source: p.source.peer(r.source), Destination: p.destination.peer(r.destination),
		Service: p.service, Tunnel: r.tunnel, Transport: r.transport, Policy: p.policy, Opened: r.opened(),
		Sent: r.sent, Received: r.received, RTTMicros: r.rtt, Retransmits: r.retransmits,
	}
	switch {
	case p.udp:
		c.Protocol = dataplane.ProtocolHBONEUDP
	case r.tunnel.IsValid():
		c.Protocol = dataplane.ProtocolHBONE
	case p.kernel:
		c.Protocol = dataplane.ProtocolKernel
	}
	return c
}
