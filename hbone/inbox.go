package hbone

import (
	"bytes"
	"sync"
)

// What an Inbox keeps before it has a sink.
const (
	maxWaiting     = 16
	maxWaitingSize = 128 << 10
)

// Inbox is the receiving side of a DatagramStream, for transports: it keeps a few datagrams until
// Deliver, and lets one goroutine at a time call the sink. The zero value is empty.
type Inbox struct {
	mu      sync.Mutex // held while the sink is called
	sink    DatagramSink
	waiting [][]byte
	size    int // of waiting, in bytes
	over    bool
	err     error // after over

	state  sync.Mutex // never held while the sink is called
	closed bool
	full   uint64
}

// Arrived hands p on, or keeps a copy.
func (i *Inbox) Arrived(p []byte) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.over:
	case i.sink != nil:
		if !i.Closed() {
			i.sink.Datagram(p)
		}
	case len(i.waiting) == maxWaiting || i.size+len(p) > maxWaitingSize:
		i.state.Lock()
		i.full++
		i.state.Unlock()
	default:
		i.waiting = append(i.waiting, bytes.Clone(p))
		i.size += len(p)
	}
}

// End tells the sink, once, that nothing comes any more: of two ends the first counts.
func (i *Inbox) End(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.over {
		return
	}
	i.over, i.err = true, err
	if i.sink != nil && !i.Closed() {
		i.sink.End(err)
	}
}

// Deliver hands over what waits, and then what arrives.
func (i *Inbox) Deliver(sink DatagramSink) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, p := range i.waiting {
		sink.Datagram(p)
	}
	i.waiting, i.size = nil, 0
	i.sink = sink
	if i.over && !i.Closed() {
		sink.End(i.err)
	}
}

// Delivered reports whether there is a sink.
func (i *Inbox) Delivered() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.sink != nil
}

// Close has the sink called no more, and reports whether it is the first. It does not wait for a
// call that runs.
func (i *Inbox) Close() bool {
	i.state.Lock()
	defer i.state.Unlock()
	first := !i.closed
	i.closed = true
	return first
}

// Closed reports whether Close was called.
func (i *Inbox) Closed() bool {
	i.state.Lock()
	defer i.state.Unlock()
	return i.closed
}

// Full is how many datagrams were dropped because enough waited.
func (i *Inbox) Full() uint64 {
	i.state.Lock()
	defer i.state.Unlock()
	return i.full
}
