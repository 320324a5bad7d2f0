package h3

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/quic-go/qpack"

	"github.com/raceway-mesh/raceway/hbone"
)

// connectFields are the header fields of r.
func connectFields(r *hbone.Request, protocol hbone.Protocol, peer netip.AddrPort) ([]qpack.HeaderField, error) {
	var fields []qpack.HeaderField
	err := r.ConnectFields(protocol, peer, func(name, value string) { fields = append(fields, qpack.HeaderField{Name: name, Value: value}) })
	return fields, err
}

// request is a CONNECT that arrived.
type request struct {
	hbone.Request
	target   netip.AddrPort
	protocol hbone.Protocol
}

// badRequest is a request that is answered with a status.
type badRequest struct{ status int }

func (e *badRequest) Error() string { return "answered " + strconv.Itoa(e.status) }

// parseRequest judges a request's fields. A malformed one (RFC 9114 section 4.1.2) is a
// streamError, one that is not for us a badRequest.
func parseRequest(fields []qpack.HeaderField) (*request, error) {
	pseudo, regular, err := split(fields)
	if err != nil {
		return nil, err
	}
	method, authority := pseudo[":method"], pseudo[":authority"]
	_, hasProtocol := pseudo[":protocol"]
	_, hasScheme := pseudo[":scheme"]
	path, hasPath := pseudo[":path"]
	for name := range pseudo {
		switch name {
		case ":method", ":authority", ":protocol", ":scheme", ":path":
		default:
			return nil, &streamError{codeMessage, "unknown field " + name}
		}
	}
	tunnel := method == "CONNECT" && !hasProtocol
	switch {
	case method == "", hasProtocol && method != "CONNECT", hasPath && path == "":
		return nil, &streamError{codeMessage, "request without what it needs"}
	case tunnel == (hasScheme || hasPath), !tunnel && hasScheme != hasPath:
		return nil, &streamError{codeMessage, "scheme and path in the wrong kind of request"}
	case method != "CONNECT":
		return nil, &badRequest{400}
	case hasProtocol && pseudo[":protocol"] != hbone.ConnectUDP:
		return nil, &badRequest{501} // RFC 9220 section 3
	}
	r := &request{}
	to, err := hbone.ParseAuthority(authority)
	if hasProtocol {
		r.protocol = hbone.UDP
		if err == nil {
			to, err = hbone.ParseUDPPath(path)
		}
	}
	if err != nil {
		return nil, &badRequest{400}
	}
	r.Authority, r.target = to.String(), to.AddrPort()
	for _, f := range regular {
		r.SetField(f.Name, f.Value)
	}
	return r, nil
}

// parseResponse is a response's status, and its fields if it is 200.
func parseResponse(fields []qpack.HeaderField) (int, *hbone.Response, error) {
	pseudo, regular, err := split(fields)
	if err != nil {
		return 0, nil, err
	}
	status, err := strconv.Atoi(pseudo[":status"])
	if err != nil || status < 100 || status > 999 || len(pseudo) != 1 {
		return 0, nil, &streamError{codeMessage, "response without a status"}
	}
	r := &hbone.Response{}
	for _, f := range regular {
		r.SetField(f.Name, f.Value)
	}
	return status, r, nil
}

// responseFields are the fields of an answer.
func responseFields(status int, r hbone.Response) []qpack.HeaderField {
	fields := []qpack.HeaderField{{Name: ":status", Value: strconv.Itoa(status)}}
	r.Fields(func(name, value string) { fields = append(fields, qpack.HeaderField{Name: name, Value: value}) })
	return fields
}

// split checks what holds for all messages (RFC 9114 sections 4.2 and 4.3) and separates the
// pseudo-header fields.
func split(fields []qpack.HeaderField) (pseudo map[string]string, regular []qpack.HeaderField, err error) {
	pseudo = make(map[string]string, 5)
	for _, f := range fields {
		if strings.HasPrefix(f.Name, ":") {
			if _, twice := pseudo[f.Name]; twice || regular != nil {
				return nil, nil, &streamError{codeMessage, "field " + f.Name + " twice, or behind others"}
			}
			pseudo[f.Name] = f.Value
			continue
		}
		switch {
		case !isFieldName(f.Name), strings.ContainsAny(f.Value, "\x00\r\n"):
			return nil, nil, &streamError{codeMessage, "a field that is none"}
		case f.Name == "connection", f.Name == "proxy-connection", f.Name == "keep-alive",
			f.Name == "transfer-encoding", f.Name == "upgrade", f.Name == "te" && f.Value != "trailers":
			return nil, nil, &streamError{codeMessage, "field " + f.Name}
		}
		regular = append(regular, f)
	}
	return pseudo, regular, nil
}

// isFieldName reports whether s is a token (RFC 9110 section 5.6.2) without upper case.
func isFieldName(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}
