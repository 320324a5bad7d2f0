package hbone_test

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
)

func TestDatagramErrorsAreWhatTheApplicationSees(t *testing.T) {
	for err, want := range map[error]error{
		&hbone.TooLargeError{Max: 1100}: syscall.EMSGSIZE,
		hbone.PortClosedError{}:         syscall.ECONNREFUSED,
	} {
		if wrapped := fmt.Errorf("flow: %w", err); !errors.Is(wrapped, want) {
			t.Errorf("%v is not %v", wrapped, want)
		}
		for _, other := range []error{syscall.EPIPE, hbone.ErrRefused, hbone.ErrUncertain} {
			if errors.Is(err, other) {
				t.Errorf("%v is %v", err, other)
			}
		}
	}
}
