package demo

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// startServer serves on loopback until the test ends, and returns where.
func startServer(t *testing.T) (*Server, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := &Server{served: make(map[netip.Addr]int), clients: make(map[string]net.Conn)}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := s.serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); serving.Wait() })
	return s, netip.MustParseAddrPort(l.Addr().String())
}

// startClient makes requests until the test ends, and returns whom to ask about them.
func startClient(t *testing.T, target netip.AddrPort) *control {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "app")
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := (&Client{Socket: socket, Target: target}).Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	c := newControl("client", socket)
	err := until(t.Context(), func(ctx context.Context) error {
		var report clientReport
		return c.ask(ctx, "report", reportQuestion{}, &report)
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func ask[T any](t *testing.T, c *control, path string, question any) (answer T) {
	t.Helper()
	if err := c.ask(t.Context(), path, question, &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

func TestAClientTellsEveryRequestAndWhatBecameOfIt(t *testing.T) {
	server, target := startServer(t)
	c := startClient(t, target)
	var report clientReport
	for report.Count < 3 {
		time.Sleep(requestInterval)
		report = ask[clientReport](t, c, "report", reportQuestion{})
	}
	seen := make(map[string]bool)
	for _, r := range report.Requests {
		if r.Error != "" || r.Seen != r.Local || r.Took <= 0 || len(r.Nonce) != 24 || seen[r.Nonce] {
			t.Errorf("%+v", r)
		}
		seen[r.Nonce] = true
	}
	later := ask[clientReport](t, c, "report", reportQuestion{Since: time.Now().Add(time.Hour)})
	if len(later.Requests) != 0 || later.Count < report.Count {
		t.Errorf("of the future it tells %+v", later)
	}
	server.mu.Lock()
	defer server.mu.Unlock()
	if n := server.served[target.Addr()]; n < report.Count || len(server.served) != 1 {
		t.Errorf("the server served %v, the client made %d requests", server.served, report.Count)
	}
}

func TestALastingConnectionTellsWhenItWasCut(t *testing.T) {
	server, target := startServer(t)
	c := startClient(t, target)
	if r := ask[lastingReport](t, c, "open", connectionQuestion{"one", target}); r.Requests != 1 || r.Error != "" {
		t.Errorf("%+v", r)
	}
	var none lastingReport
	if err := c.ask(t.Context(), "open", connectionQuestion{"one", target}, &none); err == nil {
		t.Error("two connections of one name")
	}
	ask[lastingReport](t, c, "open", connectionQuestion{"two", target})
	if r := ask[lastingReport](t, c, "close", connectionQuestion{Name: "two"}); r.Error != "" {
		t.Errorf("closed as wanted, and yet %+v", r)
	}
	server.mu.Lock()
	for _, conn := range server.clients {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = conn.Close()
	}
	server.mu.Unlock()
	err := until(t.Context(), func(ctx context.Context) error {
		if r := ask[clientReport](t, c, "report", reportQuestion{}); r.Lasting["one"].Error == "" || r.Lasting["one"].Ended.IsZero() {
			return http.ErrAbortHandler
		}
		return nil
	})
	if err != nil {
		t.Error("a connection that was reset goes on")
	}
	if _, listed := ask[clientReport](t, c, "report", reportQuestion{}).Lasting["two"]; listed {
		t.Error("a connection that was closed is listed")
	}
}

func TestRequestsThatFailSayWhy(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := once(t.Context(), netip.MustParseAddrPort(l.Addr().String()))
	if !strings.Contains(r.Error, "connection refused") || cause(r.Error) != "connection refused" {
		t.Errorf("%q, in short %q", r.Error, cause(r.Error))
	}
}

func TestTheCostOfBothIsInOneTable(t *testing.T) {
	plainly, meshed := measurement{machine: 1200 * time.Millisecond}, measurement{machine: 2 * time.Second, agents: 500 * time.Millisecond}
	plainly.latency.P50, plainly.latency.P99 = 90*time.Microsecond, 11*time.Millisecond
	meshed.latency.P50, meshed.latency.P99 = 250*time.Microsecond, 900*time.Microsecond
	want := `
                      p50        p99   CPU, whole machine  CPU, agents
without mesh        90 µs    11.0 ms               1.20 s       0.00 s
through HBONE      250 µs     900 µs               2.00 s       0.50 s
`
	if got := "\n" + costTable(plainly, meshed); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if busy, err := machineBusy(); err != nil || busy <= 0 {
		t.Errorf("the machine was busy for %v, %v", busy, err)
	}
}

func TestAFailedStepIsOneLineWithTheLastWordsOfItsLog(t *testing.T) {
	err := &StepError{2, "The label", &net.OpError{Op: "start", Err: testError("it ended; its log ends with:\n\tone\n\tread x: no")}}
	if want := "step 2 (The label) failed: start: it ended; its last words: read x: no"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
}

type testError string

func (e testError) Error() string { return string(e) }
