package h3

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
)

// What waits for a flow's Deliver.
const (
	maxWaiting     = 16
	maxWaitingSize = 128 << 10
)

// flow is a hbone.DatagramStream. rmu serialises its two receivers, the connection's for QUIC
// DATAGRAM frames and its own for capsules, and guards what they share.
type flow struct {
	*exchange
	prefix []byte // of every datagram: the stream's number divided by four (RFC 9297 section 2.1)

	capsules hbone.Capsules // of its reader

	rmu      sync.Mutex
	sink     hbone.DatagramSink // nil until Deliver
	waiting  [][]byte
	waitingN int // their bytes
	over     bool
	end      error // after over

	out []byte // of Send, which one goroutine calls; in use under wmu

	mu     sync.Mutex
	closed bool
	drops  hbone.DatagramDrops
}

func newFlow(x *exchange) *flow {
	prefix := hbone.AppendVarint(nil, uint64(x.q.StreamID())/4)
	return &flow{exchange: x, prefix: prefix}
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
		var tooLarge *quic.DatagramTooLargeError
		switch {
		case err == nil:
			return nil
		case !errors.As(err, &tooLarge):
			return f.conn.fault(err)
		case !fragment:
			return &hbone.TooLargeError{Max: max(0, int(tooLarge.MaxDatagramPayloadSize)-len(f.prefix)-1)}
		}
	}
	return f.sendCapsule(p)
}

// sendable says why nothing can be sent.
func (f *flow) sendable() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	if err := f.q.Context().Err(); err != nil {
		return f.conn.fault(err)
	}
	return nil
}

// sendCapsule sends p as one DATA frame, if there is room for all of it now.
func (f *flow) sendCapsule(p []byte) error {
	capsule := hbone.AppendCapsule(make([]byte, 0, len(p)+hbone.CapsuleOverhead), p)
	f.out = append(appendDataHeader(f.out[:0], len(capsule)), capsule...)
	err := f.q.TryWriteAll(f.out)
	f.out = nil // they are rare, and large
	switch {
	case errors.Is(err, quic.ErrWouldBlock):
		f.count(func(d *hbone.DatagramDrops) { d.SendFull++ })
		return nil
	case err != nil:
		return f.conn.fault(err)
	}
	return nil
}

func (f *flow) count(add func(*hbone.DatagramDrops)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	add(&f.drops)
}

// receive takes the payload of an HTTP datagram, which is the flow's own.
func (f *flow) receive(payload []byte) {
	p, err := hbone.ParseDatagram(payload)
	switch {
	case errors.Is(err, hbone.ErrForeignContext):
		f.count(func(d *hbone.DatagramDrops) { d.Foreign++ })
	case err != nil:
		f.reset(codeDatagram) // its reader tells the user
	default:
		f.arrived(p)
	}
}

// arrived hands a UDP payload on, or keeps it until Deliver.
func (f *flow) arrived(p []byte) {
	f.rmu.Lock()
	defer f.rmu.Unlock()
	switch {
	case f.over:
	case f.sink != nil:
		if !f.isClosed() {
			f.sink.Datagram(p)
		}
	case len(f.waiting) == maxWaiting || f.waitingN+len(p) > maxWaitingSize:
		f.count(func(d *hbone.DatagramDrops) { d.ReceiveFull++ })
	default:
		f.waiting = append(f.waiting, bytes.Clone(p))
		f.waitingN += len(p)
	}
}

// Deliver hands over what waits, and then what arrives.
func (f *flow) Deliver(sink hbone.DatagramSink) {
	f.rmu.Lock()
	defer f.rmu.Unlock()
	for _, p := range f.waiting {
		sink.Datagram(p)
	}
	f.waiting, f.waitingN = nil, 0
	f.sink = sink
	if f.over && !f.isClosed() {
		sink.End(f.end)
	}
}

func (f *flow) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

func (f *flow) hasSink() bool {
	f.rmu.Lock()
	defer f.rmu.Unlock()
	return f.sink != nil
}

// read reads capsules until the flow's end, which the stream's is.
func (f *flow) read() {
	err := f.readCapsules()
	f.in.release()
	f.leave()
	f.rmu.Lock()
	defer f.rmu.Unlock()
	f.over, f.end = true, err
	if f.sink != nil && !f.isClosed() {
		f.sink.End(err)
	}
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
			if err = f.capsules.Feed(p, f.arrived); err == nil {
				if n := f.capsules.Foreign - foreign; n > 0 {
					f.count(func(d *hbone.DatagramDrops) { d.Foreign += n })
				}
				continue
			}
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
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.drops
}

// Refuse resets the stream with H3_CONNECT_ERROR, as RFC 9114 section 4.4 has it for TCP.
func (f *flow) Refuse() error {
	f.finish(func() { f.reset(codeConnect) })
	return nil
}

// Close ends the stream; what the peer still says is of no use.
func (f *flow) Close() error {
	f.finish(func() {
		_ = f.q.Close() // fails when the peer was first
		f.q.CancelRead(quic.StreamErrorCode(codeNo))
	})
	return nil
}

func (f *flow) finish(how func()) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return
	}
	f.closed = true
	f.mu.Unlock()
	how()
	f.leave()
}
