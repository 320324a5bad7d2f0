package kube

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"
)

// claims are what a service account's token says of itself. They prove nothing.
type claims struct {
	Subject  string    `json:"sub"`
	Audience audiences `json:"aud"`
	Expiry   float64   `json:"exp"` // seconds since 1970
}

func (c claims) expires() time.Time {
	const end = 1 << 40 // the year 36812: what is later is a mistake, or an attempt to overflow
	return time.Unix(int64(min(max(c.Expiry, 0), end)), 0)
}

// audiences is one text or a list of them (RFC 7519 section 4.1.3).
type audiences []string

// UnmarshalJSON implements json.Unmarshaler.
func (a *audiences) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*a = audiences{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(a))
}

// maxTokenBytes is many times a bound token.
const maxTokenBytes = 8 << 10

// readClaims reads the middle part of a JWT. Its errors are *istio.DeniedError and hold
// nothing of the token.
func readClaims(token string) (claims, error) {
	notOne := denied("the bearer token is not that of a service account")
	parts := strings.Split(token, ".")
	if len(token) > maxTokenBytes || len(parts) != 3 {
		return claims{}, notOne
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return claims{}, notOne
	}
	var c claims
	if json.Unmarshal(payload, &c) != nil || c.Subject == "" || c.Expiry == 0 {
		return claims{}, notOne
	}
	return c, nil
}
