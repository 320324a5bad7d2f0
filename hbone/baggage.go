package hbone

import (
	"fmt"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"
)

// Bounds of a baggage header (W3C Baggage, section 3.3.2, asks for at least as much), and
// of one decoded value: names in Kubernetes have at most 253 bytes.
const (
	maxBaggage        = 8 << 10
	maxBaggageMembers = 180
	maxBaggageValue   = 256
)

// Of many requests in a row most have the same baggage. What was last read, and last written, is kept.
var lastRead, lastWritten atomic.Pointer[baggageText]

// baggageText is a Baggage and what it is in a header.
type baggageText struct {
	baggage Baggage
	text    string
}

// ParseBaggage reads a baggage header. Keys that it does not know are skipped, of a
// repeated key the first counts, properties are dropped. A value is percent-decoded and
// must then be printable UTF-8 of at most 256 bytes, fit for a log or a metric.
func ParseBaggage(s string) (Baggage, error) {
	if last := lastRead.Load(); last != nil && last.text == s {
		return last.baggage, nil
	}
	b, err := parseBaggage(s)
	if err == nil {
		lastRead.Store(&baggageText{b, s})
	}
	return b, err
}

func parseBaggage(s string) (Baggage, error) {
	if len(s) > maxBaggage {
		return Baggage{}, fmt.Errorf("baggage of %d bytes is longer than %d", len(s), maxBaggage)
	}
	var b Baggage
	n := 0
	for member := range strings.SplitSeq(s, ",") {
		if n++; n > maxBaggageMembers {
			return Baggage{}, fmt.Errorf("baggage has more than %d members", maxBaggageMembers)
		}
		member, _, _ = strings.Cut(member, ";")
		key, value, ok := strings.Cut(member, "=")
		key, value = trimOWS(key), trimOWS(value)
		if !ok || !isToken(key) {
			return Baggage{}, fmt.Errorf("baggage member %q is not key=value", member)
		}
		to := b.field(key)
		if to == nil || *to != "" {
			continue
		}
		decoded, err := decodeBaggageValue(value)
		if err != nil {
			return Baggage{}, fmt.Errorf("baggage %s: %w", key, err)
		}
		*to = decoded
		if kind, ok := workloadKind(key); ok && decoded != "" {
			b.WorkloadKind = kind
		}
	}
	return b, nil
}

// String is the header's value, and "" for the zero Baggage.
func (b Baggage) String() string {
	if last := lastWritten.Load(); last != nil && last.baggage == b {
		return last.text
	}
	text := b.write()
	lastWritten.Store(&baggageText{b, text})
	return text
}

func (b Baggage) write() string {
	var out strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if out.Len() > 0 {
			out.WriteByte(',')
		}
		out.WriteString(key)
		out.WriteByte('=')
		encodeBaggageValue(&out, value)
	}
	add("k8s.cluster.name", b.Cluster)
	add("k8s.namespace.name", b.Namespace)
	if isWorkloadKind(b.WorkloadKind) {
		add("k8s."+b.WorkloadKind+".name", b.WorkloadName)
	}
	add("service.name", b.Service)
	add("service.version", b.Version)
	add("cloud.region", b.Region)
	add("cloud.availability_zone", b.Zone)
	return out.String()
}

// field is where the value of key belongs, nil for a key that HBONE does not use.
func (b *Baggage) field(key string) *string {
	switch key {
	case "k8s.cluster.name":
		return &b.Cluster
	case "k8s.namespace.name":
		return &b.Namespace
	case "service.name":
		return &b.Service
	case "service.version":
		return &b.Version
	case "cloud.region":
		return &b.Region
	case "cloud.availability_zone":
		return &b.Zone
	}
	if _, ok := workloadKind(key); ok {
		return &b.WorkloadName
	}
	return nil
}

func workloadKind(key string) (kind string, ok bool) {
	kind, ok = strings.CutPrefix(key, "k8s.")
	if !ok {
		return "", false
	}
	kind, ok = strings.CutSuffix(kind, ".name")
	return kind, ok && isWorkloadKind(kind)
}

func isWorkloadKind(kind string) bool {
	switch kind {
	case "deployment", "cronjob", "pod", "job":
		return true
	}
	return false
}

func decodeBaggageValue(s string) (string, error) {
	out := make([]byte, 0, min(len(s), maxBaggageValue))
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '%':
			if i+2 >= len(s) || !isHex(s[i+1]) || !isHex(s[i+2]) {
				return "", fmt.Errorf("value %q has a broken percent code", s)
			}
			c = unhex(s[i+1])<<4 | unhex(s[i+2])
			i += 2
		case !isBaggageOctet(c):
			return "", fmt.Errorf("value has the character %q", c)
		}
		if len(out) == maxBaggageValue {
			return "", fmt.Errorf("value is longer than %d bytes", maxBaggageValue)
		}
		out = append(out, c)
	}
	if !utf8.Valid(out) {
		return "", fmt.Errorf("value %q is not UTF-8", s)
	}
	for _, r := range string(out) {
		if !unicode.IsPrint(r) {
			return "", fmt.Errorf("value %q has a character that does not print", s)
		}
	}
	return string(out), nil
}

func encodeBaggageValue(out *strings.Builder, s string) {
	const digits = "0123456789ABCDEF"
	for i := range len(s) {
		if c := s[i]; isBaggageOctet(c) && c != '%' {
			out.WriteByte(c)
		} else {
			out.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
}

// isBaggageOctet is baggage-octet of W3C Baggage, section 3.3.1.1.
func isBaggageOctet(c byte) bool {
	return c > ' ' && c <= '~' && c != '"' && c != ',' && c != ';' && c != '\\'
}

// isToken is a token of RFC 9110 section 5.6.2.
func isToken(s string) bool {
	for i := range len(s) {
		if !isTokenChar(s[i]) {
			return false
		}
	}
	return s != ""
}

func isTokenChar(c byte) bool {
	return isAlnum(c) || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// trimOWS cuts optional white space (RFC 9110 section 5.6.3).
func trimOWS(s string) string { return strings.Trim(s, " \t") }

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	default:
		return c - 'a' + 10
	}
}
