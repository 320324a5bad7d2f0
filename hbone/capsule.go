package hbone

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// capsuleDatagram is the type of a DATAGRAM capsule (RFC 9297 section 3.5).
const capsuleDatagram = 0x00

// contextUDP is the context of UDP payloads (RFC 9298 section 4).
const contextUDP = 0x00

// CapsuleOverhead is how much longer than its payload AppendCapsule's result is at the most:
// type, length and context.
const CapsuleOverhead = 1 + 4 + 1

// maxVarint is the longest variable-length integer (RFC 9000 section 16).
const maxVarint = 8

var (
	// ErrDatagram is a peer's datagram or capsule that breaks RFC 9297 or RFC 9298; its
	// stream is to be reset.
	ErrDatagram = errors.New("malformed datagram")
	// ErrForeignContext is a datagram of a context that was not agreed on, which is dropped.
	ErrForeignContext = errors.New("datagram of a foreign context")

	errNoContext = fmt.Errorf("%w: it has no context", ErrDatagram)
)

// AppendDatagram appends an HTTP Datagram's payload: the context of UDP, and p (RFC 9298
// section 5).
func AppendDatagram(b, p []byte) []byte { return append(append(b, contextUDP), p...) }

// ParseDatagram is the UDP payload of an HTTP Datagram's payload b, of which it is a part.
// Its error is ErrForeignContext or wraps ErrDatagram.
func ParseDatagram(b []byte) ([]byte, error) {
	context, n := ParseVarint(b)
	switch {
	case n == 0:
		return nil, errNoContext
	case context != contextUDP:
		return nil, ErrForeignContext
	case len(b)-n > MaxDatagram:
		return nil, fmt.Errorf("%w: UDP payload of %d bytes", ErrDatagram, len(b)-n)
	}
	return b[n:], nil
}

// AppendCapsule appends a DATAGRAM capsule with UDP payload p (RFC 9297 section 3.5).
func AppendCapsule(b, p []byte) []byte {
	b = AppendVarint(b, capsuleDatagram)
	b = AppendVarint(b, uint64(1+len(p)))
	return AppendDatagram(b, p)
}

// Capsules finds the datagrams in a stream of capsules (RFC 9297 section 3.2) as its bytes
// arrive. The zero value is at the stream's beginning.
//
//	type ─► length ─┬─► DATAGRAM: value ─► context 0 ─► UDP payload
//	                └─► any other: skipped
type Capsules struct {
	head   []byte // of a type and length that have come in part
	inside bool   // within a capsule's value
	skip   bool   // which is of no use to us
	left   uint64 // how much of it is to come
	value  []byte // of a DATAGRAM capsule that has come in part

	// Foreign counts the datagrams of contexts that were not agreed on.
	Foreign uint64
}

// Feed takes p, the next bytes of the stream, and calls emit with each UDP payload that it
// completes. A payload is good until emit returns. An error is for good and wraps ErrDatagram.
func (c *Capsules) Feed(p []byte, emit func(payload []byte)) error {
	for len(p) > 0 {
		if !c.inside {
			n, err := c.begin(p)
			if err != nil {
				return err
			}
			p = p[n:]
		}
		if c.inside {
			n := min(c.left, uint64(len(p)))
			if err := c.take(p[:n], emit); err != nil {
				return err
			}
			p = p[n:]
		}
	}
	return nil
}

// begin reads a capsule's type and length, and returns how much of p that took.
func (c *Capsules) begin(p []byte) (int, error) {
	had := len(c.head)
	head := append(c.head, p[:min(len(p), 2*maxVarint-had)]...)
	kind, n := ParseVarint(head)
	length, m := ParseVarint(head[n:])
	if n == 0 || m == 0 {
		c.head = head
		return len(head) - had, nil
	}
	c.head = nil
	if kind == capsuleDatagram && length > maxVarint+MaxDatagram {
		return 0, fmt.Errorf("%w: capsule of %d bytes", ErrDatagram, length)
	}
	if kind == capsuleDatagram && length == 0 {
		return 0, errNoContext
	}
	c.inside, c.skip, c.left = length > 0, kind != capsuleDatagram, length
	return n + m - had, nil
}

// take takes bytes of a value.
func (c *Capsules) take(part []byte, emit func([]byte)) error {
	c.left -= uint64(len(part))
	c.inside = c.left > 0
	if c.skip {
		return nil
	}
	if c.inside || len(c.value) > 0 {
		c.value = append(c.value, part...)
		part = c.value
	}
	if c.inside {
		return nil
	}
	c.value = nil
	payload, err := ParseDatagram(part)
	switch {
	case errors.Is(err, ErrForeignContext):
		c.Foreign++
		return nil
	case err != nil:
		return err
	}
	emit(payload)
	return nil
}

// End is called at the stream's clean end: a capsule that was cut short is an error.
func (c *Capsules) End() error {
	if len(c.head) > 0 || c.inside {
		return fmt.Errorf("%w: the stream ends within a capsule", ErrDatagram)
	}
	return nil
}

// AppendVarint appends v, which is below 1<<62, in the shortest form (RFC 9000 section 16).
func AppendVarint(b []byte, v uint64) []byte {
	switch n := bits.Len64(v); {
	case n <= 6:
		return append(b, byte(v))
	case n <= 14:
		return binary.BigEndian.AppendUint16(b, uint16(v)|1<<14)
	case n <= 30:
		return binary.BigEndian.AppendUint32(b, uint32(v)|2<<30)
	default:
		return binary.BigEndian.AppendUint64(b, v|3<<62)
	}
}

// ParseVarint reads a variable-length integer from the beginning of b, and returns its length:
// 0 when b is too short for it.
func ParseVarint(b []byte) (v uint64, n int) {
	if len(b) == 0 {
		return 0, 0
	}
	if n = 1 << (b[0] >> 6); len(b) < n {
		return 0, 0
	}
	v = uint64(b[0] & 0x3f)
	for _, c := range b[1:n] {
		v = v<<8 | uint64(c)
	}
	return v, n
}
