package h2

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// HBONE's values, and RFC 9113's initial ones.
const (
	defaultStreamWindow = 4 << 20
	defaultConnWindow   = 16 << 20
	defaultPingInterval = 10 * time.Second
	defaultPingTimeout  = 20 * time.Second
	defaultMaxStreams   = 200
	maxReadFrame        = 1 << 20

	initialWindow    = 65535
	initialFrame     = 16 << 10
	initialStreams   = 100 // assumed of a server until its SETTINGS arrive
	maxWindow        = math.MaxInt32
	maxStreamID      = math.MaxInt32
	prefaceTimeout   = 10 * time.Second
	closeTimeout     = time.Second           // for what is still to be written
	companyPause     = time.Millisecond      // for a frame that is in no hurry to find company
	lingerTimeout    = 2 * time.Second       // for the peer to close first
	maxReplies       = 1000                  // queued frames that the peer asked for
	maxOffered       = 96 << 10              // of frames that wait for whoever writes: a Wire holds more
	maxWrite         = 128<<10 - frameHeader // so that streams take turns: one frame in eight full records
	maxControlFrame  = 128 << 10             // any frame but DATA
	smallFrame       = 4 << 10               // any frame but DATA that costs no budget
	rememberedResets = 256
	maxSpare         = 64 // frames that a connection keeps the memory of
)

// values are a transport's settings with its defaults.
type values struct {
	pingInterval, pingTimeout time.Duration
	streamWindow, connWindow  int32
	budget                    hbone.Budget
	maxStreams                uint32 // a server's
	maxHeaderList             uint32
	datagrams                 bool // a server's: it serves UDP
}

func (v values) withDefaults() values {
	if v.pingInterval <= 0 {
		v.pingInterval = defaultPingInterval
	}
	if v.pingTimeout <= 0 {
		v.pingTimeout = defaultPingTimeout
	}
	if v.streamWindow <= 0 {
		v.streamWindow = defaultStreamWindow
	}
	if v.connWindow <= 0 {
		v.connWindow = defaultConnWindow
	}
	// The connection's window starts at 65,535 and cannot be made smaller.
	v.connWindow = max(v.connWindow, initialWindow)
	if v.budget == nil {
		v.budget = hbone.Unlimited{}
	}
	if v.maxStreams == 0 {
		v.maxStreams = defaultMaxStreams
	}
	return v
}

// conn is either end of a connection. Locks are taken in the order wmu, mu; neither is held
// while waiting for a stream's user, mu never while writing to the network.
type conn struct {
	tls    *tls.Conn
	wire   *hbone.Wire // beneath tls
	values values
	start  time.Time
	remote netip.AddrPort // a client's

	// Owned by readLoop.
	in          input
	sawSettings bool

	reader *http2.Framer // readLoop's
	framer *http2.Framer // belongs to the holder of wmu

	// lastRead is when bytes arrived last, in nanoseconds after start.
	lastRead atomic.Int64

	wmu     sync.Mutex
	writers atomic.Int32 // of DATA, those who hold wmu or wait for it; the last one flushes
	out     *[]byte      // the beginning of the next record; nil when nothing
	encoder headerEncoder
	spare   []control // the next control's memory; belongs to the holder of wmu

	pending    atomic.Bool    // control holds what is not to wait
	background sync.WaitGroup // flushes that wait for the peer, and the last one
	done       chan struct{}  // closed when readLoop and background have ended

	mu       sync.Mutex
	err      error // why it died
	graceful bool  // it ended with nothing left to lose
	writeErr error // the first of writing; readLoop is about to end
	streams  map[uint32]*stream
	control  []control
	replies  int       // of control, those that the peer asked for
	offered  int       // bytes of control: those that Offer took
	blocked  []*stream // writers that wait for the connection's window
	ping     time.Duration
	pinged   bool // a PING was sent at ping, after start, and nothing was read since
	timer    *time.Timer
	soon     *time.Timer // kicks; nil until a frame waited for company
	waits    bool        // soon is about to

	sendWindow int64  // what we may send
	recvWindow int64  // what the peer may send
	credit     int64  // what arrived and was not yet told to the peer
	promised   int    // the windows of all streams
	moved      uint64 // bytes of DATA, both ways
	probing    bool   // a probe goes on
	answered   bool   // its PING was answered
	asked      int64  // when that was sent, on the clock of lastRead
	probe      uint32
	acked      bool // the peer has seen our SETTINGS

	peer peerSettings

	resets []uint32 // streams that we reset last: what still comes for them is no error

	lastID   uint32 // the newest stream that was opened
	seenID   uint32 // the newest that was heard of: a draining server ignores some
	draining bool   // no new streams: GOAWAY was received (client) or sent (server)

	server *serverState // nil in a client
	client *clientState // nil in a server
}

// peerSettings is what the peer asked for in SETTINGS.
type peerSettings struct {
	initialWindow   int64
	maxFrame        int
	maxStreams      uint32
	maxHeaderList   uint64
	connectProtocol bool // it takes extended CONNECT (RFC 8441 section 3)
}

// control is a frame other than DATA that waits to be written.
type control struct {
	kind   controlKind
	stream uint32
	code   http2.ErrCode
	n      uint32 // increment, last stream, table size
	end    bool
	reply  bool // the peer caused it
	ping   [8]byte
	fields []hpack.HeaderField
	data   []byte
	chunk  *chunk // data's memory; nil when nobody takes it back
}

type controlKind uint8

const (
	controlHeaders controlKind = iota
	controlEnd                 // an empty DATA frame with END_STREAM
	controlData                // first bytes of a stream, or what was offered
	controlReset
	controlWindow
	controlPing
	controlPingAck
	controlSettingsAck
	controlTableSize // no frame: the peer's bound for our HPACK table
	controlGoAway
)

var (
	errConnClosed = errors.New("tunnel connection closed")
	errPeerClosed = errors.New("peer closed the tunnel connection")
	errDrained    = errors.New("tunnel connection drained")
	errForced     = errors.New("tunnel connection cut: the drain's time is over")
)

var errNoWire = errors.New("the TLS connection is not on a Wire")

func newConn(t *tls.Conn, v values) (*conn, error) {
	wire, ok := t.NetConn().(*hbone.Wire)
	if !ok {
		return nil, errors.Join(errNoWire, t.NetConn().Close())
	}
	c := &conn{
		tls:        t,
		wire:       wire,
		values:     v,
		start:      time.Now(),
		done:       make(chan struct{}),
		streams:    make(map[uint32]*stream),
		sendWindow: initialWindow,
		recvWindow: int64(v.connWindow),
		peer: peerSettings{
			initialWindow: initialWindow,
			maxFrame:      initialFrame,
			maxStreams:    initialStreams,
			maxHeaderList: math.MaxUint64,
		},
	}
	c.in.c = c
	c.reader = newReader(&c.in, hpack.NewDecoder(4096, nil), v.maxHeaderList)
	c.framer = http2.NewFramer(outgoing{c}, nil)
	c.encoder.init()
	return c, nil
}

// hello sends the connection's first frames.
func (c *conn) hello(preface string, settings ...http2.Setting) {
	c.wmu.Lock()
	defer c.unlockNow()
	c.wire.Hold()
	c.gather([]byte(preface))
	settings = append(settings,
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(c.values.floor())},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: maxReadFrame},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: c.values.maxHeaderList})
	_ = c.framer.WriteSettings(settings...) // to outgoing, which has no errors
	if more := c.values.connWindow - initialWindow; more > 0 {
		_ = c.framer.WriteWindowUpdate(0, uint32(more))
	}
}

// run serves the connection until it ends; the caller's goroutine becomes readLoop.
func (c *conn) run() error {
	c.mu.Lock()
	c.timer = time.AfterFunc(c.values.pingInterval, c.keepalive)
	c.mu.Unlock()
	err := c.readLoop()
	var code http2.ConnectionError
	if errors.As(err, &code) {
		c.shut(fmt.Errorf("peer broke the protocol: %w", err), http2.ErrCode(code))
	} else {
		c.shut(c.lost(err), http2.ErrCodeNo)
	}
	c.background.Wait()
	_ = c.wire.Close() // again, after a graceful end
	close(c.done)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer.Stop()
	if c.soon != nil {
		c.soon.Stop()
	}
	if c.graceful || errors.Is(c.err, errPeerClosed) || errors.Is(c.err, errForced) {
		return nil
	}
	return c.err
}

// shut ends the connection for err, once: live streams fail with it, the peer is told code,
// and the loops end.
func (c *conn) shut(err error, code http2.ErrCode) {
	c.mu.Lock()
	defer c.release()
	c.shutLocked(err, code)
}

func (c *conn) shutLocked(err error, code http2.ErrCode) {
	if c.err != nil {
		return
	}
	c.graceful = len(c.streams) == 0 && code == http2.ErrCodeNo && (errors.Is(err, errConnClosed) || errors.Is(err, errDrained))
	last := uint32(0)
	if c.server != nil {
		last = c.lastID
	}
	c.pushLocked(control{kind: controlGoAway, n: last, code: code})
	c.err = err
	for _, s := range c.streams {
		s.failLocked(fmt.Errorf("tunnel connection lost: %w", err))
	}
	clear(c.streams)
	c.wakeBlockedLocked()
	switch {
	case errors.Is(err, hbone.ErrPeerSilent), errors.Is(err, errForced):
		_ = c.wire.Close() // nothing that is written now would matter
	case c.graceful:
		_ = c.wire.SetDeadline(time.Now().Add(lingerTimeout))
	default:
		_ = c.wire.SetDeadline(time.Now().Add(closeTimeout))
	}
	c.background.Go(c.finish)
}

// keepalive asks the peer for a sign of life, or finds that it gave none.
func (c *conn) keepalive() {
	c.mu.Lock()
	defer c.release()
	if c.err != nil {
		return
	}
	now := time.Since(c.start)
	if c.pinged && time.Duration(c.lastRead.Load()) >= c.ping {
		c.pinged = false
	}
	if !c.pinged {
		c.pinged, c.ping = true, now
		c.pushLocked(control{kind: controlPing})
	}
	if now-c.ping >= c.values.pingTimeout {
		c.shutLocked(hbone.ErrPeerSilent, http2.ErrCodeNo)
		return
	}
	c.timer.Reset(min(c.values.pingInterval, c.ping+c.values.pingTimeout-now))
}

// forgetLocked takes a stream that has ended out of the connection.
func (c *conn) forgetLocked(s *stream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	c.settleLocked()
}

// pushResetLocked queues RST_STREAM for s, and remembers that the peer may go on sending
// until it knows.
func (c *conn) pushResetLocked(s *stream, code http2.ErrCode, reply bool) {
	c.pushLocked(control{kind: controlReset, stream: s.id, code: code, reply: reply})
	if s.recvEnd {
		return
	}
	if len(c.resets) == rememberedResets {
		c.resets = append(c.resets[:0], c.resets[1:]...)
	}
	c.resets = append(c.resets, s.id)
}

// settleLocked ends a draining connection that has nothing left to do.
func (c *conn) settleLocked() {
	switch {
	case !c.draining || len(c.streams) > 0:
	case c.client != nil:
		c.shutLocked(errDrained, http2.ErrCodeNo)
	case c.server.final && c.server.handlers == 0 && c.server.linger == nil:
		// The peer, told that there will be no more, closes; if not, we do.
		c.server.linger = time.AfterFunc(closeTimeout, func() { c.shut(errDrained, http2.ErrCodeNo) })
	}
}

// arrivedLocked gives the peer the connection's window back for n bytes, read or not: what
// they take is the budget's matter.
func (c *conn) arrivedLocked(n int) {
	c.moved += uint64(n)
	if c.credit += int64(n); c.credit >= int64(c.values.connWindow)/4 {
		c.recvWindow += c.credit
		c.pushLocked(control{kind: controlWindow, n: uint32(c.credit)})
		c.credit = 0
	}
}

func (c *conn) wakeBlockedLocked() {
	for i, s := range c.blocked {
		s.blocked = false
		s.writable.Broadcast()
		c.blocked[i] = nil
	}
	c.blocked = c.blocked[:0]
}

// lost is the error of a connection whose reading ended with err. It never wraps io.EOF, or
// a stream cut short could pass for one that ended.
func (c *conn) lost(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = c.writeErr
	}
	switch {
	case errors.Is(err, net.ErrClosed):
		return errConnClosed
	case errors.Is(err, io.EOF):
		return errPeerClosed
	default:
		return err
	}
}
