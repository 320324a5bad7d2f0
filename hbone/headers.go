package hbone

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// MaxHeaderList is the largest request header list that a server takes, and
// MaxResponseHeaderList the largest response header list that a client takes, each counted
// as RFC 9113 section 6.5.2 counts.
const (
	MaxHeaderList         = 64 << 10
	MaxResponseHeaderList = 16 << 10

	maxPath = 128 // of Response.Path, in bytes
)

// Names of the header fields that HBONE knows.
const (
	headerBaggage     = "baggage"
	headerPath        = "raceway-path"
	headerForwarded   = "forwarded"
	headerTraceParent = "traceparent"
)

// Fields calls emit with each regular header field of r, names in lower case, in a fixed
// order.
func (r *Request) Fields(emit func(name, value string)) {
	if v := r.Baggage.String(); v != "" {
		emit(headerBaggage, v)
	}
	if v := r.Forwarded.String(); v != "" {
		emit(headerForwarded, v)
	}
	if r.TraceParent != "" {
		emit(headerTraceParent, r.TraceParent)
	}
}

// IsUnique reports whether a field's value is another in each request, so that a table of those
// that were sent (HPACK) has no use for it, and would lose the others to make room.
func IsUnique(name string) bool { return name == headerForwarded || name == headerTraceParent }

// ConnectFields calls emit with all header fields of a CONNECT for r on a connection with peer. For
// TCP there is no :scheme and no :path (RFC 9113 section 8.5, RFC 9114 section 4.4), for UDP there
// are both, and the target is in the path (RFC 9298 section 3.4).
func (r *Request) ConnectFields(protocol Protocol, peer netip.AddrPort, emit func(name, value string)) error {
	emit(":method", "CONNECT")
	if protocol == UDP {
		target, err := ParseAuthority(r.Authority)
		if err != nil {
			return err
		}
		emit(":protocol", ConnectUDP)
		emit(":scheme", "https")
		emit(":authority", peer.String())
		emit(":path", UDPPath(target))
		emit(CapsuleProtocol, CapsuleProtocolOn)
	} else {
		emit(":authority", r.Authority)
	}
	r.Fields(emit)
	return nil
}

// SetField takes a header field that arrived, its name in lower case. A field that it does
// not know, or that does not parse, changes nothing: none of them is required, and none
// decides anything. Of a repeated field the first that parses counts.
func (r *Request) SetField(name, value string) {
	switch name {
	case headerBaggage:
		if r.Baggage == (Baggage{}) {
			if b, err := ParseBaggage(value); err == nil {
				r.Baggage = b
			}
		}
	case headerForwarded:
		if r.Forwarded == (Forwarded{}) {
			if f, err := ParseForwarded(value); err == nil {
				r.Forwarded = f
			}
		}
	case headerTraceParent:
		if r.TraceParent == "" && CheckTraceParent(value) == nil {
			r.TraceParent = value
		}
	}
}

// Validate reports what of r cannot be put into a request.
func (r *Request) Validate() error {
	_, err := ParseAuthority(r.Authority)
	if r.TraceParent != "" {
		err = errors.Join(err, CheckTraceParent(r.TraceParent))
	}
	if h := r.Forwarded.Host; h != "" {
		err = errors.Join(err, checkForwardedHost(h))
	}
	return err
}

// Fields calls emit with each regular header field of r.
func (r *Response) Fields(emit func(name, value string)) {
	if v := r.Baggage.String(); v != "" {
		emit(headerBaggage, v)
	}
	if r.Path != "" {
		emit(headerPath, r.Path)
	}
}

// SetField takes a header field that arrived, as Request.SetField does.
func (r *Response) SetField(name, value string) {
	switch {
	case name == headerPath && len(value) <= maxPath:
		r.Path = value
	case name == headerBaggage && r.Baggage == (Baggage{}):
		if b, err := ParseBaggage(value); err == nil {
			r.Baggage = b
		}
	}
}

// traceParentLength is that of version 00 (W3C Trace Context, section 3.2):
// 00-<trace id, 32>-<parent id, 16>-<flags, 2>.
const traceParentLength = 55

// CheckTraceParent reports what is wrong with a traceparent. A later version than 00 may
// carry more after the known fields (section 4.3), up to 512 bytes.
func CheckTraceParent(s string) error {
	if len(s) < traceParentLength || len(s) > 512 {
		return fmt.Errorf("traceparent has %d bytes", len(s))
	}
	version, trace, parent, flags := s[:2], s[3:35], s[36:52], s[53:55]
	if s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return errors.New("traceparent is not version-trace-parent-flags")
	}
	for _, part := range []string{version, trace, parent, flags} {
		if !isLowerHex(part) {
			return fmt.Errorf("traceparent has %q where lower-case hexadecimal belongs", part)
		}
	}
	switch {
	case version == "ff":
		return errors.New("traceparent has the forbidden version ff")
	case strings.Trim(trace, "0") == "", strings.Trim(parent, "0") == "":
		return errors.New("traceparent has an id of zeros")
	case len(s) == traceParentLength:
		return nil
	case version == "00" || s[traceParentLength] != '-':
		return errors.New("traceparent has more than its version allows")
	}
	for i := traceParentLength; i < len(s); i++ {
		if c := s[i]; !isAlnum(c) && c != '-' && c != '_' {
			return fmt.Errorf("traceparent has the character %q", s[i])
		}
	}
	return nil
}

func isLowerHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// NewTraceParent starts a trace that is not sampled.
func NewTraceParent() string {
	var id [24]byte
	for {
		rand.Read(id[:]) // never returns an error (Go 1.24)
		text := []byte("00-01234567890123456789012345678901-0123456789012345-00")
		hex.Encode(text[3:], id[:16])
		hex.Encode(text[36:], id[16:])
		if tp := string(text); CheckTraceParent(tp) == nil {
			return tp
		}
	}
}
