package proxy

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/telemetry"
	"github.com/raceway-mesh/raceway/hbone"
)

const (
	// maxQueued and maxQueuedBytes bound what waits in a flow for its tunnel.
	maxQueued      = 128
	maxQueuedBytes = 256 << 10
	// firstQueued is how many of them travel with the request.
	firstQueued = 4

	portDNS = 53
)

// datagramFlow is one flow of UDP, in one tunnel. No goroutine is its own: one sends while
// something is queued, and what arrives is delivered by who received it.
type datagramFlow struct {
	u         *datagramPod
	ends      ends
	direction telemetry.Direction
	flow      *flow
	ctx       context.Context // of its set-up: policy, trust or the pod's end cut it. nil after it
	patience  time.Duration   // without a datagram
	last      atomic.Int64    // when the last one came, in nanoseconds since begin
	begin     time.Time

	mu      sync.Mutex
	queue   []queued
	size    int // bytes of queue
	stream  hbone.DatagramStream
	record  *telemetry.Conn // once it is open
	sending bool
	ended   bool
	expiry  *time.Timer
}

type queued struct {
	payload  []byte
	room     *datagramRoom // payload's, nil of one that has its own
	fragment bool
}

// datagramRoom holds a datagram of an Ethernet packet; maxQueued of them are less than maxQueuedBytes.
type datagramRoom [1536]byte

// hold copies payload.
func (u *datagramPod) hold(payload []byte, fragment bool) queued {
	if len(payload) > len(datagramRoom{}) {
		return queued{payload: bytes.Clone(payload), fragment: fragment}
	}
	room, _ := u.rooms.Get().(*datagramRoom)
	if room == nil {
		room = new(datagramRoom)
	}
	return queued{payload: append(room[:0], payload...), room: room, fragment: fragment}
}

// free gives the room of a datagram that was sent back.
func (u *datagramPod) free(q queued) {
	if q.room != nil {
		u.rooms.Put(q.room)
	}
}

// newFlow is not entered yet.
func (u *datagramPod) newFlow(e ends, d telemetry.Direction) *datagramFlow {
	f := &datagramFlow{u: u, ends: e, direction: d, flow: &flow{}, patience: u.s.cfg.DatagramIdle, begin: time.Now()}
	if e.port(d) == portDNS {
		f.patience = u.s.cfg.DNSIdle
	}
	f.ctx, f.flow.cancel = context.WithCancelCause(u.ctx)
	f.sending = true // once it is up
	return f
}

// port is the server's.
func (e ends) port(d telemetry.Direction) uint16 {
	if d == telemetry.Inbound {
		return e.app.Port()
	}
	return e.peer.Port()
}

// push queues a datagram of the application's. payload is the caller's again.
func (f *datagramFlow) push(payload []byte, fragment bool) {
	f.touch()
	f.mu.Lock()
	switch {
	case f.ended:
		f.mu.Unlock()
		f.u.drop(f.direction, dropRoute, 1)
		return
	case len(f.queue) >= maxQueued || f.size+len(payload) > maxQueuedBytes:
		f.mu.Unlock()
		f.u.drop(f.direction, dropQueue, 1)
		return
	}
	f.queue = append(f.queue, f.u.hold(payload, fragment))
	f.size += len(payload)
	start := !f.sending
	f.sending = true
	f.mu.Unlock()
	if start {
		f.u.spawn(f.send)
	}
}

func (f *datagramFlow) touch() { f.last.Store(int64(time.Since(f.begin))) }

// take empties the queue, and says that nobody sends any more when there is nothing.
func (f *datagramFlow) take() ([]queued, hbone.DatagramStream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	batch := f.queue
	f.queue, f.size = nil, 0
	if len(batch) == 0 || f.ended {
		f.sending = false
		batch = nil
	}
	return batch, f.stream
}

// send sends until the queue is empty.
func (f *datagramFlow) send() {
	for {
		batch, stream := f.take()
		if batch == nil {
			return
		}
		for _, q := range batch {
			err := f.sendOne(stream, q)
			f.u.free(q)
			if err != nil {
				f.end(err)
				break
			}
		}
	}
}

func (f *datagramFlow) sendOne(stream hbone.DatagramStream, q queued) error {
	err := stream.Send(q.payload, q.fragment)
	if err == nil {
		f.moved(len(q.payload), true)
		return nil
	}
	var large *hbone.TooLargeError // on the heap, so not where all is well
	if errors.As(err, &large) {
		f.u.drop(f.direction, dropTooBig, 1)
		return f.u.d.TooBig(f.ends.app, f.ends.peer, len(q.payload), large.Max)
	}
	return err
}

// moved counts a datagram: fromApp, or to it.
func (f *datagramFlow) moved(n int, fromApp bool) {
	f.u.s.cfg.Telemetry.DatagramMoved(f.direction)
	if fromApp == (f.direction == telemetry.Outbound) {
		f.record.Sent(n)
	} else {
		f.record.Received(n)
	}
}

// up is called once the tunnel is there: f is open, unless it has ended meanwhile. Then stream is
// closed.
func (f *datagramFlow) up(stream hbone.DatagramStream) bool {
	record := f.u.s.cfg.Telemetry.Open(*f.flow.attempt)
	f.u.s.settle(f.flow)
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		record.Close(telemetry.FlagsReset, errFlowEnded)
		_ = stream.Close()
		return false
	}
	f.stream, f.record = stream, record
	f.flow.attempt = nil // it keeps a snapshot
	f.expiry = time.AfterFunc(f.patience, f.expire)
	cut := f.u.s.carried(f.ctx, f.flow, f.end)
	f.ctx = nil
	f.mu.Unlock()
	stream.Deliver(f)
	if cut != nil {
		f.end(cut)
	}
	return true
}

var errFlowEnded = errors.New("the flow ended while it was set up")

// expire ends a flow that nobody uses. RFC 4787 REQ-5 is its measure.
func (f *datagramFlow) expire() {
	idle := time.Since(f.begin) - time.Duration(f.last.Load())
	if idle >= f.patience {
		f.end(nil)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.expiry.Reset(f.patience - idle)
	}
}

// Datagram implements hbone.DatagramSink.
func (f *datagramFlow) Datagram(p []byte) {
	f.touch()
	if err := f.u.d.Deliver(f.ends.peer, f.ends.app, p); err != nil {
		f.u.drop(f.direction, dropDeliver, 1)
		return
	}
	f.moved(len(p), false)
}

// End implements hbone.DatagramSink.
func (f *datagramFlow) End(err error) {
	if errors.Is(err, syscall.ECONNREFUSED) {
		_ = f.u.d.Refuse(f.ends.app, f.ends.peer) // or the application waits as if it were lost
	}
	f.end(err)
}

// refuse tells the peer that the application's port is closed.
func (f *datagramFlow) refuse() {
	f.mu.Lock()
	stream := f.stream
	f.mu.Unlock()
	if stream != nil && f.direction == telemetry.Inbound {
		_ = stream.Refuse() // or its sender waits as if it were lost
	}
	f.end(&appError{app: f.ends.app, err: syscall.ECONNREFUSED})
}

// retryPause is how long a flow that did not come up is not tried again. What is sent to it
// meanwhile is dropped.
const retryPause = time.Second

// fail is end for a flow that did not come up. The application's next datagrams do not begin
// another at once.
func (f *datagramFlow) fail() {
	f.mu.Lock()
	if f.ended { // while it was set up
		f.mu.Unlock()
		return
	}
	f.ended = true
	lost := len(f.queue)
	f.queue, f.size = nil, 0
	f.expiry = time.AfterFunc(retryPause, func() { f.u.leave(f) })
	f.mu.Unlock()
	f.u.drop(f.direction, dropRoute, uint64(lost))
}

// end ends f, for err or because it was idle; once.
func (f *datagramFlow) end(err error) {
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		return
	}
	f.ended = true
	stream, record, lost := f.stream, f.record, len(f.queue)
	f.queue, f.size = nil, 0
	if f.expiry != nil {
		f.expiry.Stop()
	}
	f.mu.Unlock()
	f.u.drop(f.direction, dropRoute, uint64(lost))
	if stream != nil {
		_ = stream.Close()
		drops := stream.Drops()
		f.u.drop(f.direction, dropSend, drops.SendFull+drops.ReceiveFull+drops.Foreign)
	}
	if record != nil {
		flags := telemetry.FlagsNone
		if err != nil {
			flags = endFlags(err)
		}
		record.Close(flags, err)
	}
	f.u.leave(f)
}

// firsts are the datagrams that travel with the request.
func (f *datagramFlow) firsts() (first [][]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := min(len(f.queue), firstQueued)
	for _, q := range f.queue[:n] {
		first = append(first, q.payload)
		f.size -= len(q.payload)
	}
	f.queue = append([]queued(nil), f.queue[n:]...)
	return first
}
