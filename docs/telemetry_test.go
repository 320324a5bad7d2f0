package docs

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// table returns the rows of the table below <!-- mark -->.
func table(t *testing.T, name, mark string) [][]string {
	t.Helper()
	lines := page(t, name)
	at := slices.Index(lines, "<!-- "+mark+" -->")
	if at < 0 {
		t.Fatalf("%s has no %s", name, mark)
	}
	var rows [][]string
	for _, line := range lines[at+3:] {
		if !strings.HasPrefix(line, "|") {
			break
		}
		rows = append(rows, cells(line))
	}
	return rows
}

var word = regexp.MustCompile("`([^`]+)`")

func words(cell string) []string {
	var all []string
	for _, match := range word.FindAllStringSubmatch(cell, -1) {
		all = append(all, match[1])
	}
	slices.Sort(all)
	return all
}

// described is one metric, on the page or in a registry.
type described struct {
	kind   string
	labels string
}

// documented is what the page says of connections' metrics and of our own.
func documented(t *testing.T) map[string]described {
	t.Helper()
	var labels []string
	for _, row := range table(t, "telemetry.md", "labels: connections") {
		labels = append(labels, words(row[0])...)
	}
	slices.Sort(labels)
	all := map[string]described{}
	for _, row := range table(t, "telemetry.md", "metrics: connections") {
		all[words(row[0])[0]] = described{row[1], strings.Join(labels, " ")}
	}
	for _, row := range table(t, "telemetry.md", "metrics: own") {
		all[words(row[0])[0]] = described{row[1], strings.Join(words(row[2]), " ")}
	}
	return all
}

func scrape(t *testing.T, registry *prometheus.Registry) map[string]described {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]described{}
	for _, f := range families {
		var labels []string
		for _, pair := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, pair.GetName())
		}
		slices.Sort(labels)
		all[f.GetName()] = described{strings.ToLower(f.GetType().String()), strings.Join(labels, " ")}
	}
	return all
}

// exercise makes telemetry in which every metric has a value. It stops with the test.
func exercise(t *testing.T, log *bytes.Buffer) *prometheus.Registry {
	t.Helper()
	registry := prometheus.NewRegistry()
	tel, err := telemetry.New(telemetry.Config{Registerer: registry, AccessLog: log, Interval: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	err = tel.Attach(telemetry.Sources{
		Pods: func() map[dataplane.CaptureState]int {
			return map[dataplane.CaptureState]int{dataplane.CaptureInForce: 1}
		},
		Certificates: func() []telemetry.Certificate { return make([]telemetry.Certificate, 1) },
		Pool:         func() telemetry.Pool { return telemetry.Pool{} },
		Staleness:    func() time.Duration { return time.Second },
		Hooks: func() ([]telemetry.Counter, error) {
			return []telemetry.Counter{{Hook: "guard", Reason: "dropped_connect"}}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- tel.Run(ctx) }()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tel.Decided(telemetry.Decision{})
	tel.HandshakeFailed(telemetry.Inbound, "expired")
	tel.LimitReached("buffers")
	tel.Repaired("routing")
	tel.DatagramMoved(telemetry.Outbound)
	tel.DatagramsDropped(telemetry.Outbound, "queue", 1)
	tel.Refuse(telemetry.Attempt{Direction: telemetry.Inbound}, telemetry.FlagsDeny, errors.New("no"))
	c := tel.Open(telemetry.Attempt{Direction: telemetry.Outbound, Socket: conn.(*net.TCPConn)})
	c.Sent(1)
	for deadline := time.Now().Add(10 * time.Second); scrape(t, registry)["raceway_tcp_rtt_seconds"].kind == ""; {
		if time.Now().After(deadline) {
			t.Fatal("a live connection did not report")
		}
		c.Sent(1)
		time.Sleep(5 * time.Millisecond)
	}
	c.Close(telemetry.FlagsNone, nil)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return registry
}

func TestMetricsAreThoseOfThePage(t *testing.T) {
	want, got := documented(t), scrape(t, exercise(t, new(bytes.Buffer)))
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got[name] != want[name] {
			t.Errorf("%s is %+v, the page says %+v", name, got[name], want[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[name]; !ok {
			t.Errorf("the page lacks %s", name)
		}
	}
}

func TestResponseFlagsAreThoseOfThePage(t *testing.T) {
	var got []string
	for _, row := range table(t, "telemetry.md", "flags") {
		got = append(got, words(row[0])[0])
	}
	want := []telemetry.Flags{
		telemetry.FlagsNone, telemetry.FlagsDeny, telemetry.FlagsConnect, telemetry.FlagsTLS, telemetry.FlagsRoute,
		telemetry.FlagsLimit, telemetry.FlagsReset, telemetry.FlagsDrained, telemetry.FlagsPeer, telemetry.FlagsUnknown,
	}
	if !slices.EqualFunc(got, want, func(g string, w telemetry.Flags) bool { return g == string(w) }) {
		t.Errorf("the page has %q, the code %q", got, want)
	}
}

func TestAccessLogHasThePagesFields(t *testing.T) {
	lines := page(t, "telemetry.md")
	want := lines[slices.Index(lines, "<!-- log -->")+2]
	var log bytes.Buffer
	exercise(t, &log)
	got, _, _ := strings.Cut(log.String(), "\n")
	key := regexp.MustCompile(`(?:^| )([a-z_.]+)=`)
	names := func(line string) (all []string) {
		for _, match := range key.FindAllStringSubmatch(line, -1) {
			all = append(all, match[1])
		}
		return all
	}
	if !slices.Equal(names(got), names(want)) {
		t.Errorf("a line is\n%s\nthe page has\n%s", got, want)
	}
}
