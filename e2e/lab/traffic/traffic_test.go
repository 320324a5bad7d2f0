package traffic

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs the server on loopback until the test ends.
func serve(t *testing.T, wrap func(net.Listener) net.Listener) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, wrap(l)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return addr
}

func plain(l net.Listener) net.Listener { return l }

func TestBulkCountsWhatArrived(t *testing.T) {
	for name, transfer := range map[string]func(context.Context, netip.AddrPort, int, time.Duration) (BulkResult, error){
		"to the server": Bulk, "from the server": Download,
	} {
		for _, streams := range []int{1, 8} {
			r, err := transfer(t.Context(), serve(t, plain), streams, 50*time.Millisecond)
			if err != nil || r.Bytes < uint64(streams)*chunkSize || r.Elapsed < 50*time.Millisecond {
				t.Errorf("%s, %d streams: %+v, %v", name, streams, r, err)
			}
		}
	}
}

func TestMessagesMayHaveAnySize(t *testing.T) {
	to := serve(t, plain)
	for _, size := range []int{1, 2, 64 << 10, maxMessageSize} {
		r, err := Exchange(t.Context(), to, ExchangeOptions{Conns: 1, Duration: 20 * time.Millisecond, Size: size})
		if err != nil || r.Count == 0 {
			t.Errorf("%d bytes: %+v, %v", size, r, err)
		}
	}
	for _, size := range []int{-1, maxMessageSize + 1} {
		if _, err := Exchange(t.Context(), to, ExchangeOptions{Conns: 1, Size: size}); err == nil {
			t.Errorf("messages of %d bytes were exchanged", size)
		}
	}
}

func TestExchangeMeasuresEveryRequest(t *testing.T) {
	to := serve(t, plain)
	saturated, err := Exchange(t.Context(), to, ExchangeOptions{Conns: 4, Duration: 100 * time.Millisecond})
	if err != nil || saturated.Count == 0 || saturated.P50 <= 0 || saturated.P99 < saturated.P50 || saturated.Max < saturated.P999 {
		t.Errorf("saturated: %+v, %v", saturated, err)
	}
	rated, err := Exchange(t.Context(), to, ExchangeOptions{Conns: 4, Duration: 200 * time.Millisecond, Rate: 400})
	if err != nil || rated.Count != 80 { // every request that is due is made, however late
		t.Errorf("400 requests per second for 200 ms: %+v, %v, want 80 requests", rated, err)
	}
}

func TestConnectOpensOneConnectionAfterTheOther(t *testing.T) {
	r, err := Connect(t.Context(), serve(t, plain), 4, 100*time.Millisecond)
	if err != nil || r.Count == 0 || r.PerSecond() <= 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// corrupt changes one byte of what passes through a connection, or swallows one.
type corrupt struct {
	net.Conn
	swallow bool
}

func (c corrupt) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 100 {
		if c.swallow {
			return n - 1, err
		}
		p[n-1] ^= 0xff
	}
	return n, err
}

type corruptListener struct {
	net.Listener
	swallow bool
}

func (l corruptListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return corrupt{c, l.swallow}, err
}

func TestAPathThatChangesBytesFails(t *testing.T) {
	to := serve(t, func(l net.Listener) net.Listener { return corruptListener{Listener: l} })
	if _, err := Exchange(t.Context(), to, ExchangeOptions{Conns: 1, Duration: time.Second}); err == nil || !strings.Contains(err.Error(), "not the request") {
		t.Errorf("exchange over a path that flips bits: %v", err)
	}
	to = serve(t, func(l net.Listener) net.Listener { return corruptListener{l, true} })
	if _, err := Bulk(t.Context(), to, 1, 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "the receiver got") {
		t.Errorf("bulk over a path that loses bytes: %v", err)
	}
}

// A stall of one second at 100 requests per second delays a hundred requests, and each must
// count; a client that waited with them would report a single slow one.
func TestAStallCountsForEveryRequestThatItDelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			buffer := make([]byte, MessageSize)
			for i := 0; ; i++ {
				if _, err := io.ReadFull(server, buffer); err != nil {
					return
				}
				if i == 100 {
					time.Sleep(time.Second)
				}
				if _, err := server.Write(buffer); err != nil {
					return
				}
			}
		}()
		h := newHistogram()
		start := time.Now()
		err := exchange(client, MessageSize, schedule{start: start, interval: 10 * time.Millisecond}, start.Add(3*time.Second), h)
		if err != nil {
			t.Fatal(err)
		}
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		slow := int64(0)
		for _, bar := range h.Distribution() {
			if bar.From >= int64(time.Millisecond) {
				slow += bar.Count
			}
		}
		if h.TotalCount() != 300 || slow < 99 || slow > 101 {
			t.Errorf("%d requests, %d of them slow: want 300 and about 100", h.TotalCount(), slow)
		}
	})
}

func TestHeldConnectionsAreAskedEachTime(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l) }()
	held, err := Hold(t.Context(), l.Addr().(*net.TCPAddr).AddrPort(), 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Check(); err != nil || len(held.conns) != 100 {
		t.Errorf("%d connections: %v", len(held.conns), err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if held.Check() == nil {
		t.Error("connections that the server closed are taken for alive")
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
}

func TestMixedLoadSeesACorruptPath(t *testing.T) {
	r, err := Mixed(t.Context(), serve(t, plain), 8, 500*time.Millisecond)
	if err != nil || r.Streams == 0 || r.Bytes == 0 || r.Resets == 0 || r.Requests == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, swallow := range []bool{false, true} {
		to := serve(t, func(l net.Listener) net.Listener { return corruptListener{l, swallow} })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := new(mix).stream(ctx, to, 0); err == nil {
			t.Errorf("a path that is corrupt (swallow %v) passed", swallow)
		}
		cancel()
	}
}

func TestServerThatIsNotThereIsAnError(t *testing.T) {
	nobody := netip.MustParseAddrPort("127.0.0.1:1")
	if _, err := Bulk(t.Context(), nobody, 2, time.Second); err == nil {
		t.Error("bulk: no error")
	}
	if _, err := Exchange(t.Context(), nobody, ExchangeOptions{Conns: 2, Duration: time.Second}); err == nil {
		t.Error("exchange: no error")
	}
	if _, err := Connect(t.Context(), nobody, 2, time.Second); err == nil {
		t.Error("connect: no error")
	}
}
