package istio

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// Caller is a node agent that asks for its node's certificates.
type Caller struct {
	Node string // required
	Pod  string // of the agent, namespace/name; "" where that is not known
}

func (c Caller) String() string {
	if c.Pod == "" {
		return "node " + c.Node
	}
	return "node " + c.Node + " (" + c.Pod + ")"
}

// Authenticator knows callers by their token.
type Authenticator interface {
	// Authenticate returns who has the token. A *DeniedError's reason is told to the caller;
	// any other error means that it cannot tell now.
	Authenticate(ctx context.Context, token string) (Caller, error)
}

// bearerToken returns the token that the call came with.
func bearerToken(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get(authorizationHeader)
	if len(values) != 1 {
		return "", fmt.Errorf("%d authorization headers, want one bearer token", len(values))
	}
	// The scheme is case insensitive (RFC 9110 section 11.1).
	if len(values[0]) < len(bearerPrefix) || !strings.EqualFold(values[0][:len(bearerPrefix)], bearerPrefix) {
		return "", errors.New("the authorization header is not a bearer token")
	}
	return values[0][len(bearerPrefix):], nil
}

// remoteHost is the address of the other end without its port.
func remoteHost(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "unknown"
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}

// limiters holds a rate for each of those who ask.
type limiters struct {
	perSecond rate.Limit
	burst     int

	mu    sync.Mutex
	byKey map[string]*rate.Limiter
}

func newLimiters(perSecond float64, burst int) *limiters {
	return &limiters{perSecond: rate.Limit(perSecond), burst: burst, byKey: map[string]*rate.Limiter{}}
}

// maxLimiters is how many are kept before those that limit nothing are let go.
const maxLimiters = 16384

func (l *limiters) get(key string) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	one := l.byKey[key]
	if one != nil {
		return one
	}
	if len(l.byKey) >= maxLimiters {
		for k, idle := range l.byKey {
			if idle.Tokens() >= float64(l.burst) {
				delete(l.byKey, k)
			}
		}
	}
	one = rate.NewLimiter(l.perSecond, l.burst)
	l.byKey[key] = one
	return one
}
