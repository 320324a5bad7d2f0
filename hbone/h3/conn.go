package h3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// What waits for a request that has not come yet: a packet may overtake it.
const (
	maxEarly     = 64        // datagrams
	maxEarlySize = 128 << 10 // their bytes
)

// conn is either end of a connection.
type conn struct {
	quic *quic.Conn
	info *hbone.Conn
	cfg  *Config
	work sync.WaitGroup // its goroutines, by spawn

	settled chan struct{} // closed when the peer's SETTINGS are there

	moved     atomic.Uint64 // bytes, both ways
	datagrams atomic.Bool   // the peer takes DATAGRAM frames

	mu      sync.Mutex
	err     error    // why we ended it
	over    bool     // join was called
	peer    settings // after settled
	control *quic.SendStream
	flows   map[quic.StreamID]*flow
	early   []earlyDatagram // for requests to come, the oldest first
	earlyN  int             // their bytes

	server *serverState // nil in a client
	client *clientState // nil in a server
}

// earlyDatagram is one for a stream that is not open yet.
type earlyDatagram struct {
	id      quic.StreamID
	payload []byte
}

func newConn(q *quic.Conn, info *hbone.Conn, cfg *Config) *conn {
	return &conn{quic: q, info: info, cfg: cfg, settled: make(chan struct{}), flows: make(map[quic.StreamID]*flow)}
}

// settingsTimeout bounds the wait for a peer's SETTINGS, and for what it takes to send ours.
const settingsTimeout = 10 * time.Second

// start sends our SETTINGS and starts the goroutines. They end with the connection.
func (c *conn) start(s settings) error {
	control, err := c.quic.OpenUniStream()
	if err != nil {
		return fmt.Errorf("open the control stream: %w", connCause(err))
	}
	if err := control.SetWriteDeadline(time.Now().Add(settingsTimeout)); err != nil {
		return err
	}
	c.mu.Lock()
	c.control = control
	_, err = control.Write(appendSettings(hbone.AppendVarint(nil, streamControl), s))
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("send SETTINGS: %w", connCause(err))
	}
	c.spawn(c.acceptUni)
	c.spawn(c.receiveDatagrams)
	return nil
}

// spawn has a goroutine do f, which ends with the connection: when that was before, at once.
func (c *conn) spawn(f func()) {
	c.mu.Lock()
	over := c.over
	if !over {
		c.work.Go(f)
	}
	c.mu.Unlock()
	if over {
		f()
	}
}

// join waits for the goroutines of a connection that has ended.
func (c *conn) join() {
	c.mu.Lock()
	c.over = true
	c.mu.Unlock()
	c.work.Wait()
}

// shut ends the connection for err, once; the peer is told code.
func (c *conn) shut(err error, code code) {
	c.mu.Lock()
	if c.err == nil && c.quic.Context().Err() == nil {
		c.err = err
	}
	c.mu.Unlock()
	text := ""
	var broke *connError
	if errors.As(err, &broke) {
		text = broke.text
	}
	_ = c.quic.CloseWithError(quic.ApplicationErrorCode(code), text) // has no errors
}

// broken ends the connection if err is its peer's offence.
func (c *conn) broken(err error) {
	var broke *connError
	if errors.As(err, &broke) {
		c.shut(broke, broke.code)
	}
}

// acceptUni accepts the peer's unidirectional streams.
func (c *conn) acceptUni() {
	for {
		s, err := c.quic.AcceptUniStream(context.Background()) // ends with the connection
		if err != nil {
			return
		}
		c.spawn(func() { c.broken(c.readUni(s)) })
	}
}

// readUni reads a unidirectional stream (RFC 9114 section 6.2).
func (c *conn) readUni(s *quic.ReceiveStream) error {
	in := &input{from: reader{s, c.quic, fixedWindow()}}
	defer in.release()
	kind, err := in.varint()
	if err != nil {
		return nil //nolint:nilerr // it ended before it said what it is, which is allowed
	}
	switch kind {
	case streamControl:
		return c.readControl(in)
	case streamPush: // no client allows one, no server gets one
		return &connError{codeStreamCreation, "push stream"}
	case streamQPACKEncoder, streamQPACKDecoder:
		return nil // they say nothing while there is no dynamic table
	}
	s.CancelRead(quic.StreamErrorCode(codeStreamCreation))
	return nil
}

// readControl reads the peer's control stream, which begins with SETTINGS and never ends.
func (c *conn) readControl(in *input) error {
	for first := true; ; first = false {
		kind, length, err := in.header()
		if err != nil {
			return c.controlEnded(err)
		}
		switch {
		case first && kind != frameSettings:
			return &connError{codeNoSettings, "the control stream begins without SETTINGS"}
		case misplaced(kind, first):
			return &connError{codeUnexpected, fmt.Sprintf("frame of type %#x on the control stream", kind)}
		case length > maxFrame && known(kind):
			return &connError{codeLoad, fmt.Sprintf("frame of %d bytes on the control stream", length)}
		case kind != frameSettings && kind != frameGoAway:
			if err := in.skip(length); err != nil {
				return c.controlEnded(err)
			}
			continue
		}
		body, err := in.body(length)
		if err != nil {
			return c.controlEnded(err)
		}
		if err := c.controlFrame(kind, body); err != nil {
			return err
		}
	}
}

// misplaced reports whether a frame may not be on a control stream (RFC 9114 section 7.2).
func misplaced(kind uint64, first bool) bool {
	switch kind {
	case frameSettings:
		return !first
	case frameGoAway, frameCancelPush, frameMaxPush:
		return false
	}
	return known(kind)
}

// controlEnded is for an end of the control stream, which only that of the connection excuses.
func (c *conn) controlEnded(err error) error {
	if c.quic.Context().Err() != nil {
		return nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, errTruncated) || codeOf(err) != 0 {
		return &connError{codeClosedCritical, "the control stream ended"}
	}
	return nil
}

func (c *conn) controlFrame(kind uint64, body []byte) error {
	if kind == frameGoAway {
		id, n := hbone.ParseVarint(body)
		if n == 0 || n != len(body) {
			return &connError{codeFrame, "GOAWAY of a wrong length"}
		}
		return c.goneAway(id)
	}
	s, err := parseSettings(body)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.settled:
		return &connError{codeStreamCreation, "a second control stream"}
	default:
	}
	frames := c.quic.ConnectionState().SupportsDatagrams.Remote
	if s.datagrams && !frames {
		return &connError{codeSettings, "HTTP datagrams without QUIC's"}
	}
	c.datagrams.Store(s.datagrams)
	c.peer = s
	close(c.settled)
	return nil
}

// awaitSettings waits for the peer's.
func (c *conn) awaitSettings(ctx context.Context) (settings, error) {
	select {
	case <-c.settled:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.peer, nil
	case <-ctx.Done():
		return settings{}, ctx.Err()
	case <-c.quic.Context().Done():
		return settings{}, c.ended()
	}
}

// receiveDatagrams hands datagrams to their flows. It must not wait: quic-go drops what comes
// when 128 are queued.
func (c *conn) receiveDatagrams() {
	for {
		p, err := c.quic.ReceiveDatagram(context.Background()) // ends with the connection
		if err != nil {
			return
		}
		quarter, n := hbone.ParseVarint(p)
		if n == 0 || quarter > 1<<60-1 {
			c.broken(&connError{codeDatagram, "datagram without a stream"})
			return
		}
		c.moved.Add(uint64(len(p)))
		c.datagram(quic.StreamID(quarter*4), p[n:])
	}
}

func (c *conn) datagram(id quic.StreamID, payload []byte) {
	c.mu.Lock()
	f := c.flows[id]
	if f == nil {
		c.keepLocked(id, payload)
	}
	c.mu.Unlock()
	if f != nil {
		f.receive(payload)
	}
}

// keepLocked keeps what overtook its request, within bounds: the oldest goes.
func (c *conn) keepLocked(id quic.StreamID, payload []byte) {
	if c.server == nil || !c.server.isToComeLocked(id) || len(payload) > maxEarlySize {
		return // its flow has ended
	}
	c.early = append(c.early, earlyDatagram{id, payload})
	for c.earlyN += len(payload); len(c.early) > maxEarly || c.earlyN > maxEarlySize; {
		c.earlyN -= len(c.early[0].payload)
		c.early = slices.Delete(c.early, 0, 1)
	}
}

// takeEarlyLocked takes what came for a request before it.
func (c *conn) takeEarlyLocked(id quic.StreamID) [][]byte {
	var taken [][]byte
	c.early = slices.DeleteFunc(c.early, func(d earlyDatagram) bool {
		if d.id == id {
			taken = append(taken, d.payload)
			c.earlyN -= len(d.payload)
		}
		return d.id == id
	})
	if len(c.early) == 0 {
		c.early = nil
	}
	return taken
}

// enter makes f known to receiveDatagrams, and hands it what came before. The exchange's leave
// ends that.
func (c *conn) enter(f *flow) {
	id := f.q.StreamID()
	c.mu.Lock()
	c.flows[id] = f
	early := c.takeEarlyLocked(id)
	c.mu.Unlock()
	for _, payload := range early {
		f.receive(payload)
	}
}

// sendGoAway tells the peer the first stream that is not served any more.
func (c *conn) sendGoAway(id uint64) {
	body := hbone.AppendVarint(nil, id)
	frame := append(hbone.AppendVarint(hbone.AppendVarint(nil, frameGoAway), uint64(len(body))), body...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.control == nil {
		return
	}
	_ = c.control.TryWriteAll(frame) // what cannot be told is seen when the connection ends
}
