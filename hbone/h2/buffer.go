package h2

import "sync"

// chunkSize is how much of a DATA frame one chunk holds: the payload of a full TLS record.
const chunkSize = 16 << 10

// chunks and writeBuffers recycle memory between connections, so that an idle one holds
// none; sync.Pool is safe for that.
var (
	chunks       = sync.Pool{New: func() any { return new(chunk) }}
	writeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, writeBufferSize); return &b }}
)

// chunk holds received bytes data[r:w].
type chunk struct {
	r, w int
	data [chunkSize]byte
}

func getChunk() *chunk {
	c := chunks.Get().(*chunk)
	c.r, c.w = 0, 0
	return c
}

func (c *chunk) len() int { return c.w - c.r }

// buffer is a queue of received bytes. A small arrival is copied to the last chunk, so two
// neighbours together hold more than one chunk's worth, and a flood of tiny frames takes at
// most twice the memory of the window.
type buffer struct {
	queue []*chunk
	size  int
}

// push takes ownership of c.
func (b *buffer) push(c *chunk) {
	b.size += c.len()
	if n := len(b.queue); n > 0 {
		if last := b.queue[n-1]; chunkSize-last.w >= c.len() {
			last.w += copy(last.data[last.w:], c.data[c.r:c.w])
			chunks.Put(c)
			return
		}
	}
	b.queue = append(b.queue, c)
}

// pop gives the first chunk away, nil when there is none.
func (b *buffer) pop() *chunk {
	if len(b.queue) == 0 {
		return nil
	}
	c := b.queue[0]
	b.queue[0] = nil
	if b.queue = b.queue[1:]; len(b.queue) == 0 {
		b.queue = nil
	}
	b.size -= c.len()
	return c
}

// discard empties the buffer and returns how much it held.
func (b *buffer) discard() int {
	size := b.size
	for c := b.pop(); c != nil; c = b.pop() {
		chunks.Put(c)
	}
	return size
}
