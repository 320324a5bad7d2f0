package hbone

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// What an extended CONNECT for UDP carries beside the target (RFC 9298 section 3.4, RFC 9297
// section 3.4).
const (
	ConnectUDP        = "connect-udp"      // :protocol
	CapsuleProtocol   = "capsule-protocol" // a field, whose value is
	CapsuleProtocolOn = "?1"

	udpPath    = "/.well-known/masque/udp/"
	maxUDPPath = len(udpPath) + 3*253 + 1 + 5 + 1 // every byte of a host may be a percent code
)

// UDPPath is the :path of a request to target: RFC 9298's default template (section 3), in
// which the colons of an IPv6 address are percent-encoded.
func UDPPath(target Authority) string {
	host := target.Host
	if target.Addr.IsValid() {
		host = strings.ReplaceAll(target.Addr.String(), ":", "%3A")
	}
	return udpPath + host + "/" + strconv.Itoa(int(target.Port)) + "/"
}

// ParseUDPPath reads the target of a :path of that template. The same hosts and ports are
// allowed as in an authority, and nothing behind them.
func ParseUDPPath(path string) (Authority, error) {
	rest, ok := strings.CutPrefix(path, udpPath)
	if !ok || len(path) > maxUDPPath {
		return Authority{}, fmt.Errorf("path %q is not %s{host}/{port}/", path[:min(len(path), maxUDPPath)], udpPath)
	}
	host, rest, _ := strings.Cut(rest, "/")
	port, ok := strings.CutSuffix(rest, "/")
	host, err := percentDecode(host)
	if err == nil && !ok {
		err = errors.New("no / behind the port")
	}
	if err != nil {
		return Authority{}, fmt.Errorf("path %q: %w", path, err)
	}
	if strings.Contains(host, ":") { // an IPv6 address, which an authority has in brackets
		host = "[" + host + "]"
	}
	target, err := ParseAuthority(host + ":" + port)
	if err != nil {
		return Authority{}, fmt.Errorf("path %q: %w", path, err)
	}
	return target, nil
}

// percentDecode replaces percent codes (RFC 3986 section 2.1).
func percentDecode(s string) (string, error) {
	if !strings.Contains(s, "%") {
		return s, nil
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' {
			if i+2 >= len(s) || !isHex(s[i+1]) || !isHex(s[i+2]) {
				return "", errors.New("broken percent code")
			}
			c = unhex(s[i+1])<<4 | unhex(s[i+2])
			i += 2
		}
		out = append(out, c)
	}
	return string(out), nil
}
