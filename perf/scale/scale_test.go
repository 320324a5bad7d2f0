package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/raceway-mesh/raceway/e2e/cluster/clustertest"
)

// The test's binary is also the source's process.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "source" {
		if err := run(context.Background(), os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func TestASmallClusterIsMeasured(t *testing.T) {
	clustertest.Require(t)
	before := remains()
	c := Config{
		Nodes: 5, Pods: 50, Services: 10, Policies: 10, Sources: 2, Rate: 20, Duration: 2 * time.Second,
		Settling: 100 * time.Millisecond, Self: []string{os.Args[0]}, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	report, err := Measure(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Starts) != 3 || len(report.Loads) != 3 {
		t.Fatalf("%d starts and %d loads", len(report.Starts), len(report.Loads))
	}
	for _, s := range report.Starts {
		if s.Published <= 0 || s.Current < s.Published || s.CurrentCPU == 0 || s.Heap == 0 || s.Received == 0 || s.ResidentPeak < s.Resident {
			t.Errorf("start: %+v", s)
		}
	}
	for i, l := range report.Loads {
		if want := []int{0, 1, 2}[i]; l.Sources != want || l.Changes <= 0 || l.APIServerCores <= 0 {
			t.Errorf("load: %+v", l)
		}
		if l.Sources > 0 && (l.Own.Count == 0 || l.Own.P50 <= 0 || l.Own.P99 > l.Own.Max || l.Foreign.Count == 0 || l.Snapshots == 0 || l.SourceCores <= 0 || l.Received == 0) {
			t.Errorf("load: %+v", l)
		}
	}
	var table bytes.Buffer
	if err := report.WriteTable(&table); err != nil || !strings.Contains(table.String(), "50 pods") {
		t.Errorf("%v: %s", err, table.String())
	}
	path, err := report.WriteJSON(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(content, &back); err != nil || back.Pods != 50 || len(back.Loads) != 3 {
		t.Errorf("%v: %s", err, content)
	}
	if left := remains(); !slices.Equal(left, before) {
		t.Errorf("left behind: %q, before it was %q", left, before)
	}
}

func remains() []string {
	dirs, _ := filepath.Glob("/var/tmp/raceway-scale-*")     // the pattern is good
	spaces, _ := filepath.Glob("/run/netns/raceway-scale-*") // as above
	return append(dirs, spaces...)
}

func TestConfigComplains(t *testing.T) {
	good := Config{Nodes: 2, Pods: 4, Services: 2, Sources: 2, Rate: 1, Duration: time.Second}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config){
		"one node":                  func(c *Config) { c.Nodes = 1 },
		"a service without a pod":   func(c *Config) { c.Services = 5 },
		"a node without a pod":      func(c *Config) { c.Pods = 1 },
		"more pods than addresses":  func(c *Config) { c.Pods = 501 },
		"more sources than nodes":   func(c *Config) { c.Sources = 3 },
		"no changes":                func(c *Config) { c.Rate = 0 },
		"changes for no time":       func(c *Config) { c.Duration = 0 },
		"fewer policies than none":  func(c *Config) { c.Policies = -1 },
		"no source in the last run": func(c *Config) { c.Sources = 0 },
	} {
		c := good
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%s: no complaint", name)
		}
	}
}

func TestQuantiles(t *testing.T) {
	if got := quantiles(nil); got != (Latency{}) {
		t.Errorf("of nothing: %+v", got)
	}
	var all []time.Duration
	for n := 101; n > 0; n-- {
		all = append(all, time.Duration(n))
	}
	if got := quantiles(all); got != (Latency{Count: 101, P50: 51, P99: 100, Max: 101}) {
		t.Errorf("of 1 to 101: %+v", got)
	}
}
