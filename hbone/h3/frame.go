package h3

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/quic-go/qpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// Types of frames (RFC 9114 section 7.2) and of unidirectional streams (section 6.2).
const (
	frameData       = 0x00
	frameHeaders    = 0x01
	frameCancelPush = 0x03
	frameSettings   = 0x04
	frameGoAway     = 0x07
	frameMaxPush    = 0x0d

	streamControl      = 0x00
	streamPush         = 0x01
	streamQPACKEncoder = 0x02
	streamQPACKDecoder = 0x03
)

// Settings (RFC 9114 section 7.2.4.1, RFC 9220 section 3, RFC 9297 section 2.1.1).
const (
	settingMaxFieldSection = 0x06
	settingConnectProtocol = 0x08
	settingDatagrams       = 0x33
)

// maxFrame bounds frames of the control stream, and those of unknown types that are skipped on
// the way to a header.
const maxFrame = 16 << 10

// inputSize is how much a stream hands on at a time.
const inputSize = 64 << 10

var inputs = sync.Pool{New: func() any { return new([inputSize]byte) }}

// source is what an input reads: a quic.Stream or a quic.ReceiveStream.
type source interface {
	io.Reader
	Peek(b []byte) (int, error)
}

// input is what was received of a stream and not parsed yet. One goroutine uses it; while it
// waits it holds no memory.
type input struct {
	from source
	buf  *[inputSize]byte // nil when empty
	r, w int
	peek [1]byte
}

// next gives 1 to n bytes, which are good until the next call, and waits if there are none.
func (in *input) next(n uint64) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	b := in.buf[in.r : in.r+int(min(n, uint64(in.w-in.r)))]
	in.r += len(b)
	return b, nil
}

func (in *input) fill() error {
	in.release()
	if _, err := in.from.Peek(in.peek[:]); err != nil {
		return err
	}
	in.buf = inputs.Get().(*[inputSize]byte)
	n, err := in.from.Read(in.buf[:])
	in.r, in.w = 0, n
	if n > 0 {
		return nil // an error comes again
	}
	in.release()
	return err
}

// release gives the memory back, and what it holds up.
func (in *input) release() {
	if in.buf != nil {
		inputs.Put(in.buf)
		in.buf = nil
	}
	in.r, in.w = 0, 0
}

// varint reads one. io.EOF is an end before its first byte.
func (in *input) varint() (uint64, error) {
	b, err := in.next(1)
	if err != nil {
		return 0, err
	}
	var text [8]byte
	n := copy(text[:], b)
	for want := 1 << (text[0] >> 6); n < want; {
		b, err := in.next(uint64(want - n))
		if err != nil {
			return 0, cut(err)
		}
		n += copy(text[n:], b)
	}
	v, _ := hbone.ParseVarint(text[:n])
	return v, nil
}

// cut is err where an end is one too early.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return errTruncated
	}
	return err
}

// header reads a frame's type and length. io.EOF is an end before it.
func (in *input) header() (kind, length uint64, err error) {
	if kind, err = in.varint(); err != nil {
		return 0, 0, err
	}
	length, err = in.varint()
	return kind, length, cut(err)
}

// body reads length bytes.
func (in *input) body(length uint64) ([]byte, error) {
	body := make([]byte, 0, min(length, 4<<10))
	for uint64(len(body)) < length {
		b, err := in.next(length - uint64(len(body)))
		if err != nil {
			return nil, cut(err)
		}
		body = append(body, b...)
	}
	return body, nil
}

func (in *input) skip(length uint64) error {
	for length > 0 {
		b, err := in.next(length)
		if err != nil {
			return cut(err)
		}
		length -= uint64(len(b))
	}
	return nil
}

// known reports whether RFC 9114 knows a frame's type, or HTTP/2 did (section 11.2.1): such a
// frame in the wrong place ends the connection, where any other is skipped.
func known(kind uint64) bool { return kind <= 0x09 || kind == frameMaxPush }

// headers reads on to a message's HEADERS frame and decodes it; more than limit bytes, counted
// as RFC 9114 section 4.2.2 counts, are errTooLarge.
func (in *input) headers(limit int) ([]qpack.HeaderField, error) {
	skipped := uint64(0)
	for {
		kind, length, err := in.header()
		switch {
		case err != nil:
			return nil, cut(err)
		case kind == frameHeaders && length > uint64(limit):
			return nil, errTooLarge
		case kind == frameHeaders:
			block, err := in.body(length)
			if err != nil {
				return nil, err
			}
			return decodeFields(block, limit)
		case known(kind):
			return nil, &connError{codeUnexpected, fmt.Sprintf("frame of type %#x in front of a header", kind)}
		}
		if skipped += length; skipped > maxFrame {
			return nil, &streamError{codeLoad, "too much in front of a header"}
		}
		if err := in.skip(length); err != nil {
			return nil, err
		}
	}
}

var errTooLarge = errors.New("header is too large")

// decodeFields decodes a field section. Our settings allow no dynamic table.
func decodeFields(block []byte, limit int) ([]qpack.HeaderField, error) {
	var fields []qpack.HeaderField
	size := 0
	for decode := qpack.NewDecoder().Decode(block); ; {
		f, err := decode()
		switch {
		case errors.Is(err, io.EOF):
			return fields, nil
		case err != nil:
			return nil, &connError{codeQPACK, err.Error()}
		}
		if size += len(f.Name) + len(f.Value) + 32; size > limit {
			return nil, errTooLarge
		}
		fields = append(fields, f)
	}
}

// headersFrame is a HEADERS frame.
func headersFrame(fields []qpack.HeaderField) []byte {
	var block bytes.Buffer
	encoder := qpack.NewEncoder(&block)
	for _, f := range fields {
		_ = encoder.WriteField(f) // to a bytes.Buffer
	}
	_ = encoder.Close()
	b := hbone.AppendVarint(nil, frameHeaders)
	b = hbone.AppendVarint(b, uint64(block.Len()))
	return append(b, block.Bytes()...)
}

// fieldsSize is a field section's size as RFC 9114 section 4.2.2 counts.
func fieldsSize(fields []qpack.HeaderField) uint64 {
	var size uint64
	for _, f := range fields {
		size += uint64(len(f.Name) + len(f.Value) + 32)
	}
	return size
}

// appendDataHeader appends that of a DATA frame of n bytes.
func appendDataHeader(b []byte, n int) []byte {
	return hbone.AppendVarint(hbone.AppendVarint(b, frameData), uint64(n))
}

// settings is what a SETTINGS frame says to us.
type settings struct {
	maxFieldSection uint64 // 0: no bound
	connectProtocol bool
	datagrams       bool
}

// appendSettings appends a SETTINGS frame.
func appendSettings(b []byte, s settings) []byte {
	var body []byte
	set := func(id, value uint64) { body = hbone.AppendVarint(hbone.AppendVarint(body, id), value) }
	set(settingMaxFieldSection, s.maxFieldSection)
	set(settingDatagrams, 1)
	if s.connectProtocol {
		set(settingConnectProtocol, 1)
	}
	b = hbone.AppendVarint(b, frameSettings)
	b = hbone.AppendVarint(b, uint64(len(body)))
	return append(b, body...)
}

// parseSettings reads the body of a SETTINGS frame (RFC 9114 section 7.2.4).
func parseSettings(body []byte) (settings, error) {
	var s settings
	seen := make(map[uint64]bool)
	for len(body) > 0 {
		id, n := hbone.ParseVarint(body)
		value, m := hbone.ParseVarint(body[n:])
		if n == 0 || m == 0 {
			return s, &connError{codeFrame, "SETTINGS are cut short"}
		}
		body = body[n+m:]
		switch {
		case seen[id]:
			return s, &connError{codeSettings, fmt.Sprintf("setting %#x twice", id)}
		case len(seen) > 100:
			return s, &connError{codeLoad, "more than 100 settings"}
		}
		seen[id] = true
		switch id {
		case 0x00, 0x02, 0x03, 0x04, 0x05: // HTTP/2's
			return s, &connError{codeSettings, fmt.Sprintf("setting %#x is HTTP/2's", id)}
		case settingMaxFieldSection:
			s.maxFieldSection = value
		case settingConnectProtocol, settingDatagrams:
			if value > 1 {
				return s, &connError{codeSettings, fmt.Sprintf("setting %#x is %d", id, value)}
			}
			if id == settingDatagrams {
				s.datagrams = value == 1
			} else {
				s.connectProtocol = value == 1
			}
		}
	}
	return s, nil
}
