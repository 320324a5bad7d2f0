package telemetry

import (
	"io"
	"runtime"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// What each connection costs: `go test ./dataplane/telemetry -run '^$' -bench . -benchmem`.

func benchmarked(b *testing.B, cfg Config) *Telemetry {
	b.Helper()
	tel, err := New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	return tel
}

func BenchmarkOpenAndClose(b *testing.B) {
	for name, cfg := range map[string]Config{
		"with an access log": {AccessLog: io.Discard},
		"without":            {},
	} {
		b.Run(name, func(b *testing.B) {
			tel := benchmarked(b, cfg)
			stop := run(b, tel)
			defer stop()
			a := attempt()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					c := tel.Open(a)
					c.Sent(1000)
					c.Close(FlagsNone, nil)
				}
			})
		})
	}
}

func BenchmarkRefuse(b *testing.B) {
	tel := benchmarked(b, Config{})
	a := attempt()
	b.ReportAllocs()
	for b.Loop() {
		tel.Refuse(a, FlagsConnect, io.ErrUnexpectedEOF)
	}
}

func BenchmarkDecided(b *testing.B) {
	tel := benchmarked(b, Config{})
	d := Decision{Kind: "AuthorizationPolicy", Policy: dataplane.Name{Namespace: "shop", Name: "allow-web"}, Allowed: true}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			tel.Decided(d)
		}
	})
}

// BenchmarkIdleConnections is what 15,000 open connections take: bytes each, and the time of
// a report on them.
func BenchmarkIdleConnections(b *testing.B) {
	const count = 15_000
	tel := benchmarked(b, Config{})
	a := attempt()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	conns := make([]*Conn, count)
	for i := range conns {
		conns[i] = tel.Open(a)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	now := time.Now().Add(time.Hour)
	tel.report(now)
	for b.Loop() {
		tel.report(now)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/count-8, "bytes/conn")
	runtime.KeepAlive(conns)
}
