package h2

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/lazyctx"
)

// serverState is what only a server's connection has, guarded by conn.mu.
type serverState struct {
	info  *hbone.Conn
	force context.Context // parent of every stream's context, for the life of run
	serve func(*hbone.ServerRequest)
	work  sync.WaitGroup // handlers

	handlers  int
	nuisances int // streams refused, or reset by the peer before their answer
	final     bool
	finalAt   *time.Timer // when final comes whatever the peer does; nil until the drain
	linger    *time.Timer
}

// ServeConn serves t until it ends, or ctx does and it has drained, or force is done.
func (s Server) ServeConn(ctx, force context.Context, t *tls.Conn, serve func(*hbone.ServerRequest)) error {
	c, err := newConn(t, values{
		pingInterval: s.PingInterval, pingTimeout: s.PingTimeout,
		streamWindow: s.StreamWindow, connWindow: s.ConnWindow, budget: s.Budget,
		maxStreams: s.MaxStreams, maxHeaderList: hbone.MaxHeaderList, datagrams: s.Datagrams,
	}.withDefaults())
	if err != nil {
		return err
	}
	c.server = &serverState{info: hbone.NewConn(t), force: force, serve: serve}
	settings := []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: c.values.maxStreams}}
	if s.Datagrams {
		settings = append(settings, http2.Setting{ID: http2.SettingEnableConnectProtocol, Val: 1})
	}
	c.hello("", settings...)
	stopDrain := context.AfterFunc(ctx, c.drain)
	defer stopDrain()
	stopForce := context.AfterFunc(force, func() { c.shut(errForced, http2.ErrCodeNo) })
	defer stopForce()
	err = c.run()
	c.server.work.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, timer := range []*time.Timer{c.server.linger, c.server.finalAt} {
		if timer != nil {
			timer.Stop()
		}
	}
	return err
}

func (c *conn) readPreface() error {
	if err := c.wire.SetReadDeadline(time.Now().Add(prefaceTimeout)); err != nil {
		return err
	}
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(&c.in, preface); err != nil {
		return err
	}
	if !bytes.Equal(preface, []byte(http2.ClientPreface)) {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil || c.writeErr != nil { // its end set a deadline of its own
		return nil
	}
	return c.wire.SetReadDeadline(time.Time{})
}

// drain starts the graceful end: a GOAWAY that excludes nothing and a PING. Streams that
// the peer opened before it saw them are served; once the PING is answered, or was not for
// as long as a peer may keep silent, there are no more, and the final GOAWAY names the last.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.release()
	if c.draining {
		return
	}
	c.draining = true
	c.pushLocked(control{kind: controlGoAway, n: maxStreamID, code: http2.ErrCodeNo})
	c.pushLocked(control{kind: controlPing, ping: drainPing})
	c.server.finalAt = time.AfterFunc(c.values.pingTimeout, func() {
		c.mu.Lock()
		defer c.release()
		c.finalGoAwayLocked()
	})
}

func (c *conn) finalGoAwayLocked() {
	if !c.draining || c.server.final || c.err != nil {
		return
	}
	c.server.final = true
	c.pushLocked(control{kind: controlGoAway, n: c.lastID, code: http2.ErrCodeNo})
	c.settleLocked()
}

// nuisance counts what a peer makes us do for nothing; a peer that does little else is cut
// off, as CVE-2023-44487 taught.
func (st *serverState) nuisance(maxStreams uint32) error {
	if st.nuisances++; st.nuisances > 10*int(maxStreams) {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	return nil
}

// requestLocked takes in a request's header.
func (c *conn) requestLocked(f *http2.MetaHeadersFrame) error {
	id := f.StreamID
	if s := c.streams[id]; s != nil {
		if s.recvEnd {
			s.resetLocked(http2.ErrCodeStreamClosed)
		} else { // on a connected stream there is only DATA (RFC 9113 section 8.5)
			s.resetLocked(http2.ErrCodeProtocol)
		}
		return nil
	}
	if id%2 == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if id <= c.seenID {
		if c.wasResetLocked(id) {
			return nil
		}
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	}
	c.seenID = id
	if c.server.final || c.err != nil {
		return nil // the final GOAWAY told that it is not processed
	}
	c.lastID = id
	switch {
	case f.HasPriority() && f.Priority.StreamDep == id, !f.Truncated && malformed(f, c.values.datagrams):
		c.rejectLocked(f, http2.ErrCodeProtocol)
	case len(c.streams) >= int(c.values.maxStreams), c.server.handlers >= 2*int(c.values.maxStreams):
		c.rejectLocked(f, http2.ErrCodeRefusedStream)
		return c.server.nuisance(c.values.maxStreams)
	case f.Truncated:
		c.answerLocked(f, 431)
	case f.PseudoValue("method") != "CONNECT":
		c.answerLocked(f, 400)
	default:
		c.connectLocked(f)
	}
	return nil
}

// rejectLocked resets a request that gets no stream.
func (c *conn) rejectLocked(f *http2.MetaHeadersFrame, code http2.ErrCode) {
	c.newStreamLocked(f.StreamID).resetLocked(code)
}

// answerLocked answers a request that gets no handler.
func (c *conn) answerLocked(f *http2.MetaHeadersFrame, status int) {
	s := c.newStreamLocked(f.StreamID)
	s.recvEnd = f.StreamEnded()
	s.rejectLocked(status, true)
}

// malformed is RFC 9113 section 8.1.1 as far as the Framer does not judge: the pseudo-header
// fields of section 8.3.1 and 8.5, and the fields of section 8.2.2. With extended, :protocol may
// be there, which RFC 8441 section 4 has instead of section 8.5.
func malformed(f *http2.MetaHeadersFrame, extended bool) bool {
	var path, scheme, authority, protocol, method int
	for _, field := range f.PseudoFields() {
		switch field.Name {
		case ":method":
			method++
		case ":path":
			path++
			if field.Value == "" {
				return true
			}
		case ":scheme":
			scheme++
		case ":authority":
			authority++
		default: // :protocol
			protocol++
		}
	}
	for _, field := range f.RegularFields() {
		switch field.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
			return true
		case "te":
			if field.Value != "trailers" {
				return true
			}
		}
	}
	if protocol > 1 || protocol > 0 && !extended || method != 1 || authority > 1 {
		return true
	}
	connect := f.PseudoValue("method") == "CONNECT"
	switch {
	case protocol > 0 && !connect:
		return true
	case protocol == 0 && connect:
		return path > 0 || scheme > 0
	}
	return path != 1 || scheme != 1
}

// target is what a CONNECT asks for, or the status that refuses it.
func target(f *http2.MetaHeadersFrame) (to hbone.Authority, protocol hbone.Protocol, status int) {
	to, err := hbone.ParseAuthority(f.PseudoValue("authority"))
	switch f.PseudoValue("protocol") {
	case "":
	case hbone.ConnectUDP:
		protocol = hbone.UDP
		if err == nil {
			to, err = hbone.ParseUDPPath(f.PseudoValue("path"))
		}
	default:
		return to, 0, 501 // as RFC 9220 section 3 has it
	}
	if err != nil {
		return to, 0, 400
	}
	return to, protocol, 0
}

// connectLocked starts the handler of a CONNECT.
func (c *conn) connectLocked(f *http2.MetaHeadersFrame) {
	authority, protocol, status := target(f)
	if status != 0 {
		c.answerLocked(f, status)
		return
	}
	s := c.newStreamLocked(f.StreamID)
	if s.recvEnd = f.StreamEnded(); !s.recvEnd && !s.reserveLocked() {
		s.rejectLocked(503, true) // not REFUSED_STREAM, or the peer would try again at once
		return
	}
	ctx := lazyctx.New(c.server.force, 0)
	cancel := func() { ctx.End(nil) }
	s.cancel = cancel
	r := &hbone.ServerRequest{
		Protocol: protocol,
		Target:   authority.AddrPort(),
		Conn:     c.server.info,
		Context:  ctx,
		Reject:   s.reject,
	}
	var fl *flow
	if protocol == hbone.UDP {
		fl = &flow{stream: s}
		r.AcceptDatagrams = fl.accept
	} else {
		r.Accept, r.Begun = s.accept, s.begun
	}
	r.Authority = authority.String()
	for _, field := range f.RegularFields() {
		r.SetField(field.Name, field.Value)
	}
	c.server.handlers++
	c.server.work.Go(func() {
		deepen(0)
		defer cancel()
		c.server.serve(r)
		if fl != nil && !fl.inbox.Delivered() {
			fl.abandon()
		}
		c.mu.Lock()
		defer c.release()
		s.cancel = nil
		switch {
		case !s.answered:
			s.closeLocked(http2.ErrCodeInternal)
		case s.sink == nil:
			s.closeLocked(http2.ErrCodeCancel)
		}
		c.server.handlers--
		c.settleLocked()
	})
}

// deepen makes room on the goroutine's stack at once, while there is next to nothing on it: a handler
// needs more than 8 KiB, and to get there by doubling copies all the frames that there are each time.
//
//go:noinline
func deepen(i int) byte { // what it does with i keeps the compiler from leaving room out
	var room [9 << 10]byte
	return room[i]
}

var errAnswered = errors.New("request was answered before")

func (s *stream) begun() bool {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return s.in.size > 0
}

// accept answers with 200. A peer that has sent first bytes, and fewer than it might, waits for the
// application's: the answer may wait for them as well, to go in one piece.
func (s *stream) accept(response hbone.Response) (hbone.Stream, error) {
	fields := []hpack.HeaderField{{Name: ":status", Value: "200"}}
	response.Fields(func(name, value string) { fields = append(fields, hpack.HeaderField{Name: name, Value: value}) })
	c := s.conn
	c.mu.Lock()
	defer c.release()
	mayWait := s.in.size > 0 && s.window.open > 0 && !c.pending.Load()
	if err := s.acceptLocked(fields); err != nil {
		return nil, err
	}
	if mayWait {
		c.kickSoonLocked()
	}
	return s, nil
}

func (s *stream) acceptLocked(fields []hpack.HeaderField) error {
	c := s.conn
	switch {
	case s.answered:
		return errAnswered
	case s.err != nil:
		return s.err
	case s.closed:
		return net.ErrClosed
	}
	s.answered = true
	c.server.nuisances = max(0, c.server.nuisances-1)
	c.pushLocked(control{kind: controlHeaders, stream: s.id, fields: fields})
	s.startLocked()
	return nil
}

func (s *stream) reject(status int) {
	s.conn.mu.Lock()
	defer s.conn.release()
	s.rejectLocked(status, false)
}

// rejectLocked answers with status and ends the stream; NO_ERROR asks the peer to send no
// more (RFC 9113 section 8.1).
func (s *stream) rejectLocked(status int, reply bool) {
	if s.answered || s.err != nil || s.closed {
		return
	}
	s.answered, s.sentEnd = true, true
	s.conn.pushLocked(control{
		kind: controlHeaders, stream: s.id, end: true, reply: reply,
		fields: []hpack.HeaderField{{Name: ":status", Value: strconv.Itoa(status)}},
	})
	s.closeLocked(http2.ErrCodeNo)
}
