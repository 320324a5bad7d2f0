package h3_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
)

// stuck takes nothing until it may.
type stuck struct {
	counter
	may chan struct{}
}

func (s *stuck) Datagram(p []byte) {
	<-s.may
	s.counter.Datagram(p)
}

func TestDatagramsThatTheQueueDropsAreCounted(t *testing.T) {
	const sent, queue = 400, 128
	sink := &stuck{may: make(chan struct{})}
	var dropped, ofClient atomic.Int64
	w := newWorld(t, "127.0.0.1", func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			f.Deliver(sink)
		}
	}, func(cfg *h3.Config, _ *hbone.ServerConfig) {
		cfg.QueueDropped = func(client bool) {
			dropped.Add(1)
			if client {
				ofClient.Add(1)
			}
		}
	})
	f, _, err := w.connect(t).OpenDatagrams(t.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for range sent {
		if err := f.Send(make([]byte, 64), true); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); dropped.Load() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	close(sink.may)
	for before := int64(-1); sink.n.Load() != before; time.Sleep(50 * time.Millisecond) {
		before = sink.n.Load()
	}
	came, lost := sink.n.Load(), dropped.Load()
	if lost == 0 || ofClient.Load() != 0 || came < queue || came+lost > sent {
		t.Errorf("of %d datagrams %d came, and %d were counted as dropped, %d as a client's", sent, came, lost, ofClient.Load())
	}
}
