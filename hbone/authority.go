package hbone

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// MaxAuthority is the longest authority that is read: a DNS name of 253 bytes, a colon and
// a port.
const MaxAuthority = 253 + 1 + 5

// Authority is a parsed :authority. Exactly one of Addr and Host is set.
type Authority struct {
	Addr netip.Addr // of an IP authority, unmapped
	Host string     // of any other, as it was written
	Port uint16
}

// ParseAuthority reads ip:port, [v6]:port or host:port. The port is required, 1 to 65535
// without leading zeros; an IPv6 address has brackets and no zone; a host is a DNS name of
// letters, digits, hyphens and underscores whose last label is not a number, so that no
// misspelt address passes for a name.
func ParseAuthority(s string) (Authority, error) {
	if len(s) > MaxAuthority {
		return Authority{}, fmt.Errorf("authority of %d bytes is longer than %d", len(s), MaxAuthority)
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return Authority{}, fmt.Errorf("authority %q has no port", s)
	}
	host := s[:i]
	port, err := parsePort(s[i+1:])
	if err != nil {
		return Authority{}, fmt.Errorf("authority %q: %w", s, err)
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, closed := strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		if !closed || err != nil || addr.Is4() || addr.Zone() != "" {
			return Authority{}, fmt.Errorf("authority %q: no IPv6 address in its brackets", s)
		}
		return Authority{Addr: addr.Unmap(), Port: port}, nil
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is4() {
		return Authority{Addr: addr, Port: port}, nil
	}
	if err := validateHost(host); err != nil {
		return Authority{}, fmt.Errorf("authority %q: %w", s, err)
	}
	return Authority{Host: host, Port: port}, nil
}

// String is the form that ParseAuthority reads.
func (a Authority) String() string {
	if a.Addr.IsValid() {
		return netip.AddrPortFrom(a.Addr, a.Port).String()
	}
	return a.Host + ":" + strconv.Itoa(int(a.Port))
}

// AddrPort is the target of an IP authority, and zero for a host.
func (a Authority) AddrPort() netip.AddrPort {
	if !a.Addr.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Addr, a.Port)
}

func parsePort(s string) (uint16, error) {
	if s == "" || s[0] == '0' || s[0] == '+' {
		return 0, fmt.Errorf("port %q is not 1 to 65535", s)
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %q is not 1 to 65535", s)
	}
	return uint16(n), nil
}

// validateHost takes DNS names as RFC 1123 section 2.1 has them, and underscores, which
// occur in practice.
func validateHost(s string) error {
	if s == "" {
		return errors.New("host is empty")
	}
	if len(s) > 253 {
		return errors.New("host is longer than 253 bytes")
	}
	var label string
	for rest, more := s, true; more; {
		label, rest, more = strings.Cut(rest, ".")
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("host has the label %q", label)
		}
		for i := range len(label) {
			c := label[i]
			if !isAlnum(c) && c != '-' && c != '_' {
				return fmt.Errorf("host has the character %q", c)
			}
		}
	}
	if isNumber(label) {
		return fmt.Errorf("host ends in the number %q: an IP address that is not well formed", label)
	}
	return nil
}

// isNumber is the WHATWG URL standard's "ends in a number", the test for what a lenient
// inet_aton would take for an address: digits, or 0x and hexadecimal digits.
func isNumber(label string) bool {
	if len(label) >= 2 && label[0] == '0' && (label[1] == 'x' || label[1] == 'X') {
		return strings.Trim(label[2:], "0123456789abcdefABCDEF") == ""
	}
	return strings.Trim(label, "0123456789") == ""
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}
