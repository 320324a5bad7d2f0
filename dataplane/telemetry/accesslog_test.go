package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
)

type blocked struct {
	release chan struct{}
	io.Writer
}

func (b *blocked) Write(p []byte) (int, error) {
	<-b.release
	return b.Writer.Write(p)
}

func TestBlockedAccessLogCostsLinesAndNothingElse(t *testing.T) {
	var out strings.Builder
	w := &blocked{release: make(chan struct{}), Writer: &out}
	tel, registry := newTelemetry(t, Config{AccessLog: w, AccessLogQueue: 4})
	stop := run(t, tel)
	for range 20 {
		tel.Open(attempt()).Close(FlagsNone, nil)
	}
	close(w.release)
	stop()
	lines := strings.Count(out.String(), "\n")
	if lost := int(sum(t, registry, "raceway_access_log_lines_lost_total")); lines+lost != 20 || lost < 15 {
		t.Errorf("%d lines and %d lost of 20", lines, lost)
	}
}

// full has room for some lines. Of what is written together it takes those that fit.
type full struct{ left int }

func (f *full) Write(p []byte) (n int, err error) {
	for line := range bytes.Lines(p) {
		if f.left--; f.left < 0 {
			return n, errors.New("no space left on device")
		}
		n += len(line)
	}
	return n, nil
}

func TestFullDiskIsCountedAndReportedOnce(t *testing.T) {
	var log strings.Builder
	tel, registry := newTelemetry(t, Config{AccessLog: &full{left: 3}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	stop := run(t, tel)
	for range 10 {
		tel.Open(attempt()).Close(FlagsNone, nil)
	}
	stop()
	if lost := sum(t, registry, "raceway_access_log_lines_lost_total"); lost != 7 {
		t.Errorf("%v lines lost, want 7", lost)
	}
	if n := strings.Count(log.String(), "no space left"); n != 1 {
		t.Errorf("reported %d times, want once:\n%s", n, &log)
	}
}

func TestAccessLogHasItsFieldsInOrder(t *testing.T) {
	for _, asJSON := range []bool{false, true} {
		var out strings.Builder
		tel, _ := newTelemetry(t, Config{AccessLog: &out, AccessLogJSON: asJSON})
		stop := run(t, tel)
		c := tel.Open(attempt())
		c.Sent(3)
		c.Received(4)
		c.Close(FlagsReset, errors.New("the peer reset the stream"))
		stop()
		line, at := out.String(), -1
		for _, field := range strings.Fields("src.addr src.workload src.namespace src.identity dst.addr dst.hbone_addr dst.service dst.workload dst.namespace dst.identity direction bytes_sent bytes_recv duration error") {
			next := strings.Index(line, field)
			if next <= at {
				t.Errorf("%s is not where it belongs in %s", field, line)
			}
			at = next
		}
		if asJSON {
			var fields map[string]any
			if err := json.Unmarshal([]byte(line), &fields); err != nil || fields["bytes_sent"] != 3.0 || fields["error"] != "the peer reset the stream" {
				t.Errorf("%v in %s", err, line)
			}
		} else if !strings.Contains(line, `bytes_sent=3 bytes_recv=4`) || !strings.Contains(line, `error="the peer reset the stream"`) {
			t.Error(line)
		}
	}
}
