package e2e

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Both agents count the same connections and the same bytes, exactly, and tell of each
// connection's opening and end once.
func TestTelemetryIsExact(t *testing.T) {
	const (
		finished = 60 // connections that end, of different sizes
		live     = 7  // connections that stay
		workers  = 6
	)
	eachFamily(t, func(t *testing.T, opts lab.Options) {
		s := newShop(t, opts, "--flow-interval", "200ms")
		serve(t, s.db, portEcho, echo)
		events := []*events{s.follow(1), s.follow(2)}
		bytes := 0
		sizes := make(chan int, finished)
		for i := range finished {
			sizes <- i * 1000
			bytes += i * 1000
		}
		close(sizes)
		var askers sync.WaitGroup
		for range workers {
			askers.Go(func() {
				for size := range sizes {
					if err := ask(t.Context(), s.web, s.db.AddrPort(portEcho), random(size)); err != nil {
						t.Errorf("%d bytes: %v", size, err)
					}
				}
			})
		}
		askers.Wait()
		var lasting []*net.TCPConn
		for range live {
			one := open(t, s.web, s.db.AddrPort(portEcho))
			if err := one.use(); err != nil {
				t.Fatal(err)
			}
			bytes += len(nonce())
			lasting = append(lasting, one.TCPConn)
		}
		for i, reporter := range []string{"source", "destination"} {
			s.awaitCounts(i+1, reporter, finished+live, finished, bytes)
			if n := s.liveConnections(i + 1); n != live {
				t.Errorf("agent of node%d lists %d connections, want %d", i+1, n, live)
			}
		}
		for _, conn := range lasting {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		for i, reporter := range []string{"source", "destination"} {
			s.awaitCounts(i+1, reporter, finished+live, finished+live, bytes)
			events[i].check(t, finished+live)
		}
	})
}

// awaitCounts waits until an agent has counted connections from web to db.
func (s *shop) awaitCounts(node int, reporter string, opened, closed, bytes int) {
	s.t.Helper()
	eventually(s.t, "the metrics of "+reporter, func() error {
		now := s.scrape(node)
		for name, want := range map[string]int{
			"istio_tcp_connections_opened_total": opened, "istio_tcp_connections_closed_total": closed,
			"istio_tcp_sent_bytes_total": bytes, "istio_tcp_received_bytes_total": bytes, "istio_tcp_connections_failed_total": 0,
		} {
			got := now.sum(name, "reporter", reporter, "source_workload", "web", "destination_workload", "db",
				"source_principal", "spiffe://cluster.local/ns/shop/sa/web", "destination_principal", "spiffe://cluster.local/ns/shop/sa/db",
				"connection_security_policy", "mutual_tls", "request_protocol", "tcp")
			if int(got) != want {
				return fmt.Errorf("%s is %v, want %d", name, got, want)
			}
		}
		return nil
	})
}

func (s *shop) liveConnections(node int) int {
	s.t.Helper()
	connections, err := s.client(node).Connections(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return len(connections)
}

// events are the flow records of an agent, as they come.
type events struct {
	mu     sync.Mutex
	counts map[admin.FlowEvent]map[string]int // by event and connection
	lost   bool
}

// follow collects an agent's flow records until the test ends.
func (s *shop) follow(node int) *events {
	e := &events{counts: make(map[admin.FlowEvent]map[string]int)}
	ctx, cancel := context.WithCancel(s.t.Context())
	var following sync.WaitGroup
	client := s.client(node)
	following.Go(func() {
		if err := client.Flows(ctx, true, e.add); err != nil && ctx.Err() == nil {
			s.t.Errorf("follow the flows of node%d: %v", node, err)
		}
	})
	s.t.Cleanup(func() {
		cancel()
		following.Wait()
	})
	return e
}

func (e *events) add(f admin.Flow) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lost = e.lost || f.Event == admin.FlowLost
	if e.counts[f.Event] == nil {
		e.counts[f.Event] = make(map[string]int)
	}
	e.counts[f.Event][f.ID]++
	return nil
}

// check wants one opening and one end of each of so many connections, and reports of those
// that lasted.
func (e *events) check(t *testing.T, connections int) {
	t.Helper()
	eventually(t, "all ends are told", func() error {
		e.mu.Lock()
		defer e.mu.Unlock()
		if n := len(e.counts[admin.FlowClose]); n < connections {
			return fmt.Errorf("%d of %d", n, connections)
		}
		return nil
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lost {
		t.Fatal("records were lost: nothing can be said of them")
	}
	if len(e.counts[admin.FlowUpdate]) == 0 {
		t.Error("no record of a connection while it lived")
	}
	for _, event := range []admin.FlowEvent{admin.FlowOpen, admin.FlowClose} {
		if n := len(e.counts[event]); n != connections {
			t.Errorf("%s was told of %d connections, want %d", event, n, connections)
		}
		for id, n := range e.counts[event] {
			if n != 1 {
				t.Errorf("%s was told %d times of connection %s", event, n, id)
			}
		}
	}
}
