package telemetry

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// Direction is the side of a connection that this node's pod is on.
type Direction string

// Directions. An outbound connection is reported as Istio's reporter "source", an inbound
// one as "destination".
const (
	Outbound Direction = "outbound"
	Inbound  Direction = "inbound"
)

// Flags is Istio's response_flags: a short word for what went wrong.
type Flags string

// Response flags.
const (
	FlagsNone    Flags = "-"
	FlagsDeny    Flags = "DENY"           // a policy refused it, or cut it
	FlagsConnect Flags = "CONNECT"        // the peer or the application could not be reached
	FlagsTLS     Flags = "TLS_FAILURE"    // the tunnel's handshake failed
	FlagsRoute   Flags = "NO_ROUTE"       // nothing to route it to, or its address is unknown
	FlagsLimit   Flags = "OVERFLOW"       // a limit of the pod or the node
	FlagsReset   Flags = "RESET"          // an end or the network broke it off
	FlagsDrained Flags = "DRAIN"          // this agent stopped and its patience ended
	FlagsPeer    Flags = "HTTP_FAILURE"   // the peer answered CONNECT with an unusual status
	FlagsUnknown Flags = "UNKNOWN_FAILED" // none of these
)

// Peer is one end of a connection.
type Peer struct {
	Addr     netip.AddrPort
	Workload *dataplane.Workload // nil: not a pod that is known
	Identity spiffe.ID           // what it proved; zero: nothing
}

// Attempt is what is known of a connection when it opens or is refused.
type Attempt struct {
	// ID is the connection's; "" makes one.
	ID          string
	Direction   Direction
	Source      Peer
	Destination Peer
	// Service is what was asked for, nil when it is not one that is known.
	Service *dataplane.Service
	// Tunnel is the peer's HBONE address, zero for plain TCP.
	Tunnel netip.AddrPort
	// Policy is what allowed or denied it, "" for none.
	Policy string
	// Started is when it was accepted; zero means now.
	Started time.Time
	// Socket carries it between the nodes: it is only asked for TCP_INFO. nil for none.
	Socket syscall.Conn
}

// socket is comparable: in practice a *net.TCPConn.
type socket = syscall.Conn

// Conn is an open connection. Close must be called; the rest may be called at any time.
type Conn struct {
	Attempt
	t        *Telemetry
	opened   time.Time
	series   *series
	baseline uint32 // the socket's retransmits when this connection joined it

	sent, received   atomic.Uint64
	rtt, retransmits atomic.Uint32

	mu               sync.Mutex // orders reports, so that each byte is counted once
	closed           bool
	counted, counter [2]uint64 // counted in metrics; as of the last update record
}

// NewID makes a connection's ID: 16 hex digits, the shape of a trace's parent ID.
func NewID() string {
	for {
		if n := rand.Uint64(); n != 0 { // the W3C forbids the zero ID
			return fmt.Sprintf("%016x", n)
		}
	}
}

func (a Attempt) withDefaults() Attempt {
	if a.ID == "" {
		a.ID = NewID()
	}
	if a.Started.IsZero() {
		a.Started = time.Now()
	}
	return a
}

// Open tells of a connection that both ends have now.
func (t *Telemetry) Open(a Attempt) *Conn {
	c := &Conn{Attempt: a.withDefaults(), t: t, opened: time.Now()}
	if c.Socket != nil {
		if info, ok := tcpInfo(c.Socket); ok {
			c.baseline = info.retransmits
			c.rtt.Store(info.rttMicros)
		}
	}
	c.series = t.metrics.open(&c.Attempt)
	t.mu.Lock()
	t.live[c.ID] = c
	t.mu.Unlock()
	t.flows.publish(admin.Flow{Time: c.opened, Event: admin.FlowOpen, Connection: c.describe()})
	return c
}

// Refuse tells of a connection that ended before it was open. err says why.
func (t *Telemetry) Refuse(a Attempt, flags Flags, err error) {
	a = a.withDefaults()
	now := time.Now()
	t.metrics.refuse(&a, flags)
	event := admin.FlowFailed
	if flags == FlagsDeny {
		event = admin.FlowDenied
	}
	f := admin.Flow{Time: now, Event: event, Connection: a.describe(), Duration: now.Sub(a.Started), Cause: text(err), Flags: string(flags)}
	f.Opened = a.Started
	t.flows.publish(f)
	t.log.add(&f)
}

// Sent and Received count bytes that were handed on: source to destination, and back.
func (c *Conn) Sent(n int)     { c.sent.Add(uint64(n)) }
func (c *Conn) Received(n int) { c.received.Add(uint64(n)) }

// Close tells that the connection has ended and why; a nil err is a clean end. Calling it
// again changes nothing.
func (c *Conn) Close(flags Flags, err error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.closed = true
	c.countLocked()
	c.mu.Unlock()
	c.t.mu.Lock()
	delete(c.t.live, c.ID)
	c.t.mu.Unlock()
	c.t.metrics.close(c.series, flags)
	now := time.Now()
	f := admin.Flow{Time: now, Event: admin.FlowClose, Connection: c.describe(), Duration: now.Sub(c.Started), Cause: text(err), Flags: string(flags)}
	if err == nil {
		f.Cause = "both ends finished"
	}
	c.t.flows.publish(f)
	if err == nil {
		f.Cause = "" // an access log's error field is empty then
	}
	c.t.log.add(&f)
}

// countLocked adds the bytes since the last time to the metrics.
func (c *Conn) countLocked() {
	now := [2]uint64{c.sent.Load(), c.received.Load()}
	c.series.sent.Add(float64(now[0] - c.counted[0]))
	c.series.received.Add(float64(now[1] - c.counted[1]))
	c.counted = now
}

// report brings the metrics up to date and returns whether bytes moved since the last report.
func (c *Conn) report() (moved bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.countLocked()
	moved = c.counted != c.counter
	c.counter = c.counted
	return moved
}

func (c *Conn) describe() admin.Connection {
	d := c.Attempt.describe()
	d.Opened = c.opened
	d.Sent, d.Received = c.sent.Load(), c.received.Load()
	d.RTTMicros, d.Retransmits = c.rtt.Load(), c.retransmits.Load()
	return d
}

func (a *Attempt) describe() admin.Connection {
	d := admin.Connection{
		ID: a.ID, Direction: string(a.Direction), Protocol: dataplane.ProtocolTCP,
		Source: a.Source.describe(), Destination: a.Destination.describe(),
		Tunnel: a.Tunnel, Policy: a.Policy, Opened: a.Started,
	}
	if a.Tunnel.IsValid() {
		d.Protocol = dataplane.ProtocolHBONE
	}
	if a.Service != nil {
		d.Service = a.Service.Host
	}
	return d
}

func (p *Peer) describe() admin.Peer {
	d := admin.Peer{Addr: p.Addr, Identity: p.Identity}
	if p.Workload != nil {
		d.Workload, d.Namespace = p.Workload.Name.Name, p.Workload.Name.Namespace
	}
	return d
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// report lets every connection that is older than the interval tell how far it has come.
func (t *Telemetry) report(now time.Time) {
	conns := t.snapshot()
	asked := make(map[socket]tcpFacts, len(conns))
	for _, c := range conns {
		if now.Sub(c.opened) < t.cfg.Interval/2 || !c.report() {
			continue
		}
		if c.Socket != nil {
			t.sample(c, asked)
		}
		f := admin.Flow{Time: now, Event: admin.FlowUpdate, Connection: c.describe(), Duration: now.Sub(c.Started)}
		t.flows.publish(f)
	}
	t.forgetSockets(conns)
}

// sample asks c's socket, once per report though many tunnels share it.
func (t *Telemetry) sample(c *Conn, asked map[socket]tcpFacts) {
	info, known := asked[c.Socket]
	if !known {
		var ok bool
		if info, ok = tcpInfo(c.Socket); !ok {
			return
		}
		asked[c.Socket] = info
		t.mu.Lock()
		before, seen := t.sockets[c.Socket]
		t.sockets[c.Socket] = info.retransmits
		t.mu.Unlock()
		if !seen {
			before = c.baseline
		}
		t.metrics.socket(c.Direction, info, info.retransmits-min(before, info.retransmits))
	}
	c.rtt.Store(info.rttMicros)
	c.retransmits.Store(info.retransmits - min(c.baseline, info.retransmits))
}

// forgetSockets drops those that no live connection uses.
func (t *Telemetry) forgetSockets(conns []*Conn) {
	used := make(map[socket]bool, len(conns))
	for _, c := range conns {
		used[c.Socket] = true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.sockets {
		if !used[s] {
			delete(t.sockets, s)
		}
	}
}
