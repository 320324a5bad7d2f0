package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/raceway-mesh/raceway/perf/report"
)

// Report is what was measured. Times are of this machine and of whatever else it did; CPU
// times are not.
type Report struct {
	Machine        report.Machine `json:"machine"`
	Nodes          int            `json:"nodes"`
	Pods           int            `json:"pods"`
	Services       int            `json:"services"`
	Policies       int            `json:"policies"`
	Rate           float64        `json:"rate"` // changes of pods per second, as asked for
	Duration       time.Duration  `json:"durationNanos"`
	APIServerBytes uint64         `json:"apiServerBytes"` // resident, with the cluster and without watchers
	Starts         []Start        `json:"starts"`
	Loads          []Load         `json:"loads"`
}

// Start is how one source got to know the cluster. Memory is that of some seconds later.
type Start struct {
	Name         string        `json:"name"`
	Published    time.Duration `json:"publishedNanos"` // until the first snapshot
	PublishedCPU time.Duration `json:"publishedCPUNanos"`
	Current      time.Duration `json:"currentNanos"` // until the first of the API server's
	CurrentCPU   time.Duration `json:"currentCPUNanos"`
	APIServerCPU time.Duration `json:"apiServerCPUNanos"` // until then
	Received     uint64        `json:"receivedBytes"`     // until then, the file included
	Heap         uint64        `json:"heapBytes"`         // after a garbage collection
	HeapPerPod   uint64        `json:"heapBytesPerPod"`
	Resident     uint64        `json:"residentBytes"`
	ResidentPeak uint64        `json:"residentPeakBytes"`
}

// Load is what changes cost while that many sources watched; of the sources, each.
type Load struct {
	Sources        int           `json:"sources"`
	Took           time.Duration `json:"tookNanos"`
	Changes        float64       `json:"changes"` // of pods per second, each with one of its EndpointSlice
	SourceCores    float64       `json:"sourceCores"`
	APIServerCores float64       `json:"apiServerCores"`
	EtcdCores      float64       `json:"etcdCores"`
	Snapshots      float64       `json:"snapshots"`      // per second
	Allocated      uint64        `json:"allocatedBytes"` // per second
	Received       uint64        `json:"receivedBytes"`  // per second
	ResidentPeak   uint64        `json:"residentPeakBytes"`
	APIServerPeak  uint64        `json:"apiServerPeakBytes"` // resident, since its start
	// From the API server's answer to the snapshot that shows the change.
	Own     Latency `json:"own"`     // of a pod of the source's node
	Foreign Latency `json:"foreign"` // of another node's
}

// Latency are quantiles of a number of measurements.
type Latency struct {
	Count int           `json:"count"`
	P50   time.Duration `json:"p50Nanos"`
	P99   time.Duration `json:"p99Nanos"`
	Max   time.Duration `json:"maxNanos"`
}

// WriteTable writes it for people.
func (r *Report) WriteTable(out io.Writer) error {
	m := r.Machine
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	line := func(cells ...any) {
		text := make([]string, len(cells))
		for i, c := range cells {
			text[i] = fmt.Sprint(c)
		}
		fmt.Fprintln(w, strings.Join(text, "\t")) //nolint:errcheck // Flush tells
	}
	line(fmt.Sprintf("%s, %d cores, %d MiB; Linux %s; %s; commit %s; load %s", m.CPU, m.Cores, m.MemoryMiB, m.Kernel, m.Go, m.Commit, m.Load))
	line(fmt.Sprintf("%d nodes, %d pods, %d services, %d policies; the API server has %s", r.Nodes, r.Pods, r.Services, r.Policies, mebibytes(r.APIServerBytes)))
	row := func(title string, of func(s Start) any) {
		cells := []any{"  " + title}
		for _, s := range r.Starts {
			cells = append(cells, of(s))
		}
		line(cells...)
	}
	line()
	row("", func(s Start) any { return s.Name })
	row("first snapshot after", func(s Start) any { return short(s.Published) })
	row("  CPU time until then", func(s Start) any { return short(s.PublishedCPU) })
	row("first of the API server's after", func(s Start) any { return short(s.Current) })
	row("  CPU time until then", func(s Start) any { return short(s.CurrentCPU) })
	row("  of the API server", func(s Start) any { return short(s.APIServerCPU) })
	row("received until then", func(s Start) any { return mebibytes(s.Received) })
	row("heap in use", func(s Start) any { return mebibytes(s.Heap) })
	row("  per pod", func(s Start) any { return fmt.Sprintf("%d B", s.HeapPerPod) })
	row("resident, at most", func(s Start) any { return mebibytes(s.Resident) + ", " + mebibytes(s.ResidentPeak) })
	line()
	change := func(title string, of func(l Load) any) {
		cells := []any{"  " + title}
		for _, l := range r.Loads {
			cells = append(cells, of(l))
		}
		line(cells...)
	}
	change("sources watching", func(l Load) any { return l.Sources })
	change("pods changed per second", func(l Load) any { return fmt.Sprintf("%.1f", l.Changes) })
	change("cores of the API server", func(l Load) any { return fmt.Sprintf("%.3f", l.APIServerCores) })
	change("memory of the API server", func(l Load) any { return mebibytes(l.APIServerPeak) })
	change("cores of etcd", func(l Load) any { return fmt.Sprintf("%.3f", l.EtcdCores) })
	watched := func(title string, of func(l Load) any) {
		change(title, func(l Load) any {
			if l.Sources == 0 {
				return "-"
			}
			return of(l)
		})
	}
	watched("cores of a source", func(l Load) any { return fmt.Sprintf("%.3f", l.SourceCores) })
	watched("snapshots per second", func(l Load) any { return fmt.Sprintf("%.1f", l.Snapshots) })
	watched("allocated per second", func(l Load) any { return mebibytes(l.Allocated) })
	watched("received per second", func(l Load) any { return fmt.Sprintf("%d KiB", l.Received>>10) })
	watched("resident at most", func(l Load) any { return mebibytes(l.ResidentPeak) })
	watched("own pod shown after, p50, p99", func(l Load) any { return short(l.Own.P50) + ", " + short(l.Own.P99) })
	watched("foreign pod shown after, p50, p99", func(l Load) any { return short(l.Foreign.P50) + ", " + short(l.Foreign.P99) })
	return w.Flush()
}

func mebibytes(n uint64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }

// short leaves out digits that say nothing.
func short(d time.Duration) string {
	if d >= time.Second {
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(time.Millisecond).String()
}

// WriteJSON writes everything into a file named after the time and the commit, and returns
// its path.
func (r *Report) WriteJSON(dir string) (string, error) {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("scale-%s-%s.json", r.Machine.Date.Format("20060102T150405Z"), strings.TrimSuffix(r.Machine.Commit, "+")))
	if err := os.WriteFile(path, append(content, '\n'), 0o644); err != nil {
		return "", fmt.Errorf("write the results: %w", err)
	}
	return path, nil
}
