package perf

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// memoryWorkload is where the proxies' memory is reported: it is of no workload but of all.
const memoryWorkload = "proxy memory"

// Report is what was measured.
type Report struct {
	Machine  Machine       `json:"machine"`
	Rounds   int           `json:"rounds"`
	Duration time.Duration `json:"durationNanos"`
	Rate     float64       `json:"pacedRate"` // requests per second of the paced workload
	IPv6     bool          `json:"ipv6,omitempty"`
	Results  []Result      `json:"results"`
}

// Result is one metric of one workload in one scenario.
type Result struct {
	Scenario string    `json:"scenario"`
	Workload string    `json:"workload"`
	Metric   string    `json:"metric"`
	Unit     string    `json:"unit"`
	Median   float64   `json:"median"`
	Min      float64   `json:"min"`
	Max      float64   `json:"max"`
	Rounds   []float64 `json:"rounds"` // in the order they ran
}

func newReport(c Config) *Report {
	return &Report{Machine: ThisMachine(), Rounds: c.Rounds, Duration: c.Duration, Rate: c.Rate, IPv6: c.IPv6}
}

func (r *Report) add(scenario, workload, metric, unit string, value float64) {
	result := r.find(scenario, workload, metric)
	if result == nil {
		r.Results = append(r.Results, Result{Scenario: scenario, Workload: workload, Metric: metric, Unit: unit})
		result = &r.Results[len(r.Results)-1]
	}
	result.Rounds = append(result.Rounds, value)
	sorted := slices.Sorted(slices.Values(result.Rounds))
	result.Min, result.Max = sorted[0], sorted[len(sorted)-1]
	result.Median = (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func (r *Report) find(scenario, workload, metric string) *Result {
	i := slices.IndexFunc(r.Results, func(x Result) bool {
		return x.Scenario == scenario && x.Workload == workload && x.Metric == metric
	})
	if i < 0 {
		return nil
	}
	return &r.Results[i]
}

// WriteTable writes the medians for people, with the spread of the rounds.
func (r *Report) WriteTable(out io.Writer) error {
	m := r.Machine
	if _, err := fmt.Fprintf(out, "%s, %d cores, %d MiB; Linux %s; %s; commit %s; load %s\n%d rounds of %v; median (least to greatest)\n",
		m.CPU, m.Cores, m.MemoryMiB, m.Kernel, m.Go, m.Commit, m.Load, r.Rounds, r.Duration); err != nil {
		return err
	}
	var scenarios []Scenario
	for _, s := range Scenarios() {
		if slices.ContainsFunc(r.Results, func(x Result) bool { return x.Scenario == s.Name }) {
			scenarios = append(scenarios, s)
		}
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, workload := range append(Workloads(), Workload{Name: memoryWorkload, Title: "memory of a proxy"}) {
		r.writeWorkload(w, workload, scenarios)
	}
	return w.Flush()
}

// writeWorkload writes to a tabwriter, whose Flush tells of errors.
func (r *Report) writeWorkload(w io.Writer, workload Workload, scenarios []Scenario) {
	var metrics []Result // one of each, for its name and unit
	for _, x := range r.Results {
		if x.Workload == workload.Name && !slices.ContainsFunc(metrics, func(m Result) bool { return m.Metric == x.Metric }) {
			metrics = append(metrics, x)
		}
	}
	if len(metrics) == 0 {
		return
	}
	header := []string{"\n" + strings.ToUpper(workload.Title)}
	for _, s := range scenarios {
		header = append(header, s.Title)
	}
	fmt.Fprintln(w, strings.Join(header, "\t")) //nolint:errcheck // see above
	for _, m := range metrics {
		row := []string{"  " + m.Metric + ", " + m.Unit}
		for _, s := range scenarios {
			cell := "-"
			if x := r.find(s.Name, workload.Name, m.Metric); x != nil {
				cell = x.cell()
			}
			row = append(row, cell)
		}
		fmt.Fprintln(w, strings.Join(row, "\t")) //nolint:errcheck // see above
	}
}

// cell is the median, with the spread if there can be one.
func (x Result) cell() string {
	if len(x.Rounds) == 1 {
		return short(x.Median)
	}
	return fmt.Sprintf("%s (%s to %s)", short(x.Median), short(x.Min), short(x.Max))
}

// short shows three digits, and all of a large number's.
func short(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}

// WriteJSON writes everything, each round apart, into a file named after the commit and the
// time, and returns its path.
func (r *Report) WriteJSON(dir string) (string, error) {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%s.json", r.Machine.Date.Format("20060102T150405Z"), strings.TrimSuffix(r.Machine.Commit, "+")))
	if err := os.WriteFile(path, append(content, '\n'), 0o644); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	return path, nil
}
