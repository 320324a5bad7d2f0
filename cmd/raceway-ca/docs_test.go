package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestMetricsAreThoseOfThePage(t *testing.T) {
	page, err := os.ReadFile("../../docs/telemetry.md")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, match := range regexp.MustCompile("(?m)^\\| `(raceway_ca_[a-z_]+)` ").FindAllSubmatch(page, -1) {
		want = append(want, string(match[1]))
	}
	m, err := newMetrics()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.watch(newAuthority(t)); err != nil {
		t.Fatal(err)
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "raceway_") {
			got = append(got, f.GetName())
		}
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("metrics are %q, the page has %q", got, want)
	}
}
