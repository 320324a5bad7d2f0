package hbone_test

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
)

func TestVarint(t *testing.T) {
	// The examples of RFC 9000 appendix A.1, and each form's ends.
	for v, want := range map[uint64][]byte{
		0: {0}, 37: {0x25}, 63: {0x3f}, 64: {0x40, 0x40}, 15293: {0x7b, 0xbd}, 16383: {0x7f, 0xff},
		16384: {0x80, 0, 0x40, 0}, 494878333: {0x9d, 0x7f, 0x3e, 0x7d},
		1 << 30: {0xc0, 0, 0, 0, 0x40, 0, 0, 0}, 151288809941952652: {0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c},
		1<<62 - 1: bytes.Repeat([]byte{0xff}, 8),
	} {
		if got := hbone.AppendVarint(nil, v); !bytes.Equal(got, want) {
			t.Errorf("AppendVarint(%d) = %x, want %x", v, got, want)
		}
		if got, n := hbone.ParseVarint(want); got != v || n != len(want) {
			t.Errorf("ParseVarint(%x) = %d, %d; want %d, %d", want, got, n, v, len(want))
		}
		if _, n := hbone.ParseVarint(want[:len(want)-1]); n != 0 {
			t.Errorf("a varint that is cut short has %d bytes", n)
		}
	}
	if v, n := hbone.ParseVarint([]byte{0x40, 0x25}); v != 37 || n != 2 {
		t.Errorf("a longer form than needed is %d, %d; want 37, 2", v, n)
	}
}

func TestParseDatagram(t *testing.T) {
	for name, test := range map[string]struct {
		in   []byte
		want []byte
		err  error
	}{
		"payload":            {in: hbone.AppendDatagram(nil, []byte("x")), want: []byte("x")},
		"empty payload":      {in: []byte{0}, want: []byte{}},
		"context 0, long":    {in: []byte{0x40, 0, 'x'}, want: []byte("x")},
		"nothing":            {in: nil, err: hbone.ErrDatagram},
		"half a context":     {in: []byte{0x40}, err: hbone.ErrDatagram},
		"foreign context":    {in: []byte{2, 'x'}, err: hbone.ErrForeignContext},
		"longest payload":    {in: make([]byte, 1+hbone.MaxDatagram), want: make([]byte, hbone.MaxDatagram)},
		"longer than may be": {in: make([]byte, 2+hbone.MaxDatagram), err: hbone.ErrDatagram},
	} {
		got, err := hbone.ParseDatagram(test.in)
		if !errors.Is(err, test.err) || err == nil && !bytes.Equal(got, test.want) {
			t.Errorf("%s: %d bytes, %v; want %d, %v", name, len(got), err, len(test.want), test.err)
		}
	}
}

// capsule is one of any type.
func capsule(kind uint64, value []byte) []byte {
	return append(hbone.AppendVarint(hbone.AppendVarint(nil, kind), uint64(len(value))), value...)
}

// feed gives stream to a new Capsules in parts of size bytes.
func feed(stream []byte, size int) (got [][]byte, c *hbone.Capsules, err error) {
	c = &hbone.Capsules{}
	for part := range slices.Chunk(stream, size) {
		part = bytes.Clone(part) // what is kept beyond the call would be seen to change
		err = c.Feed(part, func(p []byte) { got = append(got, bytes.Clone(p)) })
		for i := range part {
			part[i] = 0xaa
		}
		if err != nil {
			return got, c, err
		}
	}
	return got, c, c.End()
}

func TestCapsulesInAnyParts(t *testing.T) {
	want := [][]byte{[]byte("one"), {}, bytes.Repeat([]byte("x"), 3000), []byte("last")}
	var stream []byte
	for i, p := range want {
		stream = hbone.AppendCapsule(stream, p)
		stream = append(stream, capsule(uint64(0x29+i<<20), bytes.Repeat([]byte{0}, i*100))...) // unknown ones
	}
	stream = append(stream, capsule(0, []byte{4, 'f'})...) // another context
	for _, size := range []int{1, 2, 3, 7, 100, 1000, len(stream)} {
		got, c, err := feed(stream, size)
		if err != nil || !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("in parts of %d: %d datagrams, %v; want %d", size, len(got), err, len(want))
		}
		if c.Foreign != 1 {
			t.Errorf("in parts of %d: %d foreign datagrams, want 1", size, c.Foreign)
		}
	}
	for _, cut := range []int{1, 3, len(stream) - 1} {
		if _, _, err := feed(stream[:cut], 2); !errors.Is(err, hbone.ErrDatagram) {
			t.Errorf("a stream that ends after %d bytes, within a capsule: %v", cut, err)
		}
	}
}

func TestCapsulesThatAreMalformed(t *testing.T) {
	for name, stream := range map[string][]byte{
		"no context":         capsule(0, nil),
		"half a context":     capsule(0, []byte{0x80, 0}),
		"a payload too long": capsule(0, make([]byte, 2+hbone.MaxDatagram)),
		"a length too long":  hbone.AppendVarint([]byte{0}, math.MaxUint32),
	} {
		for _, size := range []int{1, len(stream)} {
			if got, _, err := feed(stream, size); !errors.Is(err, hbone.ErrDatagram) {
				t.Errorf("%s, in parts of %d: %d datagrams, %v; want ErrDatagram", name, size, len(got), err)
			}
		}
	}
}

func FuzzCapsules(f *testing.F) {
	f.Add(hbone.AppendCapsule(nil, []byte("payload")), 3)
	f.Add(append(capsule(0x1f, []byte("skipped")), hbone.AppendCapsule(nil, nil)...), 1)
	f.Add(capsule(0, []byte{0x40}), 2)
	f.Add([]byte{0xc0, 0, 0, 0, 0, 0, 0, 0, 0xc0, 0, 0, 0, 0, 0, 0, 1, 0}, 5)
	f.Fuzz(func(t *testing.T, stream []byte, size int) {
		if size <= 0 || len(stream) == 0 {
			return
		}
		whole, _, wholeErr := feed(stream, len(stream))
		parts, c, err := feed(stream, size)
		if (err == nil) != (wholeErr == nil) || !slices.EqualFunc(whole, parts, bytes.Equal) {
			t.Fatalf("in one piece %d datagrams, %v; in parts of %d %d, %v", len(whole), wholeErr, size, len(parts), err)
		}
		if err != nil {
			return
		}
		// What was found encodes to a stream that says the same.
		var again []byte
		for _, p := range parts {
			again = hbone.AppendCapsule(again, p)
		}
		if len(again) > 0 {
			if got, _, err := feed(again, size); err != nil || !slices.EqualFunc(got, parts, bytes.Equal) {
				t.Fatalf("%d datagrams became %d, %v", len(parts), len(got), err)
			}
		}
		if len(again) > len(stream) || c.Foreign > uint64(len(stream)) {
			t.Fatalf("%d bytes of capsules out of %d", len(again), len(stream))
		}
	})
}

func FuzzParseDatagram(f *testing.F) {
	f.Add([]byte{0, 'x'})
	f.Add([]byte{0x40, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := hbone.ParseDatagram(b)
		if err != nil {
			if errors.Is(err, hbone.ErrForeignContext) == errors.Is(err, hbone.ErrDatagram) {
				t.Fatalf("%x: %v", b, err)
			}
			return
		}
		if again, err := hbone.ParseDatagram(hbone.AppendDatagram(nil, p)); err != nil || !bytes.Equal(again, p) {
			t.Fatalf("%x parsed to %x, which became %x, %v", b, p, again, err)
		}
	})
}
