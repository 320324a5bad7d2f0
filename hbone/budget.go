package hbone

import "errors"

// Budget is the memory that received and not yet read bytes of streams may hold. A transport
// reserves it before it lets a peer send, so that what a peer sends always has its place. It
// is safe for concurrent use, and its methods return at once.
type Budget interface {
	// Take reserves n bytes that a stream cannot be without; false refuses the stream.
	Take(n int) bool
	// Grow reserves n bytes with which a stream may be faster, unless fewer than spare would
	// be left to the growth of others. What Grow may use is less than what Take may, or
	// streams that have grown would keep new ones out.
	Grow(n, spare int) bool
	// Give returns n bytes of either.
	Give(n int)
	// Short is told when a stream was refused, or stays slower than it could be.
	Short()
}

// Unlimited is the Budget of those who set none.
type Unlimited struct{}

// Take, Grow, Give and Short are a Budget's.
func (Unlimited) Take(int) bool      { return true }
func (Unlimited) Grow(int, int) bool { return true }
func (Unlimited) Give(int)           {}
func (Unlimited) Short()             {}

// ErrNoBuffers is an Open that the Budget had no room for.
var ErrNoBuffers = errors.New("no memory left for received bytes: too many streams, or too many that are not read")
