package link

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// arms are the choices of transports; both leave it to the path.
var arms = [][]string{{"h2"}, {"h3"}, {"h2", "h3"}}

// eachPath calls run for each round trip and loss.
func eachPath(b *testing.B, run func(b *testing.B, way Path)) {
	for _, rtt := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 80 * time.Millisecond} {
		for _, loss := range []float64{0, 0.001, 0.01, 0.03} {
			b.Run(fmt.Sprintf("rtt=%v/loss=%v%%", rtt, loss*100), func(b *testing.B) {
				run(b, Path{Delay: rtt / 2, Loss: loss, Rate: rate, Seed: 1})
			})
		}
	}
}

// bulkTime is how long one transport moves bulk before it is another's turn.
const bulkTime = 5 * time.Second

// BenchmarkBulk is what each transport, and the choice by the path, moves by 1 and by 8 streams of
// one connection, in turn: medians in MB/s, and the choice's share of the better one's. -benchtime 5x
// is five turns of each.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			eachPath(b, func(b *testing.B, way Path) {
				worlds := make([]*tunnels, len(arms))
				for i, transports := range arms {
					worlds[i] = newTunnels(b, way, transports...)
					worlds[i].settle(b)
				}
				moved := make([][]float64, len(arms))
				for b.Loop() {
					for i, w := range worlds {
						moved[i] = append(moved[i], w.bulk(b, streams))
					}
				}
				report(b, moved)
			})
		})
	}
}

// report is for the medians of what arms moved.
func report(b *testing.B, moved [][]float64) {
	b.Helper()
	medians := make([]float64, len(arms))
	for i, all := range moved {
		b.Logf("%s: %.2f MB/s", strings.Join(arms[i], "+"), all)
		slices.Sort(all)
		medians[i] = all[len(all)/2]
	}
	b.ReportMetric(0, "ns/op") // would be that of a turn of each
	b.ReportMetric(medians[0], "h2-MB/s")
	b.ReportMetric(medians[1], "h3-MB/s")
	b.ReportMetric(medians[2], "auto-MB/s")
	b.ReportMetric(medians[2]/max(medians[0], medians[1]), "auto/best")
}

// bulk is how many MB a second arrive by so many streams.
func (w *tunnels) bulk(b *testing.B, streams int) float64 {
	b.Helper()
	var got atomic.Int64
	w.moveFor(b, bulkTime, streams, &got)
	return float64(got.Load()) / bulkTime.Seconds() / 1e6
}

// moveFor fetches by so many streams for a while, and counts what has come by then.
func (w *tunnels) moveFor(b *testing.B, d time.Duration, streams int, got *atomic.Int64) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), d)
	defer cancel()
	var work sync.WaitGroup
	for range streams {
		work.Go(func() {
			s, err := w.ask(b.Context(), 1<<40)
			if err != nil {
				b.Error(err)
				return
			}
			defer context.AfterFunc(ctx, func() { _ = s.Close() })()
			buf := make([]byte, 128<<10)
			for ctx.Err() == nil {
				n, err := s.Read(buf)
				if ctx.Err() == nil {
					got.Add(int64(n))
				}
				if err != nil && ctx.Err() == nil {
					b.Error(err)
					return
				}
			}
		})
	}
	work.Wait()
}

// warmTime is how long bulk is moved before anything is measured, and knownTime how long at the most
// until a choice of transports knows the path.
const (
	warmTime  = 5 * time.Second
	knownTime = 25 * time.Second
)

// settle has connections know the path's pace, and a choice of transports whether it is bad.
func (w *tunnels) settle(b *testing.B) {
	b.Helper()
	var got atomic.Int64
	start := time.Now()
	w.moveFor(b, warmTime, 1, &got)
	if len(w.clients) == 1 {
		return
	}
	for over := false; !over; {
		w.moveFor(b, time.Second, 1, &got) // its opening tells us what the server lost
		bad, quality := w.ours.Bad(w.key.Remote.Addr())
		theirs := w.theirs.Ours(w.key.Local)
		if over = bad || theirs.Segments > 20_000 || time.Since(start) > knownTime; over {
			b.Logf("the path is bad: %v, by %v; theirs: %v", bad, quality, theirs)
		}
	}
	w.moveFor(b, warmTime, 1, &got) // by what was chosen
}

// BenchmarkRequestBesideBulk is 256 bytes there and back while another stream of the connection
// moves bulk.
func BenchmarkRequestBesideBulk(b *testing.B) {
	eachPath(b, func(b *testing.B, way Path) {
		for _, transports := range arms {
			b.Run(strings.Join(transports, "+"), func(b *testing.B) { requestBesideBulk(b, newTunnels(b, way, transports...)) })
		}
	})
}

func requestBesideBulk(b *testing.B, w *tunnels) {
	w.settle(b)
	s, err := w.get(b.Context(), 1)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	ctx, cancel := context.WithCancel(b.Context())
	var bulk sync.WaitGroup
	bulk.Go(func() {
		for ctx.Err() == nil {
			if s, err := w.get(ctx, 1<<20); err == nil {
				_ = s.Close()
			}
		}
	})
	defer bulk.Wait()
	defer cancel()
	var took []time.Duration
	buf := make([]byte, 256)
	for b.Loop() {
		start := time.Now()
		if _, err := s.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(s, buf); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}
