package telemetry

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// accessLog writes a line for each finished connection, from a queue of its own: a disk
// that is full or slow costs lines, and they are counted. Lines that wait are written
// together: one is written at once, and those that come soon behind it after writePause.
type accessLog struct {
	w       io.Writer // nil: no access log
	format  *lineFormat
	ready   chan struct{} // there are lines
	hurry   chan struct{} // there are so many that they must not wait
	lost    *prometheus.CounterVec
	overrun prometheus.Counter // of lost: no room in the queue
	failed  prometheus.Counter // of lost: the write failed
	log     *slog.Logger
	broken  bool // the last write failed; run's own

	mu      sync.Mutex
	limit   int // of waiting and writing together
	waiting []record
	writing int
}

func newAccessLog(cfg Config) *accessLog {
	l := &accessLog{
		w: cfg.AccessLog, log: cfg.Log, limit: cfg.AccessLogQueue,
		format: newLineFormat(cfg.AccessLogJSON), ready: make(chan struct{}, 1), hurry: make(chan struct{}, 1),
		lost: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "raceway_access_log_lines_lost_total", Help: "Access log lines that were not written, by reason.",
		}, []string{"reason"}),
	}
	l.overrun, l.failed = l.lost.WithLabelValues("queue_full"), l.lost.WithLabelValues("write_error")
	return l
}

func (l *accessLog) collectors() []prometheus.Collector { return []prometheus.Collector{l.lost} }

func (l *accessLog) add(r record) {
	if l.w == nil {
		return
	}
	l.mu.Lock()
	room := len(l.waiting)+l.writing < l.limit
	if room {
		l.waiting = append(l.waiting, r)
	}
	many := len(l.waiting) >= l.limit/2
	l.mu.Unlock()
	if !room {
		l.overrun.Inc()
		return
	}
	signal(l.ready)
	if many {
		signal(l.hurry)
	}
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then what waits in the queue.
func (l *accessLog) run(ctx context.Context) {
	if l.w == nil {
		return
	}
	var spare []record
	for {
		select {
		case <-l.ready:
			spare = l.writeWaiting(spare)
		case <-ctx.Done():
			l.flush()
			return
		}
		l.pause(ctx)
	}
}

// writePause is what lies between two writes: each takes a system call and a wakeup, which is more than
// a line does.
const writePause = 10 * time.Millisecond

func (l *accessLog) pause(ctx context.Context) {
	timer := time.NewTimer(writePause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.hurry:
	case <-ctx.Done():
	}
}

// flush gives a writer that takes deadlines (a pipe, a socket) a second for all that waits.
func (l *accessLog) flush() {
	if w, ok := l.w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		if err := w.SetWriteDeadline(time.Now().Add(time.Second)); err == nil {
			defer func() { _ = w.SetWriteDeadline(time.Time{}) }()
		}
	}
	l.writeWaiting(nil)
}

// Bounds of what is kept from one write to the next.
const (
	chunkSize = 32 << 10 // bytes written at one time, and a line
	spareSize = 256      // records
)

// writeWaiting writes all lines that wait. spare becomes the queue, and what was that is the
// next spare one.
func (l *accessLog) writeWaiting(spare []record) []record {
	l.mu.Lock()
	lines := l.waiting
	l.waiting, l.writing = spare[:0], len(lines)
	l.mu.Unlock()
	for i := range lines {
		l.format.add(&lines[i])
		if l.format.buf.Len() >= chunkSize {
			l.writeChunk()
		}
	}
	l.writeChunk()
	l.mu.Lock()
	l.writing = 0
	l.mu.Unlock()
	if cap(lines) > spareSize {
		return nil
	}
	clear(lines)
	return lines
}

// writeChunk reports a writer's failure once, and once that it works again.
func (l *accessLog) writeChunk() {
	chunk := l.format.buf.Bytes()
	if len(chunk) == 0 {
		return
	}
	n, err := l.w.Write(chunk)
	switch {
	case err != nil:
		l.failed.Add(float64(bytes.Count(chunk[min(n, len(chunk)):], []byte{'\n'})))
		if !l.broken {
			l.log.Error("write access log: lines are lost until it works again", "error", err)
		}
	case l.broken:
		l.log.Info("the access log is written again")
	}
	l.broken = err != nil
	l.format.buf.Reset()
}
