package telemetry

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"strconv"
	"time"
)

// lineFormat appends access log lines to buf, as slog writes them.
type lineFormat struct {
	buf     bytes.Buffer
	handler slog.Handler // writes to buf
	asJSON  bool
}

func newLineFormat(asJSON bool) *lineFormat {
	f := &lineFormat{asJSON: asJSON}
	if asJSON {
		f.handler = slog.NewJSONHandler(&f.buf, nil)
	} else {
		f.handler = slog.NewTextHandler(&f.buf, nil)
	}
	return f
}

// add appends r's line. There is one for each connection, so a line of text is put together
// here as long as all its values are plain; slog takes four times as long.
func (f *lineFormat) add(r *record) {
	if !f.asJSON {
		line := textLine{p: f.buf.AvailableBuffer()}
		if line.connection(r) {
			f.buf.Write(line.p)
			return
		}
	}
	// Writing to a bytes.Buffer does not fail.
	_ = f.handler.Handle(context.Background(), slogRecord(r))
}

func lineLevel(r *record) slog.Level {
	if r.flags == FlagsDeny {
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// slogRecord has the fields that ztunnel's log has, in its order, and all of them always.
func slogRecord(r *record) slog.Record {
	p := r.parties
	out := slog.NewRecord(r.time, lineLevel(r), "connection", 0)
	out.AddAttrs(
		slog.String("src.addr", addr(r.source)),
		slog.String("src.workload", p.source.workload),
		slog.String("src.namespace", p.source.namespace),
		slog.String("src.identity", p.source.principal),
		slog.String("dst.addr", addr(r.destination)),
		slog.String("dst.hbone_addr", addr(r.tunnel)),
		slog.String("dst.service", p.service),
		slog.String("dst.workload", p.destination.workload),
		slog.String("dst.namespace", p.destination.namespace),
		slog.String("dst.identity", p.destination.principal),
		slog.String("direction", string(p.direction)),
		slog.Uint64("bytes_sent", r.sent),
		slog.Uint64("bytes_recv", r.received),
		slog.String("duration", r.duration().Round(time.Microsecond).String()),
		slog.String("error", r.cause),
	)
	return out
}

func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// textLine is a line of slog's TextHandler in the making.
type textLine struct {
	p   []byte
	odd bool // a value needs more than quotes
}

// connection is slogRecord as text, and false for one that slog must write.
func (l *textLine) connection(r *record) bool {
	p := r.parties
	l.p = append(l.p, "time="...)
	l.p = r.time.AppendFormat(l.p, "2006-01-02T15:04:05.000Z07:00")
	l.p = append(l.p, " level="...)
	l.p = append(l.p, lineLevel(r).String()...)
	l.p = append(l.p, " msg=connection"...)
	l.addr(" src.addr=", r.source)
	l.text(" src.workload=", p.source.workload)
	l.text(" src.namespace=", p.source.namespace)
	l.text(" src.identity=", p.source.principal)
	l.addr(" dst.addr=", r.destination)
	l.addr(" dst.hbone_addr=", r.tunnel)
	l.text(" dst.service=", p.service)
	l.text(" dst.workload=", p.destination.workload)
	l.text(" dst.namespace=", p.destination.namespace)
	l.text(" dst.identity=", p.destination.principal)
	l.text(" direction=", string(p.direction))
	l.p = append(l.p, " bytes_sent="...)
	l.p = strconv.AppendUint(l.p, r.sent, 10)
	l.p = append(l.p, " bytes_recv="...)
	l.p = strconv.AppendUint(l.p, r.received, 10)
	l.p = append(l.p, " duration="...)
	l.p = append(l.p, r.duration().Round(time.Microsecond).String()...)
	l.text(" error=", r.cause)
	l.p = append(l.p, '\n')
	return !l.odd
}

func (l *textLine) addr(key string, a netip.AddrPort) {
	l.p = append(l.p, key...)
	if !a.IsValid() {
		l.p = append(l.p, `""`...)
		return
	}
	l.odd = l.odd || a.Addr().Zone() != "" // which may be anything
	l.p = a.AppendTo(l.p)
}

// text quotes a value where slog does. What would also have to be escaped is odd.
func (l *textLine) text(key, value string) {
	quoted := value == ""
	for i := range len(value) {
		switch c := value[i]; {
		case c == ' ' || c == '=':
			quoted = true
		case c < ' ' || c >= 0x7f || c == '"' || c == '\\':
			l.odd = true
		}
	}
	l.p = append(l.p, key...)
	if !quoted {
		l.p = append(l.p, value...)
		return
	}
	l.p = append(l.p, '"')
	l.p = append(l.p, value...)
	l.p = append(l.p, '"')
}
