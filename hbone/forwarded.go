package hbone

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// maxForwarded bounds a forwarded header.
const maxForwarded = 2 << 10

// ParseForwarded reads a forwarded header (RFC 7239). Only its first element counts, the
// one nearest to the client; the rest must be well formed. An unknown or obfuscated client
// is no error and leaves For zero, as does a port of For that is absent leave it 0.
func ParseForwarded(s string) (Forwarded, error) {
	if len(s) > maxForwarded {
		return Forwarded{}, fmt.Errorf("forwarded of %d bytes is longer than %d", len(s), maxForwarded)
	}
	var f Forwarded
	first, seen := true, map[string]bool{}
	for rest := s; ; {
		name, value, tail, err := forwardedPair(trimOWS(rest))
		if err != nil {
			return Forwarded{}, fmt.Errorf("forwarded: %w", err)
		}
		if seen[name] {
			return Forwarded{}, fmt.Errorf("forwarded has %s twice in one element", name)
		}
		seen[name] = true
		if first {
			if err := f.set(name, value); err != nil {
				return Forwarded{}, fmt.Errorf("forwarded: %w", err)
			}
		}
		switch {
		case tail == "":
			return f, nil
		case tail[0] == ',':
			first, seen = false, map[string]bool{}
		}
		rest = tail[1:]
	}
}

// String is the header's value, and "" for the zero Forwarded.
func (f Forwarded) String() string {
	var parts []string
	if f.For.Addr().IsValid() {
		node := f.For.String()
		if f.For.Port() == 0 {
			node = f.For.Addr().String()
			if f.For.Addr().Is6() {
				node = "[" + node + "]"
			}
		}
		parts = append(parts, `for="`+node+`"`)
	}
	if f.Host != "" {
		host := f.Host
		if !isToken(host) {
			host = `"` + host + `"`
		}
		parts = append(parts, "host="+host)
	}
	return strings.Join(parts, ";")
}

func (f *Forwarded) set(name, value string) error {
	switch name {
	case "for":
		node, err := parseNode(value)
		if err != nil {
			return err
		}
		f.For = node
	case "host":
		if err := checkForwardedHost(value); err != nil {
			return err
		}
		f.Host = value
	}
	return nil
}

// forwardedPair cuts the next token=value from s; tail starts with ';' or ',' or is empty.
func forwardedPair(s string) (name, value, tail string, err error) {
	name, rest, ok := strings.Cut(s, "=")
	if !ok || !isToken(name) {
		return "", "", "", fmt.Errorf("%q is not name=value", s)
	}
	if strings.HasPrefix(rest, `"`) {
		value, rest, err = quotedString(rest[1:])
		if err != nil {
			return "", "", "", err
		}
	} else {
		i := 0
		for i < len(rest) && isTokenChar(rest[i]) {
			i++
		}
		if value, rest = rest[:i], rest[i:]; value == "" {
			return "", "", "", fmt.Errorf("%s has no value", name)
		}
	}
	rest = trimOWS(rest)
	if rest != "" && rest[0] != ';' && rest[0] != ',' {
		return "", "", "", fmt.Errorf("%q follows the value of %s", rest, name)
	}
	return strings.ToLower(name), value, rest, nil
}

// quotedString reads the rest of a quoted-string (RFC 9110 section 5.6.4) after its first
// quote.
func quotedString(s string) (value, rest string, err error) {
	var out []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return string(out), s[i+1:], nil
		case c == '\\':
			if i++; i == len(s) {
				return "", "", errors.New("quoted string does not end")
			}
			out = append(out, s[i])
		default:
			out = append(out, c)
		}
	}
	return "", "", errors.New("quoted string does not end")
}

// parseNode reads an RFC 7239 section 6 node: ip, [v6], either with a port, unknown, or
// _obfuscated. A bare IPv6 address is taken too: peers send it.
func parseNode(s string) (netip.AddrPort, error) {
	if strings.EqualFold(s, "unknown") || strings.HasPrefix(s, "_") {
		return netip.AddrPort{}, nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Zone() == "" {
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
	}
	inner := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		inner = s[1 : len(s)-1]
	}
	addr, err := netip.ParseAddr(inner)
	if err != nil || addr.Zone() != "" || inner != s && addr.Is4() {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address", s)
	}
	return netip.AddrPortFrom(addr.Unmap(), 0), nil
}

// checkForwardedHost takes a host, an IP address, or either with a port.
func checkForwardedHost(s string) error {
	if len(s) > MaxAuthority {
		return fmt.Errorf("host of %d bytes is longer than %d", len(s), MaxAuthority)
	}
	if _, err := ParseAuthority(s); err == nil {
		return nil
	}
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil && !strings.Contains(s, "%") {
		return nil
	}
	return validateHost(s)
}
