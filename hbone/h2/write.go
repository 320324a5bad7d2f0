package h2

import (
	"bytes"
	"encoding/binary"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// frameHeader is the size of one (RFC 9113 section 4.1).
const frameHeader = 9

// headerEncoder is HPACK's state for what we send; it belongs to the holder of wmu.
type headerEncoder struct {
	buf bytes.Buffer
	enc *hpack.Encoder
}

func (e *headerEncoder) init() { e.enc = hpack.NewEncoder(&e.buf) }

// outgoing gathers what is written under wmu.
type outgoing struct{ c *conn }

func (o outgoing) Write(p []byte) (int, error) {
	o.c.gather(p)
	return len(p), nil
}

// gather adds p to what the wire holds, in full records as far as it goes. Its error is kept
// in the connection.
func (c *conn) gather(p []byte) {
	for len(p) > 0 {
		if n := len(p) / maxRecord * maxRecord; c.out == nil && n > 0 {
			c.encrypt(p[:n])
			p = p[n:]
			continue
		}
		if c.out == nil {
			c.out = records.Get().(*[]byte)
		}
		n := min(len(p), maxRecord-len(*c.out))
		*c.out = append(*c.out, p[:n]...)
		if p = p[n:]; len(*c.out) == maxRecord {
			c.encryptRest()
		}
	}
}

func (c *conn) encrypt(p []byte) {
	if _, err := c.tls.Write(p); err != nil {
		c.writeFailed(err)
	}
}

func (c *conn) encryptRest() {
	if c.out == nil {
		return
	}
	c.encrypt(*c.out)
	*c.out = (*c.out)[:0]
	records.Put(c.out)
	c.out = nil
}

// flush sends what was gathered, and waits until the kernel has taken it.
func (c *conn) flush() {
	c.encryptRest()
	if err := c.wire.Flush(); err != nil {
		c.writeFailed(err)
	}
}

// writeFailed leaves the end to readLoop for a moment: what the peer said before it hung up,
// an alert about our certificate say, tells more than a broken pipe.
func (c *conn) writeFailed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil || c.writeErr != nil {
		return
	}
	c.writeErr = err
	_ = c.wire.SetReadDeadline(time.Now().Add(closeTimeout))
}

// lock takes wmu to write DATA, behind what control holds; unlock flushes unless another
// writer comes right behind, who then will.
func (c *conn) lock() {
	c.writers.Add(1)
	c.wmu.Lock()
	c.wire.Hold()
	c.writeControl()
}

func (c *conn) unlock() {
	if c.writers.Add(-1) == 0 {
		c.flush()
	}
	c.wmu.Unlock()
	c.kick() // what was pushed meanwhile
}

// release unlocks mu and writes what was pushed under it. readLoop need not: it does before
// it waits.
func (c *conn) release() {
	c.mu.Unlock()
	c.kick()
}

// kick writes control, and never waits: whoever holds wmu kicks when it gives it back.
func (c *conn) kick() {
	for c.pending.Load() && c.wmu.TryLock() {
		c.wire.Hold()
		c.writeControl()
		c.unlockNow()
	}
}

// kickSoonLocked has nobody kick for what control holds, until companyPause is over.
func (c *conn) kickSoonLocked() {
	c.pending.Store(false)
	switch {
	case c.waits:
		return
	case c.soon == nil:
		c.soon = time.AfterFunc(companyPause, c.kickNow)
	default:
		c.soon.Reset(companyPause)
	}
	c.waits = true
}

func (c *conn) kickNow() {
	c.mu.Lock()
	defer c.release()
	c.waits = false
	c.pending.Store(len(c.control) > 0)
}

// unlockNow flushes and gives wmu back. When the kernel has no room, that goes on in the
// background.
func (c *conn) unlockNow() {
	if c.writers.Load() > 0 { // they flush
		c.wmu.Unlock()
		return
	}
	c.encryptRest()
	flushed, err := c.wire.TryFlush()
	if err != nil {
		c.writeFailed(err)
	}
	if flushed {
		c.wmu.Unlock()
		return
	}
	c.mu.Lock() // orders it before the Wait of run, which finish holds up until wmu is free
	defer c.mu.Unlock()
	c.background.Go(func() {
		c.flush()
		c.wmu.Unlock()
		c.kick()
	})
}

// finish says the last and closes the connection.
func (c *conn) finish() {
	c.wmu.Lock()
	c.wire.Hold()
	c.writeControl()
	c.flush() // even if a writer comes right behind: it would be too late
	c.wmu.Unlock()
	c.mu.Lock()
	graceful := c.graceful
	c.mu.Unlock()
	if graceful && c.tls.CloseWrite() == nil {
		// Closing now could turn what the peer still sends into a TCP reset that overtakes
		// our last frames. readLoop goes on until the peer closes, or until the deadline
		// that shut has set.
		return
	}
	_ = c.wire.Close()
}

// pushLocked queues a control frame. A peer that asks for many and reads none is cut off.
func (c *conn) pushLocked(f control) {
	if c.err != nil {
		return
	}
	if f.reply {
		if c.replies++; c.replies > maxReplies {
			c.replies = 0
			c.shutLocked(http2.ConnectionError(http2.ErrCodeEnhanceYourCalm), http2.ErrCodeEnhanceYourCalm)
			return
		}
	}
	c.control = append(c.control, f)
	c.pending.Store(true)
}

// pushEndLocked queues END_STREAM, on the DATA frame that was queued right before if it is the stream's.
func (c *conn) pushEndLocked(stream uint32) {
	if n := len(c.control); n > 0 && c.control[n-1].kind == controlData && c.control[n-1].stream == stream {
		c.control[n-1].end = true
		c.pending.Store(true)
		return
	}
	c.pushLocked(control{kind: controlEnd, stream: stream})
}

// writeControl writes what control holds. The Framer's errors are those of outgoing, which
// has none, or of arguments that are ours.
func (c *conn) writeControl() {
	c.mu.Lock()
	frames := c.control
	c.control, c.replies, c.offered = c.spare, 0, 0
	c.spare = nil
	c.pending.Store(false)
	maxFrame := c.peer.maxFrame
	c.mu.Unlock()
	for i := range frames {
		f := &frames[i]
		switch f.kind {
		case controlHeaders:
			c.writeHeaders(f, maxFrame)
		case controlEnd:
			_ = c.framer.WriteData(f.stream, true, nil)
		case controlData:
			c.gatherData(f.stream, f.end, f.data)
			if f.chunk != nil {
				putChunk(f.chunk)
			}
		case controlReset:
			_ = c.framer.WriteRSTStream(f.stream, f.code)
		case controlWindow:
			_ = c.framer.WriteWindowUpdate(f.stream, f.n)
		case controlPing, controlPingAck:
			_ = c.framer.WritePing(f.kind == controlPingAck, f.ping)
		case controlSettingsAck:
			_ = c.framer.WriteSettingsAck()
		case controlTableSize:
			c.encoder.enc.SetMaxDynamicTableSize(f.n)
		case controlGoAway:
			_ = c.framer.WriteGoAway(f.n, f.code, nil)
		}
	}
	if clear(frames); cap(frames) <= maxSpare {
		c.spare = frames[:0]
	}
}

func (c *conn) writeHeaders(f *control, maxFrame int) {
	c.encoder.buf.Reset()
	for _, field := range f.fields {
		_ = c.encoder.enc.WriteField(field) // to a bytes.Buffer
	}
	block := c.encoder.buf.Bytes()
	first := true
	for first || len(block) > 0 {
		n := min(len(block), maxFrame)
		part := block[:n]
		block = block[n:]
		if first {
			_ = c.framer.WriteHeaders(http2.HeadersFrameParam{
				StreamID: f.stream, BlockFragment: part, EndStream: f.end, EndHeaders: len(block) == 0,
			})
		} else {
			_ = c.framer.WriteContinuation(f.stream, len(block) == 0, part)
		}
		first = false
	}
}

// writeData sends p, for which window was taken, as DATA of s.
func (c *conn) writeData(s *stream, p []byte) error {
	c.lock()
	defer c.unlock()
	c.mu.Lock()
	err := s.writeErrLocked()
	if err != nil { // it ended since: no frame may follow the one that ended it
		c.sendWindow += int64(len(p))
		c.wakeBlockedLocked()
	}
	largest := c.peer.maxFrame
	c.mu.Unlock()
	if err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), largest)
		c.gatherData(s.id, false, p[:n])
		p = p[n:]
	}
	return nil
}

// gatherData adds a DATA frame, which the Framer would copy.
func (c *conn) gatherData(stream uint32, end bool, p []byte) {
	var header [frameHeader]byte
	binary.BigEndian.PutUint32(header[:], uint32(len(p))<<8|uint32(http2.FrameData))
	if end {
		header[4] = byte(http2.FlagDataEndStream)
	}
	binary.BigEndian.PutUint32(header[5:], stream)
	c.gather(header[:])
	c.gather(p)
}
