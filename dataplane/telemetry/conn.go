package telemetry

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
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

// ID names a connection. Its text is 16 hex digits, the shape of a trace's parent ID.
type ID uint64

// NewID makes one.
func NewID() ID {
	for {
		if n := rand.Uint64(); n != 0 { // the W3C forbids the zero ID
			return ID(n)
		}
	}
}

// ParseID reads what String writes.
func ParseID(s string) (ID, error) {
	n, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 {
		return 0, fmt.Errorf("connection ID %q is not 16 hex digits", s)
	}
	return ID(n), nil
}

func (id ID) String() string { return fmt.Sprintf("%016x", uint64(id)) }

// Peer is one end of a connection.
type Peer struct {
	Addr     netip.AddrPort
	Workload *dataplane.Workload // nil: not a pod that is known
	Identity spiffe.ID           // what it proved; zero: nothing
}

// Attempt is what is known of a connection when it opens or is refused. It points into a
// snapshot, which it keeps: who holds a connection for long drops its Attempt.
type Attempt struct {
	// ID is the connection's; 0 makes one.
	ID          ID
	Direction   Direction
	Source      Peer
	Destination Peer
	// Service is what was asked for, nil when it is not one that is known.
	Service *dataplane.Service
	// Tunnel is the peer's HBONE address, zero for plain TCP.
	Tunnel netip.AddrPort
	// Transport is what the tunnel is carried by, and why, where that is not as ever.
	Transport string
	// Kernel says that it goes by the kernel alone, between two pods of this node.
	Kernel bool
	// UDP says that it is a flow of datagrams.
	UDP bool
	// Policy is what allowed or denied it, "" for none.
	Policy string
	// Started is when it was accepted; zero means now.
	Started time.Time
	// Socket carries it between the nodes: it is only asked for TCP_INFO. nil for none.
	Socket syscall.Conn
}

// Conn is an open connection. Close must be called; the rest may be called at any time.
type Conn struct {
	facts
	t       *Telemetry
	carrier *carrier // nil: there is none to ask

	sent, received             atomic.Uint64
	rtt, retransmits, baseline atomic.Uint32 // baseline: the carrier's retransmits at the start

	place int // in Telemetry.live, whose lock guards it

	mu      sync.Mutex // orders reports, so that each byte is counted once
	closed  bool
	counted [2]uint64 // in metrics
}

// facts are what is said of a connection from its start to its end. They hold nothing of a
// snapshot.
type facts struct {
	id                          ID
	parties                     *parties
	source, destination, tunnel netip.AddrPort
	transport                   string
	started                     time.Time     // accepted
	setup                       time.Duration // from then until it was open
}

func (t *Telemetry) facts(a *Attempt, p *parties, now time.Time) facts {
	f := facts{id: a.ID, parties: p, source: a.Source.Addr, destination: a.Destination.Addr, tunnel: a.Tunnel, transport: a.Transport, started: a.Started}
	if f.id == 0 {
		f.id = NewID()
	}
	if f.started.IsZero() {
		f.started = now
	}
	return f
}

func (f *facts) opened() time.Time { return f.started.Add(f.setup) }

// Open tells of a connection that both ends have now.
func (t *Telemetry) Open(a Attempt) *Conn {
	now := time.Now()
	c := &Conn{t: t, facts: t.facts(&a, t.metrics.open(&a), now)}
	c.setup = now.Sub(c.started)
	t.join(c, a.Socket, now)
	t.flows.publish(c.record(admin.FlowOpen, now))
	return c
}

// Refuse tells of a connection that ended before it was open. err says why.
func (t *Telemetry) Refuse(a Attempt, flags Flags, err error) {
	now := time.Now()
	r := record{facts: t.facts(&a, t.metrics.refuse(&a, flags, now), now), time: now, event: admin.FlowFailed, flags: flags, cause: text(err)}
	if flags == FlagsDeny {
		r.event = admin.FlowDenied
	}
	t.flows.publish(r)
	t.log.add(r)
}

// Sent and Received count bytes that were handed on: source to destination, and back.
func (c *Conn) Sent(n int)     { c.sent.Add(uint64(n)) }
func (c *Conn) Received(n int) { c.received.Add(uint64(n)) }

// Total says what was sent and received so far, for connections whose bytes others count.
func (c *Conn) Total(sent, received uint64) {
	c.sent.Store(sent)
	c.received.Store(received)
}

// Network says how the connection's packets fare, for one without Attempt.Socket.
func (c *Conn) Network(rtt time.Duration, retransmits uint32) {
	facts := tcpFacts{rttMicros: uint32(rtt.Microseconds()), retransmits: retransmits}
	before := c.retransmits.Swap(retransmits)
	c.rtt.Store(facts.rttMicros)
	c.t.metrics.socket(c.parties.direction, facts, retransmits-min(before, retransmits))
}

// Resume is Open for a connection that an earlier agent told of, with what went over it then.
func (t *Telemetry) Resume(a Attempt, sent, received uint64) *Conn {
	c := t.Open(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Total(sent, received)
	c.counted = [2]uint64{sent, received}
	return c
}

// HandOver is Close for a connection that lives on, for the next agent to tell of.
func (c *Conn) HandOver() {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.closed = true
	c.countLocked()
	c.mu.Unlock()
	c.t.leave(c)
	c.parties.series.handOver(time.Now())
}

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
	now := time.Now()
	c.t.leave(c)
	c.parties.series.close(flags, now)
	r := c.record(admin.FlowClose, now)
	r.flags, r.cause = flags, text(err)
	c.t.log.add(r) // whose error field is empty after a clean end
	if err == nil {
		r.cause = "both ends finished"
	}
	c.t.flows.publish(r)
}

// countLocked adds the bytes since the last time to the metrics, and says if there were any.
func (c *Conn) countLocked() (moved bool) {
	now := [2]uint64{c.sent.Load(), c.received.Load()}
	if now == c.counted {
		return false
	}
	s := c.parties.series
	s.sent.Add(now[0] - c.counted[0])
	s.received.Add(now[1] - c.counted[1])
	c.counted = now
	return true
}

// report brings the metrics up to date and returns whether bytes moved since the last report.
func (c *Conn) report() (moved bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.closed && c.countLocked()
}

func (c *Conn) record(event admin.FlowEvent, now time.Time) record {
	return record{
		facts: c.facts, time: now, event: event,
		sent: c.sent.Load(), received: c.received.Load(), rtt: c.rtt.Load(), retransmits: c.retransmits.Load(),
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
