package proxy

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A connection that is cut in the moment in which its set-up is over ends all the same.
func TestNoCutIsLostBetweenSetUpAndConnection(t *testing.T) {
	denied := errors.New("denied")
	ctx, cancel := context.WithCancelCause(t.Context())
	cutting, carried := make(chan struct{}), make(chan struct{})
	s := &servedPod{}
	f := &flow{cancel: func(cause error) {
		if cause != nil { // it is cut
			close(cutting)
			select {
			case <-carried:
			case <-time.After(50 * time.Millisecond): // it waits for us
			}
		}
		cancel(cause)
	}}
	ended := make(chan error, 2)
	go s.cut(f, denied)
	<-cutting
	if cut := s.carried(ctx, f, func(err error) { ended <- err }); cut != nil {
		ended <- cut
	}
	close(carried)
	select {
	case err := <-ended:
		if !errors.Is(err, denied) {
			t.Errorf("ended for %v, want %v", err, denied)
		}
	case <-time.After(time.Second):
		t.Error("it goes on")
	}
}
