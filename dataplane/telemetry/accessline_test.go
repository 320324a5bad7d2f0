package telemetry

import (
	"net/netip"
	"testing"
	"time"
)

// FuzzTextLine holds the text that is put together here to slog's.
func FuzzTextLine(f *testing.F) {
	for _, s := range []string{
		"", "plain", "two words", "a=b", `a "quote"`, `back\slash`, "tab\t", "line\n", "häßlich", "\xff", "\x7f", "<a&b>", "a\u00a0b", "💥",
	} {
		f.Add(s, s, s, "fe80::1%eth0", uint64(7), int64(1500))
		f.Add("shop", "web-1", s, "10.0.0.1", uint64(0), int64(-1))
	}
	f.Fuzz(func(t *testing.T, workload, service, cause, address string, sent uint64, took int64) {
		at := time.Date(2026, 11, 20, 10, 0, 0, 123_456_789, time.FixedZone("", 3600))
		from, _ := netip.ParseAddr(address)
		r := &record{
			facts: facts{
				parties: &parties{source: party{workload: workload, namespace: "shop"}, service: service, direction: Outbound},
				source:  netip.AddrPortFrom(from, 80), destination: netip.MustParseAddrPort("[2001:db8::1]:443"), started: at.Add(-time.Duration(took)),
			},
			time: at, sent: sent, cause: cause, flags: FlagsDeny,
		}
		own, slogs := newLineFormat(false), newLineFormat(false)
		own.add(r)
		if err := slogs.handler.Handle(t.Context(), slogRecord(r)); err != nil {
			t.Fatal(err)
		}
		if own.buf.String() != slogs.buf.String() {
			t.Errorf("a line of one's own and slog's:\n%s%s", &own.buf, &slogs.buf)
		}
	})
}
