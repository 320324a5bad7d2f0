package h2_test

import (
	"context"
	"io"
	"net/netip"
	"sync"
	"testing"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/h2"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

func benchSession(b *testing.B, handler func(*hbone.ServerRequest)) hbone.Session {
	b.Helper()
	ca := hbonetest.NewCA(b)
	x, y := hbonetest.TCPPair(b)
	ct, st := hbonetest.Handshake(b, x, y, ca.ClientTLS(b, hbonetest.ClientID, hbonetest.ServerID), ca.ServerTLS(b, hbonetest.ServerID))
	done := make(chan error, 1)
	go func() { done <- h2.Server{}.ServeConn(context.Background(), context.Background(), st, handler) }()
	session, err := h2.Client{}.NewSession(b.Context(), ct)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = session.Close()
		<-session.Done()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return session
}

func benchOpen(b *testing.B, s hbone.Session) hbone.Stream {
	b.Helper()
	st, _, err := hbonetest.Open(context.Background(), s, &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		b.Fatal(err)
	}
	return st
}

func BenchmarkThroughput(b *testing.B) {
	for name, streams := range map[string]int{"1 stream": 1, "8 streams": 8} {
		b.Run(name, func(b *testing.B) {
			session := benchSession(b, func(r *hbone.ServerRequest) {
				s, err := r.Accept(hbone.Response{})
				if err != nil {
					return
				}
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, s, make([]byte, 64<<10))
				_ = s.CloseWrite()
			})
			const size = 64 << 10
			b.SetBytes(size)
			b.ReportAllocs()
			var wg sync.WaitGroup
			for range streams {
				s := benchOpen(b, session)
				wg.Go(func() {
					buf := make([]byte, size)
					for range b.N / streams {
						if _, err := s.Write(buf); err != nil {
							b.Error(err)
							return
						}
					}
					_ = s.CloseWrite()
					_, _ = io.ReadAll(s)
					_ = s.Close()
				})
			}
			wg.Wait()
		})
	}
}

func BenchmarkRequestResponse(b *testing.B) {
	s := benchOpen(b, benchSession(b, hbonetest.Echo))
	buf := make([]byte, 100)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(s, buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = s.Close()
}

func BenchmarkOpen(b *testing.B) {
	session := benchSession(b, hbonetest.Echo)
	b.ReportAllocs()
	for port := uint16(0); b.Loop(); port++ {
		st, _, err := hbonetest.Open(context.Background(), session, &hbone.Request{
			Authority:   "10.0.0.1:80",
			Forwarded:   hbone.Forwarded{For: netip.AddrPortFrom(netip.MustParseAddr("10.0.1.7"), port), Host: "db.default.svc.cluster.local"},
			Baggage:     hbone.Baggage{Cluster: "Kubernetes", Namespace: "default", WorkloadKind: "deployment", WorkloadName: "web", Service: "web", Version: "v1"},
			TraceParent: hbone.NewTraceParent(),
		})
		if err != nil {
			b.Fatal(err)
		}
		_ = st.Close()
	}
}
