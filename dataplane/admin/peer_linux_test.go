package admin

import (
	"context"
	"net"
	"testing"
)

func TestOnlyRootAndTheAgentsOwnUserPass(t *testing.T) {
	for _, test := range []struct {
		peer, own uint32
		allowed   bool
	}{
		{0, 0, true}, {0, 1000, true}, {1000, 1000, true}, {1000, 0, false}, {1001, 1000, false}, {65534, 0, false},
	} {
		if err := allowUID(test.peer, test.own); (err == nil) != test.allowed {
			t.Errorf("allowUID(%d, %d) = %v", test.peer, test.own, err)
		}
	}
}

func TestConnectionWithoutCredentialsIsRefused(t *testing.T) {
	a, b := net.Pipe()
	defer func() { _, _ = a.Close(), b.Close() }()
	if checkPeer(a) == nil {
		t.Error("a connection that is no unix socket has passed")
	}
	if authorize(withPeer(context.Background(), a)) == nil {
		t.Error("a request on it was authorized")
	}
	if authorize(context.Background()) == nil {
		t.Error("a request on an unknown connection was authorized")
	}
}
