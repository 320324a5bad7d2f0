package proxy

import (
	"sync"

	"github.com/raceway-mesh/raceway/hbone"
)

// Buffer sizes. A direction without traffic holds none where it can wait for its socket to
// be readable, and a small one where it cannot (a stream). Bulk takes large ones.
const (
	smallBuffer = 4 << 10
	largeBuffer = 128<<10 - 9 // with the header of a DATA frame it fills eight TLS records
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

func (b *buffers) reserve() bool { return b.below(largeBuffer, b.pod.limit, b.node.limit) }

// below takes n bytes of both budgets up to bounds that are theirs or lower.
func (b *buffers) below(n, pod, node int64) bool {
	if !b.pod.takeBelow(n, pod) {
		return false
	}
	if !b.node.takeBelow(n, node) {
		b.pod.give(n)
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

// windows lends the same budget to the pod's tunnels, for what they receive.
type windows struct{ *buffers }

var _ hbone.Budget = windows{}

// Take is for a stream's first bytes.
func (w windows) Take(n int) bool { return w.below(int64(n), w.pod.limit, w.node.limit) }

// Grow leaves half of each budget to copy buffers and to new streams, of other pods too.
func (w windows) Grow(n, spare int) bool {
	left := int64(spare)
	return w.below(int64(n), w.pod.limit/2-left, w.node.limit/2-left)
}

func (w windows) Give(n int) {
	w.pod.give(int64(n))
	w.node.give(int64(n))
}

// Short counts as the limit that bites.
func (w windows) Short() { w.exhausted() }
