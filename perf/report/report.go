// Package report is what a benchmark found: read and written as JSON, shown as a table and
// as plots, held against the targets, and compared with another.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Machine is what the measurement ran on and with.
type Machine struct {
	CPU        string    `json:"cpu"`
	Cores      int       `json:"cores"`
	MemoryMiB  uint64    `json:"memoryMiB"`
	Kernel     string    `json:"kernel"`
	Congestion string    `json:"congestionControl"` // of the machine; labs use their own
	Load       string    `json:"loadAverage"`       // at the start: on a busy machine the rest means less
	Go         string    `json:"go"`
	HAProxy    string    `json:"haproxy,omitempty"` // of the yardsticks that took part
	Envoy      string    `json:"envoy,omitempty"`
	Commit     string    `json:"commit"` // with + when the tree had changes
	Command    string    `json:"command"`
	Date       time.Time `json:"date"`
}

// Entry is a scenario or a workload: how it is called, and how people are told of it.
type Entry struct {
	Name  string `json:"name"`
	Title string `json:"title"`
}

// Report is what was measured.
type Report struct {
	Machine   Machine       `json:"machine"`
	Rounds    int           `json:"rounds"`
	Duration  time.Duration `json:"durationNanos"`
	Rate      float64       `json:"pacedRate"` // requests per second of the paced workloads
	IPv6      bool          `json:"ipv6,omitempty"`
	Scenarios []Entry       `json:"scenarios"` // in the order in which people compare them
	Workloads []Entry       `json:"workloads"`
	Results   []Result      `json:"results"`
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

// Add adds what one round found.
func (r *Report) Add(scenario, workload, metric, unit string, value float64) {
	result := r.Find(scenario, workload, metric)
	if result == nil {
		r.Results = append(r.Results, Result{Scenario: scenario, Workload: workload, Metric: metric, Unit: unit})
		result = &r.Results[len(r.Results)-1]
	}
	result.Rounds = append(result.Rounds, value)
	result.Median, result.Min, result.Max = median(result.Rounds), slices.Min(result.Rounds), slices.Max(result.Rounds)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// Find returns a result, or nil.
func (r *Report) Find(scenario, workload, metric string) *Result {
	i := slices.IndexFunc(r.Results, func(x Result) bool {
		return x.Scenario == scenario && x.Workload == workload && x.Metric == metric
	})
	if i < 0 {
		return nil
	}
	return &r.Results[i]
}

// metrics are those of a workload, one result of each for its name and unit.
func (r *Report) metrics(workload string) []Result {
	var metrics []Result
	for _, x := range r.Results {
		if x.Workload == workload && !slices.ContainsFunc(metrics, func(m Result) bool { return m.Metric == x.Metric }) {
			metrics = append(metrics, x)
		}
	}
	return metrics
}

// measured are the scenarios of a workload.
func (r *Report) measured(workload string) []Entry {
	return slices.DeleteFunc(slices.Clone(r.Scenarios), func(s Entry) bool {
		return !slices.ContainsFunc(r.Results, func(x Result) bool { return x.Scenario == s.Name && x.Workload == workload })
	})
}

// Base is where a report's files go, without what tells them apart: named after the time and
// the commit.
func (r *Report) Base(dir string) string {
	return filepath.Join(dir, fmt.Sprintf("%s-%s", r.Machine.Date.Format("20060102T150405Z"), strings.TrimSuffix(r.Machine.Commit, "+")))
}

// WriteJSON writes everything, each round apart, and returns the file's path.
func (r *Report) WriteJSON(dir string) (string, error) {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	path := r.Base(dir) + ".json"
	if err := os.WriteFile(path, append(content, '\n'), 0o644); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	return path, nil
}

// Read reads what WriteJSON wrote.
func Read(path string) (*Report, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the results: %w", err)
	}
	var r Report
	if err := json.Unmarshal(content, &r); err != nil {
		return nil, fmt.Errorf("read the results: %s: %w", path, err)
	}
	if len(r.Results) == 0 {
		return nil, fmt.Errorf("read the results: %s: %w", path, errors.New("there are none in it"))
	}
	return &r, nil
}
