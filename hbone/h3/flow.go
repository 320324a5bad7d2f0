package h3

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// flow is a hbone.DatagramStream. Its inbox has two receivers, the connection's for QUIC DATAGRAM
// frames and its own for capsules.
type flow struct {
	*exchange
	prefix []byte // of every datagram: the stream's number divided by four (RFC 9297 section 2.1)

	inbox    hbone.Inbox
	capsules hbone.Capsules // of its reader

	out  []byte      // of Send; guarded by wmu
	busy atomic.Bool // a capsule is on its way

	sendFull, foreign atomic.Uint64 // datagrams dropped
}

func newFlow(x *exchange) *flow {
	return &flow{exchange: x, prefix: hbone.AppendVarint(nil, uint64(x.q.StreamID())/4)}
}

// Send sends p as a QUIC DATAGRAM frame, else as a capsule.
func (f *flow) Send(p []byte, fragment bool) error {
	if len(p) > hbone.MaxDatagram {
		return &hbone.TooLargeError{Max: hbone.MaxDatagram}
	}
	f.wmu.Lock()
	defer f.wmu.Unlock()
	if err := f.sendable(); err != nil {
		return err
	}
	f.conn.moved.Add(uint64(len(p)))
	if f.conn.datagrams.Load() {
		f.out = hbone.AppendDatagram(append(f.out[:0], f.prefix...), p)
		err := f.conn.quic.SendDatagram(f.out)
		if err == nil {
			return nil
		}
		if err := f.unsent(err, len(p), fragment); err != nil {
			return err
		}
	}
	return f.sendCapsule(p)
}

// leastRoom is the longest datagram that is always carried, as a capsule where no frame holds it
// and whatever its sender says: so long are the packets that QUIC begins with, and until a
// connection has found out what its path takes, its own are hardly longer.
const leastRoom = 1280

// unsent is nil of a datagram that fits no frame and may be cut.
func (f *flow) unsent(err error, size int, fragment bool) error {
	var tooLarge *quic.DatagramTooLargeError // on the heap, so not in Send
	switch {
	case !errors.As(err, &tooLarge):
		return f.conn.fault(err)
	case !fragment && size > leastRoom:
		return &hbone.TooLargeError{Max: max(leastRoom, int(tooLarge.MaxDatagramPayloadSize)-len(f.prefix)-1)}
	}
	return nil
}

// sendable says why nothing can be sent.
func (f *flow) sendable() error {
	if f.inbox.Closed() {
		return net.ErrClosed
	}
	if err := context.Cause(f.q.Context()); err != nil {
		return f.conn.fault(err)
	}
	return nil
}

// sendCapsule sends p as one DATA frame, in the background when there is no room for all of it now.
// What comes meanwhile is dropped.
func (f *flow) sendCapsule(p []byte) error {
	if f.busy.Load() {
		f.sendFull.Add(1)
		return nil
	}
	capsule := hbone.AppendCapsule(make([]byte, 0, len(p)+hbone.CapsuleOverhead), p)
	out := append(appendDataHeader(nil, len(capsule)), capsule...)
	switch err := f.q.TryWriteAll(out); {
	case errors.Is(err, quic.ErrWouldBlock):
		f.busy.Store(true)
		f.conn.spawn(func() {
			defer f.busy.Store(false)
			_, _ = f.q.Write(out) // its failure is the flow's end
		})
	case err != nil:
		return f.conn.fault(err)
	}
	return nil
}

// receive takes the payload of an HTTP datagram, which is the flow's own.
func (f *flow) receive(payload []byte) {
	p, err := hbone.ParseDatagram(payload)
	switch {
	case errors.Is(err, hbone.ErrForeignContext):
		f.foreign.Add(1)
	case err != nil:
		f.reset(codeDatagram) // its reader tells the user
	default:
		f.inbox.Arrived(p)
	}
}

// Deliver hands over what waits, and then what arrives.
func (f *flow) Deliver(sink hbone.DatagramSink) { f.inbox.Deliver(sink) }

// read reads capsules until the flow's end, which the stream's is.
func (f *flow) read() {
	err := f.readCapsules()
	f.in.release()
	f.leave()
	f.inbox.End(err)
}

// readCapsules returns how the flow ended, as DatagramSink.End is told.
func (f *flow) readCapsules() error {
	for {
		p, err := f.data()
		foreign := f.capsules.Foreign
		switch {
		case isEnd(err):
			err = f.capsules.End()
		case err == nil:
			err = f.capsules.Feed(p, f.inbox.Arrived)
			f.foreign.Add(f.capsules.Foreign - foreign)
			if err == nil {
				continue
			}
		case codeOf(err) == codeNo: // Close, with a capsule on its way
			return nil
		case codeOf(err) == codeConnect:
			return fmt.Errorf("flow: %w", hbone.PortClosedError{})
		default:
			return f.judge(err)
		}
		if err != nil {
			f.reset(codeDatagram)
		}
		return err
	}
}

// Drops is what was dropped so far.
func (f *flow) Drops() hbone.DatagramDrops {
	return hbone.DatagramDrops{SendFull: f.sendFull.Load(), ReceiveFull: f.inbox.Full(), Foreign: f.foreign.Load()}
}

// Refuse resets the stream with H3_CONNECT_ERROR, as RFC 9114 section 4.4 has it for TCP.
func (f *flow) Refuse() error {
	f.finish(func() { f.reset(codeConnect) })
	return nil
}

// Close ends the stream, cleanly unless a capsule is on its way; what the peer still says is of no use.
func (f *flow) Close() error {
	f.finish(func() {
		if f.busy.Load() {
			f.q.CancelWrite(quic.StreamErrorCode(codeNo))
		} else {
			_ = f.q.Close() // fails when the peer was first
		}
		f.q.CancelRead(quic.StreamErrorCode(codeNo))
	})
	return nil
}

func (f *flow) finish(how func()) {
	if f.inbox.Close() {
		how()
		f.leave()
	}
}
