package traffic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sync/errgroup"
)

// Latency is a distribution of times.
type Latency struct {
	Count               int64
	P50, P90, P99, P999 time.Duration
	Max                 time.Duration
}

// RateResult is what a number of like operations came to.
type RateResult struct {
	Latency
	Elapsed time.Duration
}

// PerSecond is the rate that was reached.
func (r RateResult) PerSecond() float64 { return float64(r.Count) / r.Elapsed.Seconds() }

// newHistogram keeps three digits between 1 µs and a minute.
func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(int64(time.Microsecond), int64(time.Minute), 3)
}

// newHistograms makes one for each that measures, before the time runs: they are large.
func newHistograms(n int) []*hdrhistogram.Histogram {
	all := make([]*hdrhistogram.Histogram, n)
	for i := range all {
		all[i] = newHistogram()
	}
	return all
}

func summarize(histograms []*hdrhistogram.Histogram) (Latency, error) {
	all := newHistogram()
	for _, h := range histograms {
		if lost := all.Merge(h); lost != 0 {
			return Latency{}, fmt.Errorf("%d latencies are out of the histogram's range", lost)
		}
	}
	if all.TotalCount() == 0 {
		return Latency{}, errors.New("not one exchange ended in time")
	}
	at := func(quantile float64) time.Duration { return time.Duration(all.ValueAtQuantile(quantile)) }
	return Latency{Count: all.TotalCount(), P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: time.Duration(all.Max())}, nil
}

// ExchangeOptions says how requests are made.
type ExchangeOptions struct {
	Conns    int
	Duration time.Duration
	// Rate is of requests per second on all connections together; 0 is as many as go, each
	// connection with one at a time.
	Rate float64
	// Size is of a request and of its response; default MessageSize, at most 1 MiB.
	Size int
}

// Exchange sends requests on open connections and waits for each response.
//
// With a rate, requests have fixed times, spread evenly over the connections. One that
// cannot be sent at its time, because the response before it is late, counts from that time
// on: a stall costs every request that it delays, and is not omitted because the client
// waited with it. A request that is late only because this process woke up late counts from
// when it was sent: that is the client's own fault and not the path's.
func Exchange(ctx context.Context, to netip.AddrPort, opts ExchangeOptions) (RateResult, error) {
	if opts.Size == 0 {
		opts.Size = MessageSize
	}
	if opts.Size < 0 || opts.Size > maxMessageSize {
		return RateResult{}, fmt.Errorf("exchange messages of %d bytes: want 1 to %d", opts.Size, maxMessageSize)
	}
	conns, err := dialAll(ctx, to, opts.Conns, binary.BigEndian.AppendUint32([]byte{echoMode}, uint32(opts.Size))...)
	if err != nil {
		return RateResult{}, fmt.Errorf("exchange messages: %w", err)
	}
	defer func() { _ = closeAll(conns) }() // they idle; an error would tell nothing
	var group errgroup.Group
	histograms := newHistograms(len(conns))
	start := time.Now()
	for i, conn := range conns {
		schedule := schedule{start: start}
		if opts.Rate > 0 {
			schedule.interval = time.Duration(float64(len(conns)) / opts.Rate * float64(time.Second))
			schedule.start = start.Add(schedule.interval * time.Duration(i) / time.Duration(len(conns)))
		}
		group.Go(func() error { return exchange(conn, opts.Size, schedule, start.Add(opts.Duration), histograms[i]) })
	}
	if err := group.Wait(); err != nil {
		return RateResult{}, fmt.Errorf("exchange messages: %w", err)
	}
	elapsed := time.Since(start)
	latency, err := summarize(histograms)
	if err != nil {
		return RateResult{}, fmt.Errorf("exchange messages: %w", err)
	}
	return RateResult{Latency: latency, Elapsed: elapsed}, nil
}

// schedule says when requests are due; without an interval, at once.
type schedule struct {
	start    time.Time
	interval time.Duration
	made     int
}

// wait waits for the next request's time and returns from when its latency counts.
func (s *schedule) wait() time.Time {
	due := s.due()
	s.made++
	if early := time.Until(due); early > 0 {
		time.Sleep(early)
		return time.Now()
	}
	return due
}

// due reports when the next request is to be sent.
func (s *schedule) due() time.Time {
	if s.interval == 0 {
		return time.Now()
	}
	return s.start.Add(s.interval * time.Duration(s.made))
}

func exchange(conn net.Conn, size int, s schedule, until time.Time, h *hdrhistogram.Histogram) error {
	request, response := randomBytes(size), make([]byte, size)
	for number := uint64(0); s.due().Before(until); number++ {
		from := s.wait()
		// So that an old response is not taken for this one.
		request[0], request[size-1] = byte(number), byte(number>>8)
		if _, err := conn.Write(request); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, response); err != nil {
			return err
		}
		if err := h.RecordValue(max(int64(time.Since(from)), int64(time.Microsecond))); err != nil {
			return err
		}
		if !bytes.Equal(request, response) {
			return errors.New("the response is not the request")
		}
	}
	return nil
}

// Connect opens connections, one after the other on each worker, and exchanges one byte on
// each. The latency is from the start of the dial until that byte is back.
func Connect(ctx context.Context, to netip.AddrPort, workers int, d time.Duration) (RateResult, error) {
	var group errgroup.Group
	histograms := newHistograms(workers)
	start := time.Now()
	for i := range workers {
		group.Go(func() error {
			for time.Since(start) < d {
				begin := time.Now()
				if err := connectOnce(ctx, to); err != nil {
					return err
				}
				if err := histograms[i].RecordValue(max(int64(time.Since(begin)), int64(time.Microsecond))); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return RateResult{}, fmt.Errorf("open connections: %w", err)
	}
	elapsed := time.Since(start)
	latency, err := summarize(histograms)
	if err != nil {
		return RateResult{}, fmt.Errorf("open connections: %w", err)
	}
	return RateResult{Latency: latency, Elapsed: elapsed}, nil
}

// connectOnce waits for the server's FIN before it closes: the server is then the one with
// the TIME_WAIT, and the client's ports last.
func connectOnce(ctx context.Context, to netip.AddrPort) error {
	conn, err := dial(ctx, to, connectMode)
	if err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return errors.Join(err, conn.Close())
	}
	got, err := io.ReadAll(io.LimitReader(conn, 2))
	if err == nil && (len(got) != 1 || got[0] != connectMode) {
		err = fmt.Errorf("the answer is %q", got)
	}
	return errors.Join(err, conn.Close())
}
