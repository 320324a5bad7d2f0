package h3_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h3"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// sizedPayloads are those of datagrams that benchmarks send.
func sizedPayloads() []int { return []int{64, 512, 1200} }

// counter counts what comes.
type counter struct{ n atomic.Int64 }

func (c *counter) Datagram([]byte) { c.n.Add(1) }
func (c *counter) End(error)       {}

// report tells how many of b.N datagrams came, when no more do.
func (c *counter) report(b *testing.B) {
	b.StopTimer()
	for before := int64(-1); c.n.Load() != before; time.Sleep(50 * time.Millisecond) {
		before = c.n.Load()
	}
	b.ReportMetric(100*float64(c.n.Load())/float64(b.N), "%-came")
}

// BenchmarkDatagrams is one flow, one way, as fast as it takes them.
func BenchmarkDatagrams(b *testing.B) { benchmarkDatagrams(b, nil) }

// BenchmarkDatagramsWithCountedDrops is the same with Config.QueueDropped.
func BenchmarkDatagramsWithCountedDrops(b *testing.B) {
	var dropped atomic.Int64
	benchmarkDatagrams(b, func(bool) { dropped.Add(1) })
}

func benchmarkDatagrams(b *testing.B, dropped func(client bool)) {
	for _, size := range sizedPayloads() {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			var came counter
			w := newWorld(b, "127.0.0.1", func(r *hbone.ServerRequest) {
				if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
					f.Deliver(&came)
				}
			}, func(cfg *h3.Config, _ *hbone.ServerConfig) { cfg.QueueDropped = dropped })
			f, _, err := w.connect(b).OpenDatagrams(b.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			p := make([]byte, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			b.ResetTimer()
			for range b.N {
				if err := f.Send(p, true); err != nil {
					b.Fatal(err)
				}
			}
			came.report(b)
		})
	}
}

// BenchmarkBareDatagrams is the yardstick: quic-go alone.
func BenchmarkBareDatagrams(b *testing.B) {
	for _, size := range sizedPayloads() {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			w := newWorld(b, "127.0.0.1", hbonetest.Echo, nil)
			serverTLS := w.serverConfig.TLS.Clone()
			serverTLS.NextProtos = []string{"bare"}
			cfg := &quic.Config{EnableDatagrams: true}
			l, err := quic.ListenAddr("127.0.0.1:0", serverTLS, cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			var came counter
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				conn, err := l.Accept(context.Background())
				for err == nil {
					if _, err = conn.ReceiveDatagram(context.Background()); err == nil {
						came.n.Add(1)
					}
				}
			}()
			clientTLS := w.clientTLS.Clone()
			clientTLS.NextProtos = []string{"bare"}
			conn, err := quic.DialAddr(b.Context(), l.Addr().String(), clientTLS, cfg)
			if err != nil {
				b.Fatal(err)
			}
			p := make([]byte, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			b.ResetTimer()
			for range b.N {
				if err := conn.SendDatagram(p); err != nil {
					b.Fatal(err)
				}
			}
			came.report(b)
			_ = conn.CloseWithError(0, "")
			<-ended
		})
	}
}

// BenchmarkDatagramRoundTrip is one datagram there and back.
func BenchmarkDatagramRoundTrip(b *testing.B) {
	w := newWorld(b, "127.0.0.1", func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			f.Deliver(returned{f})
		}
	}, nil)
	f, _, err := w.connect(b).OpenDatagrams(b.Context(), &hbone.Request{Authority: "10.0.0.1:53"}, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	back := make(chan struct{}, 1)
	f.Deliver(signal(back))
	p := make([]byte, 64)
	for b.Loop() {
		if err := f.Send(p, true); err != nil {
			b.Fatal(err)
		}
		<-back
	}
}

// returned sends a flow's datagrams back.
type returned struct{ flow hbone.DatagramStream }

func (r returned) Datagram(p []byte) { _ = r.flow.Send(p, true) }
func (r returned) End(error)         { _ = r.flow.Close() }

type signal chan struct{}

func (s signal) Datagram([]byte) {
	select {
	case s <- struct{}{}:
	default:
	}
}
func (s signal) End(error) {}

// BenchmarkIdleFlows is what a flow holds while nothing comes, both ends together.
func BenchmarkIdleFlows(b *testing.B) {
	const flows = 900
	var came counter
	w := newWorld(b, "127.0.0.1", func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			f.Deliver(&came)
		}
	}, nil)
	client := hbone.NewClient(hbone.ClientConfig{
		Connector: w.client.endpoint, MaxStreamsPerConn: 1000,
		TLS: func(context.Context, hbone.Key) (*tls.Config, error) { return w.clientTLS, nil },
	})
	defer func() { _ = client.Close() }()
	for b.Loop() {
		open := make([]*hbone.Flow, 0, flows)
		before := held()
		for range flows {
			f, err := client.OpenDatagrams(b.Context(), w.key, &hbone.Request{Authority: "10.0.0.1:53"}, nil)
			if err != nil {
				b.Fatal(err)
			}
			f.Deliver(&came)
			open = append(open, f)
		}
		b.ReportMetric(float64(held()-before)/flows, "B/flow")
		b.ReportMetric(float64(runtime.NumGoroutine())/flows, "goroutines/flow")
		for _, f := range open {
			_ = f.Close()
		}
	}
}

// held is the memory of heap and stacks in use.
func held() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// BenchmarkDirectUDP is the kernel's own loopback.
func BenchmarkDirectUDP(b *testing.B) {
	for _, size := range sizedPayloads() {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			to, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				b.Fatal(err)
			}
			var came counter
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				for buf := make([]byte, 2048); ; came.n.Add(1) {
					if _, err := to.Read(buf); err != nil {
						return
					}
				}
			}()
			from, err := net.DialUDP("udp", nil, to.LocalAddr().(*net.UDPAddr))
			if err != nil {
				b.Fatal(err)
			}
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ResetTimer()
			for range b.N {
				if _, err := from.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			came.report(b)
			_ = from.Close()
			_ = to.Close()
			<-ended
		})
	}
}
