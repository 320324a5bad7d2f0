package h2

import (
	"encoding/binary"
	"errors"
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// readLoop takes in frames until the connection ends; an http2.ConnectionError is one that
// the peer is to be told.
func (c *conn) readLoop() error {
	if c.server != nil {
		if err := c.readPreface(); err != nil {
			return err
		}
	}
	for {
		header, err := c.reader.ReadFrameHeader()
		if err != nil {
			return frameError(err)
		}
		if !c.sawSettings && header.Type != http2.FrameSettings {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		if header.Type == http2.FrameData {
			if err := c.readData(header); err != nil {
				return err
			}
			continue
		}
		if header.Length > maxControlFrame {
			return http2.ConnectionError(http2.ErrCodeFrameSize)
		}
		if err := c.readControl(header); err != nil {
			return err
		}
	}
}

func newReader(in *input, decoder *hpack.Decoder, maxHeaderList uint32) *http2.Framer {
	f := http2.NewFramer(nil, in)
	f.SetMaxReadFrameSize(maxReadFrame)
	f.ReadMetaHeaders, f.MaxHeaderListSize = decoder, maxHeaderList
	return f
}

// readControl reads and acts on any frame but DATA. The Framer makes room for all of it at once and
// keeps that, so one that is not small comes out of the budget, and the Framer is made anew behind it.
func (c *conn) readControl(header http2.FrameHeader) error {
	size := int(header.Length)
	if header.Type == http2.FrameHeaders && !header.Flags.Has(http2.FlagHeadersEndHeaders) {
		size = maxControlFrame // CONTINUATION tells its own size
	}
	if size <= smallFrame {
		return c.readFrame(header)
	}
	if budget := c.values.budget; !budget.Take(size) {
		budget.Short()
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	defer c.values.budget.Give(size)
	c.reader.SetMaxReadFrameSize(maxControlFrame)
	err := c.readFrame(header)
	c.reader = newReader(&c.in, c.reader.ReadMetaHeaders, c.values.maxHeaderList)
	return err
}

func frameError(err error) error {
	if errors.Is(err, http2.ErrFrameTooLarge) {
		return http2.ConnectionError(http2.ErrCodeFrameSize)
	}
	return err
}

func (c *conn) readFrame(header http2.FrameHeader) error {
	frame, err := c.reader.ReadFrameForHeader(header)
	c.mu.Lock()
	defer c.mu.Unlock()
	var se http2.StreamError
	switch {
	case errors.As(err, &se):
		return c.streamErrorLocked(header, se)
	case err != nil:
		return frameError(err)
	}
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		return c.settingsLocked(f)
	case *http2.MetaHeadersFrame:
		if c.server != nil {
			return c.requestLocked(f)
		}
		return c.responseLocked(f)
	case *http2.RSTStreamFrame:
		return c.resetLocked(f)
	case *http2.WindowUpdateFrame:
		return c.windowLocked(f)
	case *http2.PingFrame:
		c.pingLocked(f)
	case *http2.GoAwayFrame:
		c.goAwayLocked(f)
	case *http2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			c.pushLocked(control{kind: controlReset, stream: f.StreamID, code: http2.ErrCodeProtocol, reply: true})
		}
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil
}

// streamErrorLocked answers a frame that breaks the rules for its stream only.
func (c *conn) streamErrorLocked(header http2.FrameHeader, se http2.StreamError) error {
	if s := c.streams[se.StreamID]; s != nil {
		s.resetLocked(se.Code)
		return nil
	}
	if c.server != nil && header.Type == http2.FrameHeaders && se.StreamID > c.seenID {
		c.seenID = se.StreamID
		if !c.server.final {
			c.lastID = se.StreamID
		}
	}
	if c.isIdleLocked(se.StreamID) {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.pushLocked(control{kind: controlReset, stream: se.StreamID, code: se.Code, reply: true})
	return nil
}

// isIdleLocked reports whether a stream was never opened. Only clients open any, with odd
// numbers.
func (c *conn) isIdleLocked(id uint32) bool { return id%2 == 0 || id > c.seenID }

func (c *conn) settingsLocked(f *http2.SettingsFrame) error {
	if f.IsAck() {
		c.acked = true
		return nil
	}
	c.sawSettings = true
	if f.NumSettings() > 100 {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	if err := f.ForeachSetting(c.settingLocked); err != nil {
		return err
	}
	c.pushLocked(control{kind: controlSettingsAck, reply: true})
	if c.client != nil {
		c.client.settled.Do(func() { close(c.client.settings) })
	}
	return nil
}

func (c *conn) settingLocked(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		return err
	}
	switch s.ID {
	case http2.SettingInitialWindowSize:
		change := int64(s.Val) - c.peer.initialWindow
		c.peer.initialWindow = int64(s.Val)
		for _, st := range c.streams {
			if st.sendWindow += change; st.sendWindow > maxWindow {
				return http2.ConnectionError(http2.ErrCodeFlowControl)
			}
			st.writable.Broadcast()
		}
	case http2.SettingMaxFrameSize:
		c.peer.maxFrame = int(s.Val)
	case http2.SettingMaxConcurrentStreams:
		c.peer.maxStreams = s.Val
	case http2.SettingMaxHeaderListSize:
		c.peer.maxHeaderList = uint64(s.Val)
	case http2.SettingEnableConnectProtocol:
		if c.peer.connectProtocol && s.Val == 0 { // RFC 8441 section 3
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		c.peer.connectProtocol = s.Val == 1
	case http2.SettingHeaderTableSize:
		// Applied where the encoder is, in order with the header blocks.
		c.pushLocked(control{kind: controlTableSize, n: s.Val, reply: true})
	}
	return nil
}

func (c *conn) pingLocked(f *http2.PingFrame) {
	switch {
	case !f.IsAck():
		c.pushLocked(control{kind: controlPingAck, ping: f.Data, reply: true})
	case c.server != nil && f.Data == drainPing:
		c.finalGoAwayLocked()
	case f.Data == growPing && c.probing:
		c.probedLocked()
	}
}

func (c *conn) windowLocked(f *http2.WindowUpdateFrame) error {
	if f.StreamID == 0 {
		if c.sendWindow += int64(f.Increment); c.sendWindow > maxWindow {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		c.wakeBlockedLocked()
		return nil
	}
	s := c.streams[f.StreamID]
	if s == nil {
		if c.isIdleLocked(f.StreamID) {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		return nil
	}
	if s.sendWindow += int64(f.Increment); s.sendWindow > maxWindow {
		s.resetLocked(http2.ErrCodeFlowControl)
		return nil
	}
	s.writable.Broadcast()
	return nil
}

func (c *conn) resetLocked(f *http2.RSTStreamFrame) error {
	s := c.streams[f.StreamID]
	if s == nil {
		if c.isIdleLocked(f.StreamID) {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		// Each side reset it: nothing may follow.
		c.resets = slices.DeleteFunc(c.resets, func(id uint32) bool { return id == f.StreamID })
		return nil
	}
	var err error = &hbone.ResetError{Code: uint32(f.ErrCode), Name: f.ErrCode.String(), Remote: true}
	if c.client != nil && f.ErrCode == http2.ErrCodeRefusedStream && !s.answered {
		err = refused(err)
	}
	unanswered := c.server != nil && !s.answered
	s.failLocked(err)
	if unanswered {
		return c.server.nuisance(c.values.maxStreams)
	}
	return nil
}

// readData takes in a DATA frame's payload, part by part as it arrives, without holding a lock.
func (c *conn) readData(header http2.FrameHeader) error {
	size, padding := int(header.Length), 0
	if header.StreamID == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if header.Flags.Has(http2.FlagDataPadded) {
		if size == 0 {
			return http2.ConnectionError(http2.ErrCodeFrameSize)
		}
		length, err := c.in.next(1)
		if err != nil {
			return err
		}
		if padding = int(length[0]); padding >= size {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		size -= 1 + padding
	}
	s, err := c.admitData(header)
	if err != nil {
		return err
	}
	if s == nil {
		return c.in.discard(size + padding)
	}
	end := header.Flags.Has(http2.FlagDataEndStream)
	for left := size; left > 0; {
		p, err := c.in.next(left)
		if err != nil {
			return err
		}
		left -= len(p)
		s.arrived(p, end && left == 0 && padding == 0)
	}
	if err := c.in.discard(padding); err != nil {
		return err
	}
	s.complete(int(header.Length)-size, end)
	return nil
}

// admitData charges a DATA frame to the windows and returns the stream that takes it, nil
// when none does.
func (c *conn) admitData(header http2.FrameHeader) (*stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.recvWindow -= int64(header.Length); c.recvWindow < 0 {
		return nil, http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	c.arrivedLocked(int(header.Length))
	s := c.streams[header.StreamID]
	switch {
	case s == nil && c.isIdleLocked(header.StreamID):
		return nil, http2.ConnectionError(http2.ErrCodeProtocol)
	case s == nil:
		if !c.wasResetLocked(header.StreamID) {
			c.pushLocked(control{kind: controlReset, stream: header.StreamID, code: http2.ErrCodeStreamClosed, reply: true})
		}
	case s.recvEnd:
		s.resetLocked(http2.ErrCodeStreamClosed)
	case c.client != nil && !s.answered: // before the answer to CONNECT
		s.resetLocked(http2.ErrCodeProtocol)
	default:
		code := s.admitLocked(int(header.Length))
		if code == http2.ErrCodeNo {
			return s, nil
		}
		s.window.unread -= int(header.Length)
		s.resetLocked(code)
	}
	return nil, nil
}

// wasResetLocked reports whether we reset a stream lately: its peer may not know yet.
func (c *conn) wasResetLocked(id uint32) bool { return slices.Contains(c.resets, id) }

func (c *conn) goAwayLocked(f *http2.GoAwayFrame) {
	if c.server != nil {
		// It opens no more streams, and closes when those that run have ended.
		return
	}
	c.draining = true
	for id, s := range c.streams {
		if id > f.LastStreamID {
			s.failLocked(refused(errGoAway(f)))
		}
	}
	c.settleLocked()
}

// drainPing marks the PING of a drain: its answer proves that the peer has seen the GOAWAY
// before it.
var drainPing = [8]byte(binary.BigEndian.AppendUint64(nil, 0x6472_6169_6e69_6e67)) // "draining"
