package report

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// sample is a report of two scenarios whose rounds are given.
func sample(base, mesh []float64) *Report {
	r := &Report{
		Machine:   Machine{CPU: "a processor", Commit: "abc+", Command: "raceway perf run", Date: time.Unix(0, 0).UTC()},
		Rounds:    len(mesh),
		Scenarios: []Entry{{"plain-cross", "no mesh"}, {"relay-tls", "bare Go relays, TLS"}, {"hbone-cross", "HBONE, across nodes"}},
		Workloads: []Entry{{"bulk-1", "bulk, 1 stream"}, {"connect", "new connections"}},
	}
	for i := range mesh {
		r.Add("relay-tls", "bulk-1", "CPU total", "s/GB", base[i])
		r.Add("hbone-cross", "bulk-1", "CPU total", "s/GB", mesh[i])
	}
	return r
}

func TestEachRoundIsKeptWithItsMedian(t *testing.T) {
	r := sample([]float64{4, 1, 100, 2}, []float64{2, 2, 2, 2})
	x := r.Find("relay-tls", "bulk-1", "CPU total")
	if x.Median != 3 || x.Min != 1 || x.Max != 100 || !slices.Equal(x.Rounds, []float64{4, 1, 100, 2}) {
		t.Errorf("%+v", x)
	}
	path, err := r.WriteJSON(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	again, err := Read(path)
	if err != nil || !slices.Equal(again.Find("relay-tls", "bulk-1", "CPU total").Rounds, x.Rounds) {
		t.Errorf("read again: %+v, %v", again, err)
	}
}

func TestReadRefusesWhatIsNoReport(t *testing.T) {
	path := t.TempDir() + "/x.json"
	for _, content := range []string{"", "{}", "[]"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), "read the results") {
			t.Errorf("%q: %v", content, err)
		}
	}
	if _, err := Read(path + ".none"); err == nil {
		t.Error("a file that is not there was read")
	}
}

func TestTableShowsWhatWasMeasured(t *testing.T) {
	var table bytes.Buffer
	if err := sample([]float64{4, 2}, []float64{1234, 1235}).WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"bulk, 1 stream", "CPU total, s/GB", "3.00 ±33%", "HBONE, across nodes", "raceway perf run"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("the table has no %q:\n%s", want, table.String())
		}
	}
	for _, no := range []string{"no mesh", "new connections"} {
		if strings.Contains(table.String(), no) {
			t.Errorf("the table has %q, which was not measured:\n%s", no, table.String())
		}
	}
}

func TestTargetsAreRatiosOfTheSameRound(t *testing.T) {
	for _, test := range []struct {
		base, mesh []float64
		want       string
		missed     bool
	}{
		// The machine became ten times slower: the ratios did not change.
		{[]float64{4, 40, 4}, []float64{3.6, 36, 3.6}, "0.90 × relay-tls CPU total", false},
		{[]float64{4, 4, 4}, []float64{4, 4.4, 4.8}, "1.10 × relay-tls CPU total", true},
	} {
		var text bytes.Buffer
		if err := sample(test.base, test.mesh).WriteTargets(&text); err != nil {
			t.Fatal(err)
		}
		if got := text.String(); !strings.Contains(got, test.want) || !strings.Contains(got, "≤ 0.93") ||
			strings.Contains(got, "missed") != test.missed || strings.Count(got, "\n") != 1 {
			t.Errorf("want %q, missed %v:\n%s", test.want, test.missed, got)
		}
	}
}

func TestCompareTellsARegressionFromNoise(t *testing.T) {
	before := []float64{3.0, 3.1, 2.9, 3.05, 2.95, 3.02}
	for _, test := range []struct {
		name        string
		after       []float64
		regressions int
		says        string
	}{
		{"dearer", []float64{3.6, 3.7, 3.5, 3.65, 3.55, 3.62}, 1, "worse"},
		{"cheaper", []float64{2.6, 2.7, 2.5, 2.65, 2.55, 2.62}, 0, "better"},
		{"noise", []float64{2.8, 3.4, 2.9, 3.3, 2.7, 3.1}, 0, ""},
		{"too little to matter", []float64{3.12, 3.13, 3.14, 3.12, 3.13, 3.14}, 0, ""},
		{"too few rounds to tell", []float64{6, 6}, 0, "note:"},
	} {
		c := Compare(sample(before, before), sample(test.after, test.after), Thresholds{})
		found := c.Regressions()
		if (len(found) > 0) != (test.regressions > 0) {
			t.Errorf("%s: regressions %+v", test.name, found)
		}
		var table bytes.Buffer
		if err := c.WriteTable(&table, false); err != nil || !strings.Contains(table.String(), test.says) {
			t.Errorf("%s: no %q, %v:\n%s", test.name, test.says, err, table.String())
		}
	}
	less := sample(before, before)
	less.Results[0].Metric, less.Results[1].Metric = "throughput", "throughput"
	more := sample([]float64{6, 6.1, 6.2, 6.3, 6.4, 6.5}, []float64{6, 6.1, 6.2, 6.3, 6.4, 6.5})
	more.Results[0].Metric, more.Results[1].Metric = "throughput", "throughput"
	if len(Compare(less, more, Thresholds{}).Regressions()) != 0 || len(Compare(more, less, Thresholds{}).Regressions()) != 2 {
		t.Error("more throughput is worse, or less is not")
	}
	more.Machine.CPU = "another"
	if w := Compare(less, more, Thresholds{}).Warnings; len(w) == 0 || !strings.Contains(w[0], "different machines") {
		t.Errorf("warnings of two machines: %q", w)
	}
}

func TestPlotsShowTheirMachine(t *testing.T) {
	dir := t.TempDir()
	path, err := sample([]float64{4, 2}, []float64{3, 5}).WritePlots(dir)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<svg", "a processor", "raceway perf run", "hbone-cross", "CPU total"} {
		if !strings.Contains(string(content), want) {
			t.Errorf("the plots lack %q", want)
		}
	}
	if path, err := (&Report{}).WritePlots(dir); path != "" || err != nil {
		t.Errorf("plots of nothing: %q, %v", path, err)
	}
}
