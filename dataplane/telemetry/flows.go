package telemetry

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// flowHub hands flow records to subscribers and keeps the recent ones.
type flowHub struct {
	lost prometheus.Counter

	mu          sync.Mutex
	recent      []record // a ring once it is full
	next        int      // where the next record goes
	subscribers map[*Subscription]struct{}
}

func newFlowHub(size int) *flowHub {
	return &flowHub{
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "raceway_flow_records_lost_total", Help: "Flow records that subscribers were too slow for.",
		}),
		recent:      make([]record, 0, size),
		subscribers: make(map[*Subscription]struct{}),
	}
}

func (h *flowHub) publish(r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.recent) < cap(h.recent) {
		h.recent = append(h.recent, r)
	} else {
		h.recent[h.next] = r
	}
	h.next = (h.next + 1) % cap(h.recent)
	if len(h.subscribers) == 0 {
		return
	}
	f := r.flow()
	for s := range h.subscribers {
		select {
		case s.records <- f:
		default:
			s.missed++
			h.lost.Inc()
		}
	}
}

// Subscription receives the flow records that happen after it was made. Close ends it.
type Subscription struct {
	hub     *flowHub
	records chan admin.Flow
	missed  uint64 // guarded by hub.mu
}

// Subscribe returns the recent records, oldest first, and a subscription to all that follow
// them. buffer bounds the records that wait for the subscriber; 0 means 1,024.
func (t *Telemetry) Subscribe(buffer int) ([]admin.Flow, *Subscription) {
	if buffer <= 0 {
		buffer = 1024
	}
	h := t.flows
	s := &Subscription{hub: h, records: make(chan admin.Flow, buffer)}
	records := h.subscribe(s)
	recent := make([]admin.Flow, len(records))
	for i := range records {
		recent[i] = records[i].flow()
	}
	return recent, s
}

func (h *flowHub) subscribe(s *Subscription) (recent []record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subscribers[s] = struct{}{}
	if len(h.recent) == cap(h.recent) {
		return slices.Concat(h.recent[h.next:], h.recent[:h.next])
	}
	return slices.Clone(h.recent)
}

// C delivers the records. It is never closed.
func (s *Subscription) C() <-chan admin.Flow { return s.records }

// Lost returns how many records were dropped because the subscriber was slow, since the
// last call.
func (s *Subscription) Lost() uint64 {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	n := s.missed
	s.missed = 0
	return n
}

// Close ends the subscription. It may be called again.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subscribers, s)
}

// Flows is admin.Backend's: the recent records and then, with follow, those that happen.
// Records that emit was too slow for are told as one of admin.FlowLost.
func (t *Telemetry) Flows(ctx context.Context, follow bool, emit func(admin.Flow) error) error {
	recent, s := t.Subscribe(0)
	defer s.Close()
	for i := range recent {
		if err := emit(recent[i]); err != nil {
			return err
		}
	}
	for follow {
		if n := s.Lost(); n > 0 {
			cause := fmt.Sprintf("%d records lost: the reader is slower than the traffic", n)
			if err := emit(admin.Flow{Time: time.Now(), Event: admin.FlowLost, Cause: cause}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case f := <-s.C():
			if err := emit(f); err != nil {
				return err
			}
		}
	}
	return nil
}
