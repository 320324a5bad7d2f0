package telemetry

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// accessLog writes a line for each finished connection, from a queue of its own: a disk
// that is full or slow costs lines, and they are counted.
type accessLog struct {
	w       io.Writer
	handler slog.Handler // nil: no access log
	queue   chan admin.Flow
	lost    *prometheus.CounterVec
	overrun prometheus.Counter // of lost: no room in the queue
	failed  prometheus.Counter // of lost: the write failed
	log     *slog.Logger
}

func newAccessLog(cfg Config) *accessLog {
	l := &accessLog{w: cfg.AccessLog, log: cfg.Log, lost: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "raceway_access_log_lines_lost_total", Help: "Access log lines that were not written, by reason.",
	}, []string{"reason"})}
	l.overrun, l.failed = l.lost.WithLabelValues("queue_full"), l.lost.WithLabelValues("write_error")
	if cfg.AccessLog == nil {
		return l
	}
	l.queue = make(chan admin.Flow, cfg.AccessLogQueue)
	if cfg.AccessLogJSON {
		l.handler = slog.NewJSONHandler(cfg.AccessLog, nil)
	} else {
		l.handler = slog.NewTextHandler(cfg.AccessLog, nil)
	}
	return l
}

func (l *accessLog) collectors() []prometheus.Collector { return []prometheus.Collector{l.lost} }

func (l *accessLog) add(f *admin.Flow) {
	if l.handler == nil {
		return
	}
	select {
	case l.queue <- *f:
	default:
		l.overrun.Inc()
	}
}

// run writes until ctx ends, and then what waits in the queue.
func (l *accessLog) run(ctx context.Context) {
	if l.handler == nil {
		return
	}
	broken := false
	for {
		select {
		case f := <-l.queue:
			broken = l.write(&f, broken)
		case <-ctx.Done():
			l.flush(broken)
			return
		}
	}
}

// flush gives a writer that takes deadlines (a pipe, a socket) a second for all that waits.
func (l *accessLog) flush(broken bool) {
	if w, ok := l.w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		if err := w.SetWriteDeadline(time.Now().Add(time.Second)); err == nil {
			defer func() { _ = w.SetWriteDeadline(time.Time{}) }()
		}
	}
	for {
		select {
		case f := <-l.queue:
			broken = l.write(&f, broken)
		default:
			return
		}
	}
}

// write reports a writer's failure once, and once that it works again.
func (l *accessLog) write(f *admin.Flow, broken bool) bool {
	err := l.handler.Handle(context.Background(), line(f))
	switch {
	case err != nil:
		l.failed.Inc()
		if !broken {
			l.log.Error("write access log: lines are lost until it works again", "error", err)
		}
		return true
	case broken:
		l.log.Info("the access log is written again")
	}
	return false
}

// line has the fields that ztunnel's log has, in its order, and all of them always.
func line(f *admin.Flow) slog.Record {
	level := slog.LevelInfo
	if f.Flags == string(FlagsDeny) {
		level = slog.LevelWarn
	}
	r := slog.NewRecord(f.Time, level, "connection", 0)
	r.AddAttrs(
		slog.String("src.addr", addr(f.Source.Addr)),
		slog.String("src.workload", f.Source.Workload),
		slog.String("src.namespace", f.Source.Namespace),
		slog.String("src.identity", identity(f.Source.Identity)),
		slog.String("dst.addr", addr(f.Destination.Addr)),
		slog.String("dst.hbone_addr", addr(f.Tunnel)),
		slog.String("dst.service", f.Service),
		slog.String("dst.workload", f.Destination.Workload),
		slog.String("dst.namespace", f.Destination.Namespace),
		slog.String("dst.identity", identity(f.Destination.Identity)),
		slog.String("direction", f.Direction),
		slog.Uint64("bytes_sent", f.Sent),
		slog.Uint64("bytes_recv", f.Received),
		slog.String("duration", f.Duration.Round(time.Microsecond).String()),
		slog.String("error", f.Cause),
	)
	return r
}

func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func identity(id spiffe.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}
