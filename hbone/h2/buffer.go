package h2

import (
	"slices"
	"sync"
)

// Chunks come in three sizes, so that a small window costs little memory and a large one
// few chunks. The largest holds the payload of a full TLS record.
const (
	smallChunk  = 1 << 10
	mediumChunk = 4 << 10
	largeChunk  = 16 << 10
)

// chunks and records recycle memory between connections, so that an idle one holds
// none; sync.Pool is safe for that.
var (
	smallChunks  = sync.Pool{New: func() any { return &chunk{data: make([]byte, smallChunk)} }}
	mediumChunks = sync.Pool{New: func() any { return &chunk{data: make([]byte, mediumChunk)} }}
	largeChunks  = sync.Pool{New: func() any { return &chunk{data: make([]byte, largeChunk)} }}
	records      = sync.Pool{New: func() any { b := make([]byte, 0, maxRecord); return &b }}
)

// chunk holds received bytes data[r:w].
type chunk struct {
	r, w int
	data []byte
}

// getChunk returns an empty chunk for n bytes, or for as many of them as fit the largest.
func getChunk(n int) *chunk {
	c := chunksFor(n).Get().(*chunk)
	c.r, c.w = 0, 0
	return c
}

func putChunk(c *chunk) { chunksFor(len(c.data)).Put(c) }

func chunksFor(n int) *sync.Pool {
	switch {
	case n <= smallChunk:
		return &smallChunks
	case n <= mediumChunk:
		return &mediumChunks
	default:
		return &largeChunks
	}
}

func (c *chunk) len() int { return c.w - c.r }

// fill moves as much of from's bytes as fit to the end of c.
func (c *chunk) fill(from *chunk) {
	n := copy(c.data[c.w:], from.data[from.r:from.w])
	c.w += n
	from.r += n
}

// buffer is a queue of received bytes.
type buffer struct {
	queue []*chunk
	size  int // bytes
	held  int // memory
}

// push takes ownership of c. A small arrival is copied to the last chunk. So is a part of a
// larger one once more than spare bytes of memory are unused: what is held is at most the
// bytes, spare and one chunk, however the peer cuts its frames.
func (b *buffer) push(c *chunk, spare int) {
	unused := b.held - b.size
	b.size += c.len()
	if n := len(b.queue); n > 0 {
		last := b.queue[n-1]
		if room := len(last.data) - last.w; room >= c.len() || room > 0 && unused > spare {
			last.fill(c)
			if c.len() == 0 {
				putChunk(c)
				return
			}
			c.r, c.w = 0, copy(c.data, c.data[c.r:c.w]) // its end has room for what comes next
		}
	}
	b.held += len(c.data)
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
	b.held -= len(c.data)
	return c
}

// unpop puts back what pop gave and what is left of it.
func (b *buffer) unpop(c *chunk) {
	b.queue = slices.Insert(b.queue, 0, c)
	b.size += c.len()
	b.held += len(c.data)
}

// discard empties the buffer.
func (b *buffer) discard() {
	for c := b.pop(); c != nil; c = b.pop() {
		putChunk(c)
	}
}
