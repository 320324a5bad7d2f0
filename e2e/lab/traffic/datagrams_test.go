package traffic

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// serveDatagrams runs the server on loopback until the test ends.
func serveDatagrams(t *testing.T) netip.AddrPort {
	t.Helper()
	conn := listenUDP(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeDatagrams(ctx, conn) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func listenUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// through puts a path in front of to, which may lose, repeat or change what clients send: change
// returns what is passed on.
func through(t *testing.T, to netip.AddrPort, change func([]byte) [][]byte) netip.AddrPort {
	t.Helper()
	in := listenUDP(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	out := make(map[netip.AddrPort]*net.UDPConn)
	wg.Go(func() {
		buffer := make([]byte, maxDatagram)
		for {
			n, from, err := in.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			mu.Lock()
			conn := out[from]
			if conn == nil {
				if conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); err != nil {
					mu.Unlock()
					t.Error(err)
					return
				}
				out[from] = conn
				wg.Go(func() {
					back := make([]byte, maxDatagram)
					for {
						n, err := conn.Read(back)
						if err != nil {
							return
						}
						_, _ = in.WriteToUDPAddrPort(back[:n], from)
					}
				})
			}
			mu.Unlock()
			for _, p := range change(buffer[:n]) {
				_, _ = conn.Write(p)
			}
		}
	})
	t.Cleanup(func() {
		_ = in.Close()
		mu.Lock()
		for _, conn := range out {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return in.LocalAddr().(*net.UDPAddr).AddrPort()
}

// everyThird of the datagrams of a kind is handled by f.
func everyThird(kind byte, f func([]byte) [][]byte) func([]byte) [][]byte {
	count := 0
	return func(p []byte) [][]byte {
		if p[0] == kind && len(p) != 64 { // those of 64 make a flow
			if count++; count%3 == 0 {
				return f(p)
			}
		}
		return [][]byte{p}
	}
}

func lose([]byte) [][]byte { return nil }

func repeat(p []byte) [][]byte { return [][]byte{p, p} }

func flip(p []byte) [][]byte {
	p[len(p)-1] ^= 0xff
	return [][]byte{p}
}

func isThird(share float64) bool { return share > 0.31 && share < 0.35 }

func TestDatagramsThatArriveAreCounted(t *testing.T) {
	to := serveDatagrams(t)
	for _, size := range []int{minDatagram, 64, 1200} {
		r, err := Datagrams(t.Context(), to, DatagramOptions{Flows: 3, Size: size, Duration: 50 * time.Millisecond})
		if err != nil || r.Arrived == 0 || r.Arrived != r.Sent || r.Lost() != 0 || r.Count == 0 || r.P99 < r.P50 || r.Elapsed < 50*time.Millisecond {
			t.Errorf("%d bytes: %+v, %v", size, r, err)
		}
	}
	opts := DatagramOptions{Flows: 1, Size: 100, Duration: 200 * time.Millisecond}
	r, err := Datagrams(t.Context(), through(t, to, everyThird(dataDatagram, lose)), opts)
	if err != nil || !isThird(r.Lost()) {
		t.Errorf("where a third is lost: %+v, %v", r, err)
	}
	r, err = Datagrams(t.Context(), through(t, to, everyThird(dataDatagram, repeat)), opts)
	if err != nil || r.Arrived != r.Sent {
		t.Errorf("where some come twice: %+v, %v", r, err)
	}
	if _, err = Datagrams(t.Context(), through(t, to, everyThird(dataDatagram, flip)), opts); err == nil || !strings.Contains(err.Error(), "changed") {
		t.Errorf("where some are changed: %v", err)
	}
}

// A sender has no more on the way than its window, so that a queue of that length loses nothing.
func TestDatagramsKeepToTheirWindow(t *testing.T) {
	server := listenUDP(t)
	defer func() { _ = server.Close() }()
	ended := make(chan int, 1)
	go func() {
		buffer, data := make([]byte, maxDatagram), 0
		for {
			n, from, err := server.ReadFromUDPAddrPort(buffer)
			if err != nil {
				ended <- data
				return
			}
			if buffer[0] == dataDatagram {
				data++
				continue // and confirm nothing
			}
			_, _ = server.WriteToUDPAddrPort(buffer[:n], from)
		}
	}()
	conns, err := dialFlows(t.Context(), server.LocalAddr().(*net.UDPAddr).AddrPort(), 1)
	if err != nil {
		t.Fatal(err)
	}
	s := sender{conn: conns[0], start: time.Now(), datagram: padding()[:64], latency: newHistogram()}
	if err := s.send(s.start.Add(stall / 2)); err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	if got := <-ended; got > datagramWindow || s.sent != datagramWindow {
		t.Errorf("%d sent, %d arrived, want %d", s.sent, got, datagramWindow)
	}
	if err := closeAll(conns); err != nil {
		t.Error(err)
	}
}

func TestDatagramsAreExchangedAtARate(t *testing.T) {
	to := serveDatagrams(t)
	opts := DatagramOptions{Flows: 4, Size: 65, Duration: 200 * time.Millisecond, Rate: 400}
	start := time.Now()
	r, err := ExchangeDatagrams(t.Context(), to, opts)
	if err != nil || r.Sent != 80 || r.Arrived != 80 || r.Count != 80 || r.P50 <= 0 || r.P99 < r.P90 || r.P90 < r.P50 {
		t.Errorf("400 requests per second for 200 ms: %+v, %v, want 80 requests", r, err)
	}
	if took := time.Since(start); took > lateAnswer {
		t.Errorf("it took %v to hear of the last response", took)
	}
	r, err = ExchangeDatagrams(t.Context(), through(t, to, everyThird(echoDatagram, lose)), opts)
	if err != nil || r.Sent != 80 || !isThird(r.Lost()) || r.Count != int64(r.Arrived) {
		t.Errorf("where a third is lost: %+v, %v", r, err)
	}
	r, err = ExchangeDatagrams(t.Context(), through(t, to, everyThird(echoDatagram, repeat)), opts)
	if err != nil || r.Arrived != 80 || r.Count != 80 {
		t.Errorf("where some come twice: %+v, %v", r, err)
	}
	if _, err = ExchangeDatagrams(t.Context(), through(t, to, everyThird(echoDatagram, flip)), opts); err == nil || !strings.Contains(err.Error(), "not the request") {
		t.Errorf("where some are changed: %v", err)
	}
}

// A path that holds everything back for a while costs every request of that time its part.
func TestAStallCountsForEveryDatagramThatItDelays(t *testing.T) {
	count := 0
	to := through(t, serveDatagrams(t), func(p []byte) [][]byte {
		if len(p) != 64 {
			if count++; count == 10 {
				time.Sleep(300 * time.Millisecond)
			}
		}
		return [][]byte{p}
	})
	r, err := ExchangeDatagrams(t.Context(), to, DatagramOptions{Flows: 1, Size: 65, Duration: time.Second, Rate: 100})
	if err != nil || r.Count != 100 || r.P90 < 150*time.Millisecond || r.Max < 290*time.Millisecond {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestHeldFlowsAreAskedEachTime(t *testing.T) {
	held, err := HoldDatagrams(t.Context(), serveDatagrams(t), 50)
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Check(); err != nil || len(held.conns) != 50 {
		t.Errorf("%d flows: %v", len(held.conns), err)
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
}

func TestDatagramsNeedRoomForTheirHeader(t *testing.T) {
	for _, size := range []int{0, minDatagram - 1, maxDatagram + 1} {
		if _, err := Datagrams(t.Context(), netip.AddrPort{}, DatagramOptions{Flows: 1, Size: size}); err == nil {
			t.Errorf("datagrams of %d bytes were sent", size)
		}
		if _, err := ExchangeDatagrams(t.Context(), netip.AddrPort{}, DatagramOptions{Flows: 1, Size: size, Rate: 1}); err == nil {
			t.Errorf("datagrams of %d bytes were exchanged", size)
		}
	}
}
