package proxy

import "sync"

// Buffer sizes. A direction without traffic holds none where it can wait for its socket to
// be readable, and a small one where it cannot (a stream). Bulk takes large ones.
const (
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
)

// buffers lends copy buffers within a pod's and the node's budget.
type buffers struct {
	pod, node *budget
	// exhausted is told when the budget is used up.
	exhausted func()
}

// recycled buffers are shared by all proxies of the process, as sync.Pool allows.
var (
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

// buffer is a borrowed buffer; give returns it.
type buffer struct {
	p     []byte
	small *[smallBuffer]byte
	large *[largeBuffer]byte
}

// take lends a large buffer if it is wanted and the budget allows, else a small one.
func (b *buffers) take(large bool) buffer {
	if large {
		if b.reserve() {
			p := largeBuffers.Get().(*[largeBuffer]byte)
			return buffer{p: p[:], large: p}
		}
		b.exhausted()
	}
	p := smallBuffers.Get().(*[smallBuffer]byte)
	return buffer{p: p[:], small: p}
}

func (b *buffers) reserve() bool {
	if !b.pod.take(largeBuffer) {
		return false
	}
	if !b.node.take(largeBuffer) {
		b.pod.give(largeBuffer)
		return false
	}
	return true
}

func (b *buffers) give(buf buffer) {
	if buf.large == nil {
		smallBuffers.Put(buf.small)
		return
	}
	largeBuffers.Put(buf.large)
	b.pod.give(largeBuffer)
	b.node.give(largeBuffer)
}
