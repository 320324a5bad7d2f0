package h2

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func TestBufferHoldsLittleMoreThanItsBytesHoweverTheyArrive(t *testing.T) {
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 1))
		largest := []int{smallChunk, mediumChunk, largeChunk}[random.IntN(3)]
		spare := random.IntN(3) * largest
		var b buffer
		var sent, got []byte
		for range 2000 {
			if random.IntN(3) == 0 {
				if c := b.pop(); c != nil {
					got = append(got, c.data[c.r:c.w]...)
					putChunk(c)
				}
			}
			n := 1 + random.IntN(1+random.IntN(largest))
			c := getChunk(n)
			for i := range n {
				c.data[i] = byte(random.Uint32())
			}
			c.w = n
			sent = append(sent, c.data[:n]...)
			b.push(c, spare)
			held := 0
			for _, c := range b.queue {
				held += len(c.data)
			}
			if held != b.held || held > b.size+spare+largest {
				t.Fatalf("%d bytes are in %d of memory, counted as %d; want at most %d more and a chunk of %d", b.size, held, b.held, spare, largest)
			}
		}
		for c := b.pop(); c != nil; c = b.pop() {
			got = append(got, c.data[c.r:c.w]...)
			putChunk(c)
		}
		if b.size != 0 || b.held != 0 || !bytes.Equal(sent, got) {
			t.Fatalf("%d bytes went in, %d came out; %d and %d are left", len(sent), len(got), b.size, b.held)
		}
	}
}
